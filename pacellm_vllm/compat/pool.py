"""Banks' pages in the pool of KV blocks: their spec, hashes, copies and events."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

from pacellm_vllm.compat.patching import patch
from pacellm_vllm.sentences import of_request

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId, KVCacheBlock
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.request import Request


def register_kv_cache_spec(spec: type, manager: type) -> None:
    """Register a KV cache spec of ours with its manager.

    Symptom: registering into an empty registry leaves vLLM's own specs unregistered in that
    process, because ``_ensure_registered`` returns early when it finds any entry.
    Can go when ``KVCacheSpecRegistry.register`` registers the built-in specs first.
    """
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(spec, manager, uniform_type_base_spec=spec)


def keep_out_of_events(
    pool: BlockPool, group: int, removed_ours: Callable[[list[BlockHashWithGroupId]], None]
) -> None:
    """Let ``pool`` tell nothing of the blocks of KV cache group ``group`` in its KV events.

    ``removed_ours`` is told of theirs that are evicted.

    Symptom: vLLM derives the hashes in an event from a request's tokens, one for each block, which
    the pages of a bank are not: an IndexError, or events about attention blocks that are not there.
    Can go when a group can be left out of events.
    """
    from vllm.v1.core.kv_cache_utils import get_group_id

    stored, removed = pool.emit_cached_block_events, pool._emit_block_removed_events

    def emit_stored(request: Request, blocks: int, size: int, kv_cache_group_id: int) -> None:
        if kv_cache_group_id != group:
            stored(request, blocks, size, kv_cache_group_id)

    def emit_removed(hashes: list[BlockHashWithGroupId]) -> None:
        theirs = [block_hash for block_hash in hashes if get_group_id(block_hash) != group]
        removed_ours([block_hash for block_hash in hashes if get_group_id(block_hash) == group])
        removed(theirs)

    pool.emit_cached_block_events = emit_stored  # type: ignore[assignment, method-assign]
    pool._emit_block_removed_events = emit_removed  # type: ignore[assignment, method-assign]


# Pools that hold banks, what hashes the blocks of requests in their engines, and what checks these.
_keyed_pools: WeakSet[BlockPool] = WeakSet()
_keyed_hashers: WeakSet[Callable[..., Any]] = WeakSet()
_checks: WeakKeyDictionary[BlockPool, Callable[[EngineCoreRequest], None]] = WeakKeyDictionary()


def add_block_hash_key(key: Callable[[Request], tuple[str, str] | None], pool: BlockPool) -> None:
    """Make ``key(request)``, unless None, part of the block hashes of the engine with ``pool``.

    It must not raise. Requests of other engines in this process keep vLLM's hashes.
    Symptom: vLLM hashes tokens, adapters, images and the salt; what else changes activations
    would be shared by prefix caching.
    Can go when requests can carry hash keys of their own.
    """
    _keyed_pools.add(pool)

    def keyed(original: Callable[..., Any], request: Request, *args: Any, **kwargs: Any) -> Any:
        keys, next_mm = original(request, *args, **kwargs)
        ours = key(request) if request._block_hasher in _keyed_hashers else None
        return ((*(keys or ()), ours) if ours else keys), next_mm

    patch("add_block_hash_key", keyed)
    # A request knows its hasher and no engine, the engine its hasher.
    patch("take_requests", _taken)


def check_taken_requests(check: Callable[[EngineCoreRequest], None], pool: BlockPool) -> None:
    """Have the engine with ``pool`` refuse requests for which ``check(request)`` raises.

    It raises ``ValueError``, which ends the request with that sentence (in vLLM 0.32 with an error
    that does not say it).
    Symptom: a front end without our checks, as vLLM's in Rust, passes everything on, and what the
    scheduler raises ends the engine.
    Can go when an engine asks its plugins about the requests it takes.
    """
    _checks[pool] = check
    patch("take_requests", _taken)


def _taken(original: Callable[..., Any], core: EngineCore, request: EngineCoreRequest) -> Any:
    from vllm.exceptions import VLLMValidationError

    manager = getattr(core.scheduler, "kv_cache_manager", None)
    pool = manager.block_pool if manager else None
    if core.request_block_hasher and pool in _keyed_pools:
        key_hashes_of(core.request_block_hasher)
    if pool is not None and pool in _checks:
        try:
            _checks[pool](request)
        except ValueError as error:
            raise VLLMValidationError(of_request(error, request.request_id)) from None
    return original(core, request)


def key_hashes_of(hasher: Callable[..., Any]) -> None:
    """Let the key of :func:`add_block_hash_key` into what ``hasher`` hashes.

    Symptom and end: those of :func:`add_block_hash_key`.
    """
    _keyed_hashers.add(hasher)


def evictable_blocks(blocks: Iterable[KVCacheBlock]) -> int:
    """How many cached ``blocks`` the pool counts as free, as nobody holds them.

    Symptom: a hit takes them out of the free ones, so a manager that leaves them out of what it
    needs promises blocks that are not there; vLLM's managers count them in a private method.
    Can go when the pool counts them.
    """
    return sum(block.ref_cnt == 0 and not block.is_null for block in blocks)


def publish_block(
    pool: BlockPool, block: KVCacheBlock, block_hash: BlockHashWithGroupId, num_tokens: int
) -> None:
    """Make ``block`` findable under ``block_hash``.

    Symptom: vLLM's public ``cache_full_blocks`` derives hashes from a request's tokens, one block
    for each stretch of them, which the pages of a bank are not.
    Can go when a block can be cached under a hash of the caller's.
    """
    pool._insert_block_hash(block_hash, block, num_tokens=num_tokens)


def copy_blocks_before_forward(
    manager: SingleTypeKVCacheManager, pairs: Iterable[tuple[KVCacheBlock, KVCacheBlock]]
) -> None:
    """Have the workers copy blocks (source, target) before their next forward.

    The caller has touched both; the scheduler lets go of them once the copy is on its way.
    Symptom: vLLM has block copies, but only its own managers ask for any.
    Can go when there is a public method to ask.
    """
    manager._pending_cow_copies.extend(pairs)
