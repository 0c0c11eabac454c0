"""What the scheduler tells managers of KV cache groups, and what it does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pacellm_vllm.compat.patching import patch

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.request import Request
_in_hand: ContextVar[tuple[KVCacheManager, Request] | None] = ContextVar("in_hand", default=None)


def watch_requests() -> None:
    """Let :func:`request_in_hand` tell which request the scheduler is looking up or placing.

    Symptom: single-type managers are given a request's id only, and its block hashes, which say
    nothing of its sampling parameters or of how long it may become.
    Can go when they are given the request, as ``cache_blocks`` already is.
    """

    def watched(
        original: Callable[..., Any],
        manager: KVCacheManager,
        request: Request,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        token = _in_hand.set((manager, request))
        try:
            return original(manager, request, *args, **kwargs)
        finally:
            _in_hand.reset(token)

    patch("watch_requests", watched)


def request_in_hand() -> Request | None:
    """The request of the call in progress; None outside of :func:`watch_requests`'s.

    Symptom and end: those of :func:`watch_requests`.
    """
    held = _in_hand.get()
    return held[1] if held else None


def groups_in_hand() -> int:
    """How many KV cache groups share the pool that the request in hand is placed in.

    Symptom and end: those of :func:`watch_requests`. 2, attention's and ours, outside of its calls.
    """
    held = _in_hand.get()
    return len(_managers(held[0])) if held else 2


def blocks_kept_free() -> int:
    """Blocks that must stay free where the request in hand is placed: if it waits, a watermark.

    Symptom: managers are not told of it, and one that takes more than it must for a request keeps
    that request waiting.
    Can go when managers are told how much they may take.
    """
    from vllm.v1.request import RequestStatus

    held = _in_hand.get()
    waits = held and held[1].status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)
    return held[0].watermark_blocks if held and waits else 0


def managers_of(core: EngineCore) -> Sequence[SingleTypeKVCacheManager]:
    """Of all KV cache groups of an engine, one each.

    Symptom: vLLM makes managers itself and gives nobody a way to the ones it has made.
    Can go when a method of :func:`add_engine_method` is handed them.
    """
    return _managers(core.scheduler.kv_cache_manager)  # type: ignore[attr-defined]


def _managers(manager: KVCacheManager) -> Sequence[SingleTypeKVCacheManager]:
    return manager.coordinator.single_type_managers


def count_cached_tokens_without(spec: type) -> None:
    """Leave groups of ``spec`` out of what vLLM says a request has put into the prefix cache.

    Symptom: vLLM takes the least over all groups of the blocks they hold with a hash, and a bank's
    own pages have none while it is written: ``cache_creation_input_tokens`` would be 0.
    Can go when a manager can say how many tokens of a request are cached.
    """

    def counted(original: Callable[..., int], manager: KVCacheManager, request: Request) -> int:
        groups = manager.kv_cache_config.kv_cache_groups
        blocks = manager.get_blocks(request.request_id).blocks
        others = [
            pair
            for pair in zip(groups, blocks, strict=True)
            if not isinstance(pair[0].kv_cache_spec, spec)
        ]
        view = SimpleNamespace(
            kv_cache_config=SimpleNamespace(kv_cache_groups=[group for group, _ in others]),
            get_blocks=lambda _: SimpleNamespace(blocks=[held for _, held in others]),
        )
        return original(view, request)

    patch("count_cached_tokens_without", counted)
