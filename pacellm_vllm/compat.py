"""Everything that leans on vLLM internals: each with its symptom and when it can go.

``tests/test_compat.py`` has one test per entry that tells when vLLM moved.
"""

import functools
import logging
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Set
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import torch
from starlette.datastructures import Headers
from vllm import envs
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.config import VllmConfig
from vllm.engine.protocol import EngineClient
from vllm.exceptions import VLLMValidationError
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.core import block_pool, kv_cache_utils
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId, KVCacheBlock, get_group_id
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

ConfigHook = Callable[[VllmConfig], None]


def register_kv_cache_spec(spec: type, manager: type) -> None:
    """Register a KV cache spec of ours with its manager.

    Symptom: registering into an empty registry leaves vLLM's own specs unregistered in that
    process, because ``_ensure_registered`` returns early when it finds any entry.
    Can go when ``KVCacheSpecRegistry.register`` registers the built-in specs first.
    """
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(spec, manager, uniform_type_base_spec=spec)


def add_config_hook(architecture: str, hook: ConfigHook) -> None:
    """Run ``hook(vllm_config)`` when an engine for ``architecture`` is configured.

    The architecture's own hook, if any, runs first. Idempotent per architecture and hook.
    Symptom: vLLM has no public place where a plugin may check the finished configuration;
    ``MODELS_CONFIG_MAP`` is what its own models use. Can go when there is one.
    """
    base = MODELS_CONFIG_MAP.get(architecture, VerifyAndUpdateConfig)
    if getattr(base, "_pacellm_hook", None) is hook:
        return

    class HookedConfig(base):  # type: ignore[valid-type, misc]
        _pacellm_hook = staticmethod(hook)

        @staticmethod
        def verify_and_update_config(vllm_config: VllmConfig) -> None:
            base.verify_and_update_config(vllm_config)
            hook(vllm_config)

    MODELS_CONFIG_MAP[architecture] = HookedConfig


def add_splitting_op(vllm_config: VllmConfig, op_name: str) -> None:
    """Keep ``torch.ops.vllm.<op_name>`` out of compiled and captured graphs.

    Symptom: the op reads this step's metadata on the host, which a graph would freeze.
    vLLM's own state-carrying layers add themselves to the same list. Can go when custom ops can
    be declared splitting where they are registered.
    """
    name = f"vllm::{op_name}"
    ops = vllm_config.compilation_config.splitting_ops
    if ops is not None and name not in ops:
        ops.append(name)


def eager_in_graphs(function: Callable[..., None]) -> Callable[..., None]:
    """Run the body of a custom op eagerly during breakable CUDA graph capture.

    Symptom: as for ``add_splitting_op``, under VLLM_USE_BREAKABLE_CUDAGRAPH=1.
    """
    return eager_break_during_capture(function)


def register_custom_op(name: str, function: Callable[..., None], mutates: list[str]) -> None:
    """Register ``torch.ops.vllm.<name>``, which returns nothing and writes to ``mutates``."""

    def fake(*args: Any, **kwargs: Any) -> None:
        return None

    direct_register_custom_op(op_name=name, op_func=function, mutates_args=mutates, fake_impl=fake)


def plugin_logger() -> logging.Logger:
    """The logger of this plugin.

    Symptom: vLLM configures handlers for loggers below ``vllm`` only, so a logger named after our
    own package prints nothing. Can go when plugins' loggers are configured too.
    """
    return init_logger("vllm.plugins.pacellm")


def add_worker_extension(vllm_config: VllmConfig, name: str) -> None:
    """Give every worker the methods of class ``name``, unless the user named an extension.

    Symptom: vLLM has one slot for worker extensions and no way to add a second.
    Can go when there can be several.
    """
    if not vllm_config.parallel_config.worker_extension_cls:
        vllm_config.parallel_config.worker_extension_cls = name


async def ask_all_engines(client: EngineClient, method: str) -> list[list[Any]]:
    """What ``method`` returns on every worker of every engine that ``client`` speaks to.

    Symptom: with data parallel engines, ``EngineClient.collective_rpc`` calls all of them and
    returns the first one's answers. Can go when it returns all.
    """
    ask = getattr(getattr(client, "engine_core", None), "call_utility_all_async", None)
    if ask is None:
        return [await client.collective_rpc(method)]
    return await ask("collective_rpc", method, None, (), None)


