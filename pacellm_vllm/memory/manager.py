"""PagedBankManager: claims, shares and gives back banks' pages on the scheduler's side."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar
from weakref import WeakSet

from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, BlockHashWithGroupId, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import CircularBufferManager
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.request import Request

from pacellm_vllm.compat import (
    add_block_hash_key,
    add_engine_method,
    blocks_kept_free,
    check_taken_requests,
    copy_blocks_before_forward,
    count_cached_tokens_without,
    evictable_blocks,
    groups_in_hand,
    keep_out_of_events,
    managers_of,
    plugin_logger,
    request_in_hand,
    watch_requests,
)
from pacellm_vllm.config import CONFIG_KEY
from pacellm_vllm.memory.cache import SnapshotCache, count_snapshots
from pacellm_vllm.memory.counts import PoolCounts
from pacellm_vllm.memory.layout import BankLayout
from pacellm_vllm.memory.snapshots import SnapshotGrid, takes_copies
from pacellm_vllm.ops.rules import MemoryRules
from pacellm_vllm.request import RequestSettings, key_of, settings_of
from pacellm_vllm.sentences import of_request

logger = plugin_logger()

POOL_METHOD = "pacellm_pool_report"

# Requests do not say which engine they are of, and one process may hold several.
_MANAGERS: "WeakSet[PagedBankManager]" = WeakSet()

# vLLM copies all blocks of a step through one temporary, outside of its memory profile.
_MAX_RESTORED_BYTES = 128 << 20


class PagedBankManager(CircularBufferManager):
    """Claims pages as tokens come to need them; the base class frees them.

    A request that has turned its memory off, or whose longest possible course ends within the
    first segment (no token would ever read its bank), holds the null block instead of pages, and
    its prefix is found in the cache as without memory.

    Prefix caching: a committed bank does not change within a segment, so its pages are a snapshot
    of the request's prefix up to the segment's start. Snapshots are ordinary cached blocks of the
    pool, found by the prefix's hash and evicted like any other:

    - while a request reads its prompt, each forward leaves copies at the boundaries of a
      ``SnapshotGrid`` that it reads past, as far as blocks are plenty; they can be found from the
      next step on;
    - a request that ends or is preempted donates its pages, which costs nothing;
    - a request that hits has the snapshot copied into pages of its own, by vLLM's block copies, or
      takes the snapshot's pages over where blocks are too few for both.

    The methods stand in the order in which vLLM's scheduler calls them: ``new_step_starts``, then
    for each request of the step ``find_longest_cache_hit`` (a new one), how many blocks it needs,
    ``add_local_computed_blocks`` (a hit), ``allocate_new_blocks``, ``cache_blocks``; and
    ``pop_blocks_for_free`` where one ends or is preempted.
    """

    supports_fine_grained_hash_lookup: ClassVar[bool] = False

    def __init__(self, kv_cache_spec: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self._layout: BankLayout = kv_cache_spec.layout
        self.rules: MemoryRules = kv_cache_spec.rules
        self._cache = SnapshotCache(self.block_pool, self._layout, [self.kv_cache_group_id])
        _MANAGERS.add(self)
        self._grid: SnapshotGrid | None = kv_cache_spec.grid
        self._max_step_tokens: int = kv_cache_spec.max_step_tokens
        snapshot_bytes = (
            self._layout.max_committed_pages * self._layout.page_bytes * kv_cache_spec.num_layers
        )
        self._max_restored_a_step = max(1, _MAX_RESTORED_BYTES // snapshot_bytes)
        self._requests: dict[str, Request] = {}
        # By request: boundaries at which the next forward would copy its bank, if it is placed, and
        # at which this step's does, with the hashes of the copies' first pages.
        self._planned_copies: dict[str, list[int]] = {}
        self._copies_this_step: dict[str, list[int]] = {}
        self._hashes_of_copies: set[BlockHash] = set()
        # Snapshots of requests that hit and are not placed yet; and who would take theirs over.
        self._snapshots_hit: dict[str, Sequence[KVCacheBlock]] = {}
        self._taking_over: set[str] = set()
        self._restored_this_step = 0
        self._counts = PoolCounts()
        keep_out_of_events(self.block_pool, self.kv_cache_group_id, self._count_evicted)
        add_engine_method(POOL_METHOD, _pool_report)
        self._log_start(kv_cache_spec)
        watch_requests()
        count_cached_tokens_without(type(kv_cache_spec))
        add_block_hash_key(_hash_key, self.block_pool)
        check_taken_requests(_check_settings, self.block_pool)

    def _count_evicted(self, hashes: Iterable[BlockHashWithGroupId]) -> None:
        self._counts.evicted += count_snapshots(hashes)

    def counts(self) -> PoolCounts:
        """Of the engine so far, and of this moment."""
        pages = [
            sum(not page.is_null for page in held) for held in self.req_to_blocks.values() if held
        ]
        return replace(
            self._counts,
            blocks_held=sum(pages),
            requests=sum(count > 0 for count in pages),
            streams=sum(bool(request.resumable) for request in self._requests.values()),
        )

    def _log_start(self, spec: Any) -> None:
        layout, pool = self._layout, self.block_pool.num_gpu_blocks
        longest = cdiv(spec.max_model_len, spec.block_size) + spec.other_blocks
        logger.info(
            "pacellm: memory in %s; a request's banks take %.1f MB: %d KV blocks for its first "
            "token, %d from its second segment on, which is %.2f %% of the pool's %d; %.1f "
            "requests of %d tokens fit at once, %.1f without memory; %s.",
            spec.summary,
            spec.num_layers * layout.num_pages * layout.page_bytes / 1e6,
            layout.pages_for(1),
            layout.num_pages,
            100 * layout.num_pages / pool,
            pool,
            pool / (longest + layout.pages_for(spec.max_model_len)),
            spec.max_model_len,
            pool / longest,
            self._describe_caching(spec.max_model_len),
        )
        if spec.max_model_len <= layout.segment_size + 1:
            logger.warning(
                "pacellm: memory never acts here, because no request of at most max_model_len = "
                "%d tokens reads past its first segment of %d; set a smaller segment_size.",
                spec.max_model_len,
                layout.segment_size,
            )

    def _describe_caching(self, max_model_len: int) -> str:
        if self._grid is None:
            return "prefix caching is off"
        if max_model_len <= self._layout.segment_size:
            return "prefixes with memory are never reused, as none is a whole segment long"
        return (
            f"prefixes with memory are reused in whole segments of {self._layout.segment_size} "
            f"tokens, while prompts are read every {self._grid.interval}"
        )

    def new_step_starts(self) -> None:
        """The forward of the last step has made its copies, or does before this one's copies."""
        super().new_step_starts()
        for request_id, boundaries in self._copies_this_step.items():
            self._publish_copies(request_id, boundaries)
            held = self.req_to_blocks[request_id]
            for boundary in boundaries:
                columns = self._columns(boundary)
                pages = held[columns]
                held[columns] = [self.block_pool.null_block] * len(pages)
                self.block_pool.free_blocks(pages)
        self._copies_this_step.clear()
        self._hashes_of_copies.clear()
        self._restored_this_step = 0

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: Any,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """The longest prefix of whole segments, up to ``max_length`` tokens, with a snapshot."""
        layout: BankLayout = kv_cache_spec.layout
        if _needs_no_bank(request_in_hand(), layout):
            return tuple([] for _ in kv_cache_group_ids), max_length
        cache = SnapshotCache(block_pool, layout, kv_cache_group_ids)
        return cache.longest_hit(block_hashes, max_length, alignment_tokens)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """Blocks to take from the pool; plans what ``allocate_new_blocks`` then does with them."""
        if self._holds_no_bank(request_id):
            return 0
        if new_computed_blocks and self._restored_this_step >= self._max_restored_a_step:
            # More than there are: the request waits for the next step.
            return self.block_pool.num_gpu_blocks + 1
        own = self._missing(request_id, num_tokens)
        need = own + evictable_blocks(new_computed_blocks)
        # All that this request may need now, in every group.
        at_most = need + (groups_in_hand() - 1) * cdiv(num_tokens, self.block_size)
        spare = self.block_pool.get_num_free_blocks() - at_most
        self._taking_over.discard(request_id)
        if new_computed_blocks and spare < 0 and need == own + len(new_computed_blocks):
            # Nobody else uses the snapshot, so its pages become the request's: with them it needs
            # no more blocks than without a hit, and what fits alone is always scheduled.
            self._taking_over.add(request_id)
            need = own
        self._planned_copies.pop(request_id, None)
        if apply_admission_cap:
            return need
        planned = self._worth_copying(total_computed_tokens, num_tokens_main_model)
        if planned:
            spare -= self._reserved_for_others(request_id) + blocks_kept_free()
            while planned and spare < self._pages_of(planned):
                planned.pop()
            self._planned_copies[request_id] = planned
        return need + self._pages_of(planned)

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Hold the snapshot that a request hit until it is placed."""
        if new_computed_blocks:
            self.block_pool.touch(new_computed_blocks)
            self._snapshots_hit[request_id] = list(new_computed_blocks)
            self._counts.hit += 1
            self._counts.hit_tokens += num_local_computed_tokens

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Place a request: its pages, the snapshot it hit copied into them, pages for copies."""
        held = self.req_to_blocks[request_id]
        if request := request_in_hand():
            self._requests[request_id] = request
        before = len(held)
        if self._holds_no_bank(request_id):
            if not held:
                # Spelled out, because a worker does not clear what a row of its block table held.
                held.extend([self.block_pool.null_block] * self._layout.num_pages)
            return held[before:]
        snapshot = self._snapshots_hit.pop(request_id, ())
        if snapshot and request_id in self._taking_over:
            self.block_pool.evict_blocks({page.block_id for page in snapshot})
            held.extend(snapshot)
            snapshot = ()
        held.extend(self._new_blocks(self._missing(request_id, num_tokens)))
        if snapshot:
            self._restored_this_step += 1
            pairs = list(zip(snapshot, held, strict=False))
            # The snapshot was touched when it was hit; the scheduler lets go of both.
            self.block_pool.touch([page for _, page in pairs])
            copy_blocks_before_forward(self, pairs)
        self._append_columns(request_id, num_tokens_main_model)
        return held[before:]

    def _append_columns(self, request_id: str, num_tokens: int) -> None:
        """Lengthen a request's row by the boundaries among its tokens, with pages for copies."""
        if self._grid is None:
            return
        planned, request = self._planned_copies.pop(request_id, []), request_in_hand()
        held = self.req_to_blocks[request_id]
        new = self._grid.row_length(num_tokens) - len(held)
        held.extend([self.block_pool.null_block] * new)
        if not planned:
            return
        assert request is not None, f"copies are planned for a request in hand, not {request_id}"
        for boundary in planned:
            columns = self._columns(boundary)
            held[columns] = self._new_blocks(len(held[columns]))
            self._hashes_of_copies.add(self._cache.first_hash(request.block_hashes, boundary))
        self._copies_this_step[request_id] = planned

    def allocate_external_computed_blocks(self, request_id: str, *args: Any, **kwargs: Any) -> None:
        sentence = "pacellm: tokens computed elsewhere carry no memory; serve without KV transfer."
        raise NotImplementedError(of_request(sentence, request_id))

    def cache_blocks(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """Nothing yet: banks are cached when a step has made copies, or a request ends."""

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """What a request held, after its copies and its own bank were left in the cache."""
        request = self._requests.get(request_id)
        if request is not None:
            computed = request.num_computed_tokens
            made = [at for at in self._copies_this_step.pop(request_id, ()) if at < computed]
            self._publish_copies(request_id, made)
            self._donate(request)
            del self._requests[request_id]
        # Hit, but never placed.
        self.block_pool.free_blocks(self._snapshots_hit.pop(request_id, ()))
        self._planned_copies.pop(request_id, None)
        self._taking_over.discard(request_id)
        return super().pop_blocks_for_free(request_id)

    def _donate(self, request: Request) -> None:
        """Leave the request's own pages in the cache as a snapshot, if they are one."""
        length = self._committed_tokens(request)
        if not length:
            return
        if self._cache.find(request.block_hashes, length) is None:
            held = self.req_to_blocks[request.request_id]
            committed = held[: self._layout.committed_pages(length)]
            self._cache.publish(committed, request.block_hashes, length)
            self._counts.published += 1

    def _publish_copies(self, request_id: str, boundaries: Iterable[int]) -> None:
        held = self.req_to_blocks[request_id]
        for boundary in boundaries:
            hashes = self._requests[request_id].block_hashes
            self._cache.publish(held[self._columns(boundary)], hashes, boundary)
            self._counts.published += 1

    def _new_blocks(self, count: int) -> list[KVCacheBlock]:
        return self.block_pool.get_new_blocks(count) if count > 0 else []

    def _holds_no_bank(self, request_id: str) -> bool:
        """Decided when a request is first placed: what it holds from then on says so."""
        held = self.req_to_blocks.get(request_id)
        if held:
            return held[0].is_null
        return _needs_no_bank(request_in_hand(), self._layout)

    def _missing(self, request_id: str, num_tokens: int) -> int:
        held = len(self.req_to_blocks.get(request_id, ()))
        return max(self._layout.pages_for(num_tokens) - held, 0)

    def _columns(self, boundary: int) -> slice:
        assert self._grid is not None
        columns = self._grid.columns(boundary)
        return slice(columns.start, columns.stop)

    def _pages_of(self, boundaries: Iterable[int]) -> int:
        return sum(map(self._layout.committed_pages, boundaries))

    def _committed_tokens(self, request: Request) -> int:
        """Tokens behind the bank in the request's pages once all its scheduled steps ran.

        0 when there is none, when tokens sampled in a step still in flight would be among them, or
        when drafts may be, which the bank does not hold before the next step.
        """
        if not self.enable_caching or self._holds_no_bank(request.request_id):
            return 0
        size = self._layout.segment_size
        computed = request.num_computed_tokens
        length = computed // size * size
        if computed - self._layout.drafts < length:
            return 0
        return length if length <= self._cache.hashed_tokens(request.block_hashes) else 0

    def _worth_copying(self, computed: int, num_tokens: int) -> list[int]:
        """Boundaries at which the next forward should copy the bank of the request in hand.

        Only of its prompt: what is generated is donated at the end.
        """
        request = request_in_hand()
        if self._grid is None or not self.enable_caching or request is None:
            return []
        if not takes_copies(num_tokens - computed, self._layout.drafts):
            return []
        hashes = request.block_hashes
        known = min(self._cache.hashed_tokens(hashes), request.num_prompt_tokens)
        return [
            boundary
            for boundary in self._grid.boundaries(computed, num_tokens)
            if boundary <= known
            and self._cache.first_hash(hashes, boundary) not in self._hashes_of_copies
            and self._cache.find(hashes, boundary) is None
        ]

    def _reserved_for_others(self, request_id: str) -> int:
        """Blocks that the other running requests may need in this step."""
        others = [other for name, other in self._requests.items() if name != request_id]
        tokens = sum(max(other.num_tokens - other.num_computed_tokens, 1) for other in others)
        blocks = cdiv(min(tokens, self._max_step_tokens), self.block_size) + len(others)
        pages = sum(
            max(self._layout.num_pages - len(self.req_to_blocks.get(other.request_id, ())), 0)
            for other in others
        )
        return (groups_in_hand() - 1) * blocks + pages


def _needs_no_bank(request: Request | None, layout: BankLayout) -> bool:
    if request is None or request.sampling_params is None:
        return False
    if not settings_of(request).enabled:
        return True
    # Streamed input may grow. The last token sampled is never computed.
    longest = request.num_prompt_tokens + request.max_tokens - 1
    return not request.resumable and longest <= layout.segment_size


def _check_settings(request: EngineCoreRequest) -> None:
    """``PaceConfigError`` for settings that this package's front end would have refused."""
    params = request.sampling_params
    RequestSettings.of(params.extra_args if params else None)


def _pool_report(core: Any) -> dict[str, int]:
    """``PagedBankManager.counts`` of an ``EngineCore`` with memory."""
    [manager] = [one for one in managers_of(core) if isinstance(one, PagedBankManager)]
    return manager.counts().as_dict()


def _hash_key(request: Request) -> tuple[str, str] | None:
    """Of requests of engines with memory only."""
    if request.sampling_params is None or not request.sampling_params.extra_args:
        return None
    try:
        rules = {manager.rules for manager in _MANAGERS}
        if len(rules) == 1:
            key = key_of(request, *rules)
        else:
            settings = settings_of(request)
            key = repr((settings.enabled, settings.overrides())) if settings.differs() else ""
    except Exception:
        # A hasher must not raise. What is not allowed shares nothing with what is.
        key = "not allowed"
    return (CONFIG_KEY, key) if key else None
