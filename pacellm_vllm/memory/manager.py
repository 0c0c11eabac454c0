"""PagedBankManager: claims, shares and gives back banks' pages on the scheduler's side."""

import hashlib
import math
from collections.abc import Sequence
from typing import Any, ClassVar

from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    BlockHashWithGroupId,
    KVCacheBlock,
    make_block_hash_with_group_id,
)
from vllm.v1.core.single_type_kv_cache_manager import CircularBufferManager
from vllm.v1.request import Request

from pacellm_vllm.compat import (
    add_block_hash_key,
    copy_blocks_before_forward,
    plugin_logger,
    publish_block,
    request_in_hand,
    watch_requests,
)
from pacellm_vllm.config import CONFIG_KEY
from pacellm_vllm.memory.layout import BankLayout
from pacellm_vllm.request import RequestSettings

logger = plugin_logger()


class PagedBankManager(CircularBufferManager):
    """Claims pages as tokens come to need them; the base class frees them.

    A request that has turned its memory off, or whose longest possible course ends within the
    first segment (no token would ever read its bank), holds the null block instead of pages, and
    its prefix is found in the cache as without memory.

    Prefix caching: a committed bank does not change within a segment, so its pages are a snapshot
    of the request's prefix up to the segment's start. Snapshots are ordinary cached blocks of the
    pool, found by the prefix's hash and evicted like any other:

    - a request that ends or is preempted donates its pages, which costs nothing;
    - a request that is still reading its prompt publishes copies, made by vLLM's own block copies
      before the next forward, when blocks are plenty and at least as many tokens lie behind it as
      the copies would hold;
    - a request that hits claims pages of its own and has the snapshot copied into them.
    """

    supports_fine_grained_hash_lookup: ClassVar[bool] = False

    def __init__(self, kv_cache_spec: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self._layout: BankLayout = kv_cache_spec.layout
        # The base class leaves state out of zeroing. Pages never need it (what counts is decided
        # by position), but where vLLM zeroes anyway a second defence costs one memset.
        self._record_new_block_ids = bool(kwargs.get("needs_kv_cache_zeroing"))
        self._requests: dict[str, Request] = {}
        # Tokens of the longest prefix each request has published, or was restored from.
        self._published: dict[str, int] = {}
        self._publishing: dict[str, int] = {}
        self._restoring: dict[str, Sequence[KVCacheBlock]] = {}
        # Blocks published in this step hold nothing until its copies ran: copy from their source.
        self._sources: dict[int, KVCacheBlock] = {}
        self._log_start(kv_cache_spec)
        watch_requests()
        add_block_hash_key(_hash_key, self.block_pool)

    def _log_start(self, spec: Any) -> None:
        layout, pool = self._layout, self.block_pool.num_gpu_blocks
        longest = cdiv(spec.max_model_len, spec.block_size)
        logger.info(
            "pacellm: memory in %s; a request's banks take %.1f MB: %d KV blocks for its first "
            "token, %d from its second segment on, which is %.2f %% of the pool's %d; %.1f "
            "requests of %d tokens fit at once, %.1f without memory.",
            spec.summary,
            spec.num_layers * layout.num_pages * layout.page_bytes / 1e6,
            layout.pages_for(1),
            layout.num_pages,
            100 * layout.num_pages / pool,
            pool,
            pool / (longest + layout.pages_for(spec.max_model_len)),
            spec.max_model_len,
            pool / longest,
        )

    def new_step_starts(self) -> None:
        super().new_step_starts()
        self._sources.clear()

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
        unit = block_pool.hash_block_size
        step = math.lcm(layout.segment_size, alignment_tokens)
        known = min(max_length, len(block_hashes) * unit)
        for length in range(known // step * step, 0, -step):
            prefix = block_hashes[length // unit - 1]
            pages = [
                block_pool.get_cached_block(_page_hash(prefix, i), kv_cache_group_ids)
                for i in range(layout.committed_pages)
            ]
            if all(pages):
                groups = zip(*(page for page in pages if page), strict=True)
                return tuple(list(group) for group in groups), length
        return tuple([] for _ in kv_cache_group_ids), 0

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        *args: Any,
        **kwargs: Any,
    ) -> int:
        if self._holds_no_bank(request_id):
            return 0
        need = self._missing(request_id, num_tokens)
        need += self._get_num_evictable_blocks(new_computed_blocks)
        self._publishing.pop(request_id, None)
        length = self._worth_publishing(request_id)
        copies = self._layout.committed_pages
        # Never at anyone's expense: only if all this request may need now fits besides.
        at_most = need + cdiv(num_tokens, self.block_size) + copies
        if length and at_most <= self.block_pool.get_num_free_blocks():
            self._publishing[request_id] = length
            need += copies
        return need

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        if new_computed_blocks:
            self.block_pool.touch(new_computed_blocks)
            self._restoring[request_id] = list(new_computed_blocks)
            self._published[request_id] = num_local_computed_tokens

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        if length := self._publishing.pop(request_id, 0):
            self._publish(request_id, length)
        held = self.req_to_blocks[request_id]
        if self._holds_no_bank(request_id):
            # Spelled out, because a worker does not clear what a row of its block table held.
            new = [] if held else [self.block_pool.null_block] * self._layout.num_pages
            held.extend(new)
            return new
        missing = self._missing(request_id, num_tokens)
        new = self.block_pool.get_new_blocks(missing) if missing else []
        held.extend(new)
        if self._record_new_block_ids:
            self.new_block_ids.extend(block.block_id for block in new)
        snapshot = self._restoring.pop(request_id, ())
        for source, page in zip(snapshot, held, strict=False):
            self._copy(source, page)
            # Touched when it was hit; the copy holds it from here on.
            self.block_pool.free_blocks([source])
        return new

    def allocate_external_computed_blocks(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "pacellm: tokens computed elsewhere carry no memory; serve without KV transfer."
        )

    def cache_blocks(self, request: Request, *args: Any, **kwargs: Any) -> None:
        self._requests[request.request_id] = request

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        length = self._committed_tokens(request_id)
        if length > self._published.get(request_id, 0):
            hashes = self._page_hashes(request_id, length)
            if not self._is_cached(hashes[0]):
                pages = self.req_to_blocks[request_id]
                for page, page_hash in zip(pages, hashes, strict=False):
                    publish_block(self.block_pool, page, page_hash, length)
        for source in self._restoring.pop(request_id, ()):
            self.block_pool.free_blocks([source])
        for state in (self._requests, self._published, self._publishing):
            state.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def _holds_no_bank(self, request_id: str) -> bool:
        """Decided when a request is first placed: what it holds from then on says so."""
        held = self.req_to_blocks.get(request_id)
        if held:
            return held[0].is_null
        return _needs_no_bank(request_in_hand(), self._layout)

    def _missing(self, request_id: str, num_tokens: int) -> int:
        held = len(self.req_to_blocks.get(request_id, ()))
        return max(self._layout.pages_for(num_tokens) - held, 0)

    def _committed_tokens(self, request_id: str) -> int:
        """Tokens behind the bank in the request's pages once all its scheduled steps ran.

        0 when there is none, when tokens sampled in a step still in flight would be among them, or
        when drafts may be, which the bank does not hold before the next step.
        """
        request = self._requests.get(request_id)
        if not self.enable_caching or request is None or self._holds_no_bank(request_id):
            return 0
        size = self._layout.segment_size
        computed = request.num_computed_tokens
        length = computed // size * size
        drafts = self._layout.drafts if computed > request.num_prompt_tokens else 0
        if computed - drafts < length:
            return 0
        known = len(request.block_hashes) * self.block_pool.hash_block_size
        return length if length <= known else 0

    def _worth_publishing(self, request_id: str) -> int:
        """Tokens of the prefix to publish now, or 0.

        Only while the prompt is read (what is generated is donated at the end), and only when the
        copies take no more blocks than the attention blocks they make reusable.
        """
        length = self._committed_tokens(request_id)
        gain = length - self._published.get(request_id, 0)
        if gain <= 0 or gain < self._layout.committed_pages * self.block_size:
            return 0
        if length > self._requests[request_id].num_prompt_tokens:
            return 0
        if self._is_cached(self._page_hashes(request_id, length)[0]):
            self._published[request_id] = length
            return 0
        return length

    def _publish(self, request_id: str, length: int) -> None:
        hashes = self._page_hashes(request_id, length)
        copies = self.block_pool.get_new_blocks(len(hashes))
        pages = self.req_to_blocks[request_id]
        for page, copy, page_hash in zip(pages, copies, hashes, strict=False):
            self._copy(page, copy)
            self._sources[copy.block_id] = page
            publish_block(self.block_pool, copy, page_hash, length)
        self.block_pool.free_blocks(reversed(copies))
        self._published[request_id] = length

    def _copy(self, source: KVCacheBlock, target: KVCacheBlock) -> None:
        """Copy a block before the next forward; the scheduler lets go of both afterwards."""
        source = self._sources.get(source.block_id, source)
        self.block_pool.touch([source, target])
        copy_blocks_before_forward(self, [(source, target)])

    def _page_hashes(self, request_id: str, length: int) -> list[BlockHashWithGroupId]:
        unit = self.block_pool.hash_block_size
        prefix = self._requests[request_id].block_hashes[length // unit - 1]
        return [
            make_block_hash_with_group_id(_page_hash(prefix, i), self.kv_cache_group_id)
            for i in range(self._layout.committed_pages)
        ]

    def _is_cached(self, page_hash: BlockHashWithGroupId) -> bool:
        return self.block_pool.cached_block_hash_to_block.get_one_block(page_hash) is not None


def _needs_no_bank(request: Request | None, layout: BankLayout) -> bool:
    if request is None or request.sampling_params is None:
        return False
    if not RequestSettings.of(request.sampling_params.extra_args).enabled:
        return True
    # The last token sampled is never computed. A session may still grow longer than this.
    computed = request.num_prompt_tokens + request.max_tokens - 1
    return computed <= layout.segment_size and not request.resumable


def _hash_key(request: Request) -> tuple[str, str] | None:
    """Never raises: settings that are not allowed share nothing with those that are."""
    params = request.sampling_params
    if params is None or not params.extra_args:
        return None
    try:
        key = RequestSettings.of(params.extra_args).key()
    except Exception:
        key = "not allowed"
    return (CONFIG_KEY, key) if key else None


def _page_hash(prefix: bytes, page: int) -> BlockHash:
    """The hash of one page of the bank committed after a prefix with this hash."""
    return BlockHash(hashlib.sha256(prefix + b"pacellm" + page.to_bytes(4, "big")).digest())