def api_key_check(args: Namespace) -> Callable[[Headers], bool]:
    """Whether a request's headers carry one of the server's API keys; always, if it has none.

    Symptom: vLLM's own middleware guards its ``/v1`` routes and not those of plugins.
    Can go when it guards those too.
    """
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    keys = [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]
    if not keys:
        return lambda headers: True
    return AuthenticationMiddleware(None, keys).verify_token  # type: ignore[arg-type]


def add_logits_processor(vllm_config: VllmConfig, name: str) -> None:
    """Load custom logits processor ``name`` (``module:class``) in this engine's workers.

    Symptom: vLLM has no other way to add one for some models only; what plugins register is
    loaded for all. Can go when a model class can name its own.
    """
    model = vllm_config.model_config
    names = list(model.logits_processors or ())
    if name not in names:
        model.logits_processors = [*names, name]


def _wrap_once(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Make ``owner.name(...)`` call ``wrapper(original, ...)``, unless ours is there already.

    The mark is our own: vLLM may decorate the original with wrappers of its own.
    """
    original = getattr(owner, name)
    if getattr(original, "_pacellm_wrapped", False):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    wrapped._pacellm_wrapped = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


def load_with_drafts(names: Set[str | type]) -> None:
    """Let logits processors ``names``, which leave logits alone, be loaded beside a drafter.

    Symptom: with speculative decoding, model runner V1 refuses custom logits processors of any
    kind. Can go when it loads those that are argmax invariant.
    """
    from vllm.v1.sample import logits_processor

    def build(
        original: Callable[..., Any],
        vllm_config: VllmConfig,
        device: Any,
        pin_memory: bool,
        pooling: bool,
        custom: Iterable[str | type] = (),
    ) -> Any:
        custom = tuple(custom)
        if not vllm_config.speculative_config or not custom or not names >= {*custom}:
            return original(vllm_config, device, pin_memory, pooling, custom)
        built = original(vllm_config, device, pin_memory, pooling)
        for name in custom:
            processor = resolve_obj_by_qualname(str(name).replace(":", "."))
            built.argmax_invariant.append(processor(vllm_config, device, pin_memory))
        return built

    runner = sys.modules.get("vllm.v1.worker.gpu_model_runner")
    for module in (logits_processor, runner):
        if module is not None:
            _wrap_once(module, "build_logitsprocs", build)


def refuse_in_beam_search(prefix: str) -> None:
    """Make beam search requests that carry ``vllm_xargs`` starting with ``prefix`` a 400.

    Symptom: vLLM drops ``vllm_xargs`` of a beam search request without a word.
    Can go when ``BeamSearchParams`` carries extra arguments.
    """
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    def checked(original: Callable[..., Any], request: Any, *args: Any, **kwargs: Any) -> Any:
        given = [key for key in request.vllm_xargs or () if key.startswith(prefix)]
        if given:
            raise ValueError(
                f"{given[0]} is not supported with use_beam_search: vLLM does not pass "
                "vllm_xargs on to beams; drop one of the two."
            )
        return original(request, *args, **kwargs)

    for protocol in (ChatCompletionRequest, CompletionRequest):
        _wrap_once(protocol, "to_beam_search_params", checked)


def refuse_sessions(refused: Callable[[VllmConfig], str | None]) -> None:
    """Make streamed-input requests an error with the sentence of ``refused(vllm_config)``, if any.

    Symptom: vLLM has no check of its own that a plugin could add to, and its asynchronous
    scheduler takes a token back at the end of a turn that the model has read already.
    Can go when turns end where the model's state does.
    """
    from vllm.v1.engine.input_processor import InputProcessor

    def checked(original: Callable[..., Any], processor: Any, *args: Any, **kwargs: Any) -> Any:
        why = refused(processor.vllm_config) if kwargs.get("resumable") else None
        if why:
            raise VLLMValidationError(why)
        return original(processor, *args, **kwargs)

    _wrap_once(InputProcessor, "process_inputs", checked)


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

    for name in ("get_computed_blocks", "allocate_slots"):
        _wrap_once(KVCacheManager, name, watched)


def request_in_hand() -> Request | None:
    """The request of the call in progress; None outside of :func:`watch_requests`'s."""
    held = _in_hand.get()
    return held[1] if held else None


def groups_in_hand() -> int:
    """How many KV cache groups share the pool that the request in hand is placed in.

    Symptom and end: those of :func:`watch_requests`. 2, attention's and ours, outside of its calls.
    """
    held = _in_hand.get()
    return len(held[0].coordinator.single_type_managers) if held else 2


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

    _wrap_once(KVCacheManager, "estimate_cached_tokens", counted)


def keep_out_of_events(pool: BlockPool, group: int) -> None:
    """Let ``pool`` tell nothing of the blocks of KV cache group ``group`` in its KV events.

    Symptom: vLLM derives the hashes in an event from a request's tokens, one for each block, which
    the pages of a bank are not: an IndexError, or events about attention blocks that are not there.
    Can go when a group can be left out of events.
    """
    stored, removed = pool.emit_cached_block_events, pool._emit_block_removed_events

    def emit_stored(request: Request, blocks: int, size: int, kv_cache_group_id: int) -> None:
        if kv_cache_group_id != group:
            stored(request, blocks, size, kv_cache_group_id)

    def emit_removed(hashes: list[BlockHashWithGroupId]) -> None:
        removed([block_hash for block_hash in hashes if get_group_id(block_hash) != group])

    pool.emit_cached_block_events = emit_stored  # type: ignore[assignment, method-assign]
    pool._emit_block_removed_events = emit_removed  # type: ignore[assignment, method-assign]


def add_block_hash_key(key: Callable[[Request], tuple[str, str] | None]) -> None:
    """Make ``key(request)``, unless None, part of every block hash of the request.

    Symptom: vLLM hashes tokens, adapters, images and the salt; what else changes activations
    would be shared by prefix caching. Can go when requests can carry hash keys of their own.
    """

    def keyed(original: Callable[..., Any], request: Request, *args: Any, **kwargs: Any) -> Any:
        keys, next_mm = original(request, *args, **kwargs)
        ours = key(request)
        return ((*(keys or ()), ours) if ours else keys), next_mm

    for module in (kv_cache_utils, block_pool):
        _wrap_once(module, "generate_block_hash_extra_keys", keyed)


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


def rows_of_requests(rows: int) -> torch.Tensor | None:
    """Which of a step's rows are tokens of requests, [rows] bool on the device, and not padding.

    None in profiling runs. Nothing is read on the host, and graphs see each step's own rows.
    Symptom: vLLM pads batches for its graphs and tells layers outside of attention nothing about
    it; where keys and values go is what it marks padding in, with -1.
    Can go when the forward context says how many tokens a step has, on the device.
    """
    mapping = get_forward_context().slot_mapping
    if not isinstance(mapping, dict):
        return None
    slots = (slots for name, slots in mapping.items() if not name.endswith(".memory"))
    found = next(slots, None)
    return None if found is None else found[:rows] >= 0


def grouped_product_tiles(tokens: int, experts: int, width: int, inner: int) -> dict[str, int]:
    """Tile sizes for :func:`grouped_product`: vLLM's defaults for such a mixture of experts.

    Symptom and end: those of :func:`grouped_product`.
    """
    from vllm.model_executor.layers.fused_moe.fused_moe import get_default_config

    return get_default_config(tokens, experts, width, inner, experts, None)


def grouped_product(
    x: torch.Tensor,
    weights: torch.Tensor,
    out: torch.Tensor,
    groups: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    bias: torch.Tensor | None,
    tiles: dict[str, int],
) -> None:
    """``out[t, e] = weights[e] x[t] + bias[e]`` for some pairs of token t and expert e, on a GPU.

    Args:
        x: [tokens, H], bf16 or fp16.
        weights: [experts, n, H], any strides; bias [experts, n].
        out: [tokens, experts, n], written for the pairs only.
        groups: pairs t experts + e by expert, the expert of each tile, and how many pairs, as
            ``experts.fused.by_expert`` makes them for ``tiles["BLOCK_SIZE_M"]``.

    Symptom: vLLM's public ``fused_experts`` puts a fixed number of experts, a known activation and
    the sum over experts into one call; the product inside is not public.
    Can go when it is, or when our kernels have one.
    """
    from vllm.model_executor.layers.fused_moe import fused_moe
    from vllm.triton_utils import tl

    fused_moe.invoke_fused_moe_triton_kernel(
        x,
        weights,
        out,
        A_scale=None,
        B_scale=None,
        topk_weights=None,
        sorted_token_ids=groups[0],
        expert_ids=groups[1],
        num_tokens_post_padded=groups[2],
        mul_routed_weight=False,
        top_k=len(weights),
        config=tiles,
        compute_type={
            torch.float16: tl.float16,
            torch.bfloat16: tl.bfloat16,
            torch.float32: tl.float32,
        }[x.dtype],
        use_fp8_w8a8=False,
        use_int8_w8a8=False,
        use_int8_w8a16=False,
        use_int4_w4a16=False,
        per_channel_quant=False,
        B_bias=bias,
    )
