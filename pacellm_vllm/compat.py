"""Everything that leans on vLLM internals: each with its symptom and when it can go.

``tests/test_compat.py`` has one test per entry that tells when vLLM moved. ``register()`` imports
this module in every process, so it imports at its top only what vLLM has imported by then.
"""

from __future__ import annotations

import copy
import functools
import logging
import sys
import time
from collections.abc import Callable, Iterable, Sequence, Set
from contextvars import ContextVar
from importlib import import_module
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from vllm import envs
from vllm.logger import init_logger

from pacellm_vllm.sentences import of_request, shown

if TYPE_CHECKING:
    from argparse import Namespace

    from starlette.datastructures import Headers
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.engine.protocol import EngineClient
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId, KVCacheBlock
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState
    from vllm.v1.request import Request

ConfigHook = Callable[["VllmConfig"], None]

# What is patched in vLLM, by the function below that does it: nothing else is, and nothing at all
# in a process where no engine of ours runs.
PATCHED = {
    "load_with_drafts": (
        "vllm.v1.sample.logits_processor:build_logitsprocs",
        "vllm.v1.worker.gpu_model_runner:build_logitsprocs",
    ),
    "check_http_requests": (
        "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest.to_sampling_params",
        "vllm.entrypoints.openai.completion.protocol:CompletionRequest.to_sampling_params",
        "vllm.entrypoints.openai.responses.protocol:ResponsesRequest.to_sampling_params",
    ),
    "refuse_in_beam_search": (
        "vllm.entrypoints.openai.chat_completion.protocol:"
        "ChatCompletionRequest.to_beam_search_params",
        "vllm.entrypoints.openai.completion.protocol:CompletionRequest.to_beam_search_params",
    ),
    "prepare_requests": ("vllm.v1.engine.input_processor:InputProcessor.process_inputs",),
    "follow_answers": ("vllm.v1.engine.output_processor:OutputProcessor.add_request",),
    "answers_made": ("vllm.v1.engine.output_processor:RequestState.make_request_output",),
    # Where vLLM's tracing is on, and nowhere else.
    "hold_spans": (
        "vllm.v1.engine.async_llm:AsyncLLM.__init__",
        "vllm.v1.engine.llm_engine:LLMEngine.__init__",
    ),
    "write_spans": ("vllm.v1.engine.output_processor:instrument_manual",),
    "watch_requests": (
        "vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks",
        "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots",
    ),
    "add_block_hash_key": (
        "vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys",
        "vllm.v1.core.block_pool:generate_block_hash_extra_keys",
    ),
    "hash_turns_by_their_own": (
        "vllm.v1.core.sched.scheduler:Scheduler._update_request_as_session",
    ),
    "count_cached_tokens_without": (
        "vllm.v1.core.kv_cache_manager:KVCacheManager.estimate_cached_tokens",
    ),
    "place_shared_layers": (
        "vllm.v1.worker.utils:add_kv_sharing_layers_to_kv_cache_groups",
        "vllm.v1.worker.gpu_model_runner:add_kv_sharing_layers_to_kv_cache_groups",
        "vllm.v1.worker.gpu.attn_utils:add_kv_sharing_layers_to_kv_cache_groups",
    ),
    "key_hashes_of": ("vllm.v1.engine.core:EngineCore.preprocess_add_request",),
    # Added, where all others are wrapped.
    "add_engine_method": ("vllm.v1.engine.core:EngineCore.pacellm_pool_report",),
}
# Too heavy to import for it; imported later, it takes the patched function from the other module.
_TAKERS = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.attn_utils")


def register_kv_cache_spec(spec: type, manager: type) -> None:
    """Register a KV cache spec of ours with its manager.

    Symptom: registering into an empty registry leaves vLLM's own specs unregistered in that
    process, because ``_ensure_registered`` returns early when it finds any entry.
    Can go when ``KVCacheSpecRegistry.register`` registers the built-in specs first.
    """
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(spec, manager, uniform_type_base_spec=spec)


def generation_models() -> list[tuple[str, str, str]]:
    """Architecture, module and class of what vLLM generates text with; nothing is imported.

    Symptom: the registry knows what a class can do only once it has imported it, which takes
    seconds for all of them; the tables it is made from are not public.
    Can go when there is a public list of generative architectures.
    """
    from vllm.model_executor.models import registry

    listed = {
        **registry._TEXT_GENERATION_MODELS,
        **registry._MULTIMODAL_MODELS,
        **registry._TRANSFORMERS_SUPPORTED_MODELS,
    }
    names = [*listed, *(n for n in registry._TRANSFORMERS_BACKEND_MODELS if "ForCausalLM" in n)]
    found = [(name, registry.ModelRegistry.models.get(name)) for name in names]
    # Another plugin may have put a class of its own under one of the names.
    return [
        (name, model.module_name, model.class_name)
        for name, model in found
        if isinstance(model, registry._LazyRegisteredModel)
    ]


def add_config_hook(architecture: str, hook: ConfigHook, base: str | None = None) -> None:
    """Run ``hook(vllm_config)`` when an engine for ``architecture`` is configured.

    The architecture's own hook, if any, runs first, or that of ``base``, which it stands on.
    Idempotent per architecture and hook.
    Symptom: vLLM has no public place where a plugin may check the finished configuration;
    ``MODELS_CONFIG_MAP`` is what its own models use. Can go when there is one.
    """
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    if getattr(MODELS_CONFIG_MAP.get(architecture), "_pacellm_hook", None) is hook:
        return
    own = MODELS_CONFIG_MAP.get(base or architecture, VerifyAndUpdateConfig)

    class HookedConfig(own):  # type: ignore[valid-type, misc]
        _pacellm_hook = staticmethod(hook)

        @staticmethod
        def verify_and_update_config(vllm_config: VllmConfig) -> None:
            own.verify_and_update_config(vllm_config)
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
    from vllm.compilation.breakable_cudagraph import eager_break_during_capture

    return eager_break_during_capture(function)


def register_custom_op(name: str, function: Callable[..., None], mutates: list[str]) -> None:
    """Register ``torch.ops.vllm.<name>``, which returns nothing and writes to ``mutates``."""
    from vllm.utils.torch_utils import direct_register_custom_op

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


def add_engine_method(name: str, method: Callable[[EngineCore], Any]) -> None:
    """Let front ends ask for ``method(engine_core)`` by ``name``, with :func:`ask_all_cores`.

    Symptom: vLLM lets plugins ask workers, and not the scheduler, which alone knows who holds which
    blocks. Can go when a plugin can register something to be asked of the engine core.
    """
    from vllm.v1.engine.core import EngineCore

    setattr(EngineCore, name, method)


async def ask_all_cores(client: EngineClient, name: str) -> list[Any]:
    """What the method that :func:`add_engine_method` added returns, of every engine by rank.

    Symptom and end: those of :func:`add_engine_method`.
    """
    core: Any = client.engine_core  # type: ignore[attr-defined]
    ask = getattr(core, "call_utility_all_async", None)
    return await ask(name) if ask else [await core.call_utility_async(name)]


def engine_ranks(client: EngineClient) -> list[int]:
    """The ranks of the engines that :func:`ask_all_engines` and :func:`ask_all_cores` ask.

    Symptom: behind one server of several, ranks do not begin with 0, and only vLLM's client knows.
    Can go when what all engines answer is keyed by rank.
    """
    return list(client.engine_core.engine_ranks_managed)  # type: ignore[attr-defined]


async def ask_all_engines(client: EngineClient, method: str, *args: Any) -> list[list[Any]]:
    """What ``method(*args)`` returns on every worker of every engine that ``client`` speaks to.

    Symptom: with data parallel engines, ``EngineClient.collective_rpc`` calls all of them and
    returns the first one's answers. Can go when it returns all.
    """
    ask = getattr(getattr(client, "engine_core", None), "call_utility_all_async", None)
    if ask is None:
        return [await client.collective_rpc(method, args=args)]
    return await ask("collective_rpc", method, None, args, None)


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


def add_logits_processor(vllm_config: VllmConfig, processor: type) -> None:
    """Load custom logits processor ``processor`` in this engine's workers.

    Given as a class, so that a process which is sent the configuration imports its module at once.
    Symptom: vLLM has no other way to add one for some models only; what plugins register is
    loaded for all. Can go when a model class can name its own.
    """
    model = vllm_config.model_config
    known = list(model.logits_processors or ())
    if processor not in known:
        model.logits_processors = [*known, processor]


def _patch(patch: str, wrapper: Callable[..., Any]) -> None:
    """Make the functions that ``PATCHED`` lists for ``patch`` call ``wrapper(original, ...)``.

    Once each: the mark is our own, as vLLM may decorate the original with wrappers of its own.
    """
    for name in PATCHED[patch]:
        module, _, path = name.partition(":")
        if module in _TAKERS and module not in sys.modules:
            continue
        *outer, last = path.split(".")
        owner = functools.reduce(getattr, outer, import_module(module))
        original = getattr(owner, last)
        if not getattr(original, "_pacellm_wrapped", False):
            setattr(owner, last, _wrapped(original, wrapper))


def _wrapped(original: Callable[..., Any], wrapper: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    wrapped._pacellm_wrapped = True  # type: ignore[attr-defined]
    return wrapped


def load_with_drafts(processors: Set[type]) -> None:
    """Let logits ``processors``, which leave logits alone, be loaded beside a drafter.

    Symptom: with speculative decoding, model runner V1 refuses custom logits processors of any
    kind. Can go when it loads those that are argmax invariant.
    """

    def build(
        original: Callable[..., Any],
        vllm_config: VllmConfig,
        device: Any,
        pin_memory: bool,
        pooling: bool,
        custom: Iterable[Any] = (),
    ) -> Any:
        custom = tuple(custom)
        if not vllm_config.speculative_config or not custom or not processors >= {*custom}:
            return original(vllm_config, device, pin_memory, pooling, custom)
        built = original(vllm_config, device, pin_memory, pooling)
        for processor in custom:
            built.argmax_invariant.append(processor(vllm_config, device, pin_memory))
        return built

    _patch("load_with_drafts", build)


def check_http_requests(
    is_ours: Callable[[Any], bool], check: Callable[[SamplingParams], None]
) -> None:
    """Make bad settings of a request over HTTP a 4xx, before anything of a stream is sent.

    ``is_ours`` tells our keys from others, ``check`` raises ``ValueError`` for bad ones.
    Symptom: vLLM checks parameters when a streamed answer has begun, which then is a 200 with an
    error in it, or on ``/v1/responses`` breaks off; what stands beside ``vllm_xargs`` instead of in
    it is ignored; and beam search drops ``vllm_xargs`` without a word.
    Can go when requests are admitted before their stream begins, unknown fields can be refused,
    and ``BeamSearchParams`` carries extra arguments.
    """
    from vllm.exceptions import VLLMValidationError

    def sampled(original: Callable[..., Any], request: Any, *args: Any, **kwargs: Any) -> Any:
        for key in filter(is_ours, request.model_extra or ()):
            raise VLLMValidationError(
                f"pacellm: {shown(key)} is not a field of a request; put it into vllm_xargs."
            )
        params = original(request, *args, **kwargs)
        try:
            check(params)
        except ValueError as error:
            raise VLLMValidationError(str(error)) from None
        return params

    def beams(original: Callable[..., Any], request: Any, *args: Any, **kwargs: Any) -> Any:
        for key in filter(is_ours, {**(request.vllm_xargs or {}), **(request.model_extra or {})}):
            raise VLLMValidationError(
                f"pacellm: {shown(key)} is not supported with use_beam_search: vLLM does not pass "
                "vllm_xargs on to beams; drop one of the two."
            )
        return original(request, *args, **kwargs)

    _patch("check_http_requests", sampled)
    _patch("refuse_in_beam_search", beams)


def keep_booleans() -> None:
    """Leave booleans in ``vllm_xargs`` booleans; before vLLM's routes are imported.

    Symptom: its type has numbers and no booleans, so that ``true`` is 1, which is a number that a
    setting may have. Can go when its type has booleans.
    """
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    value = bool | str | int | float | list[str | int | float]
    for protocol in (
        AnthropicMessagesRequest,
        ChatCompletionRequest,
        CompletionRequest,
        ResponsesRequest,
    ):
        field = protocol.model_fields["vllm_xargs"]
        if field.annotation != dict[str, value] | None:
            field.annotation = dict[str, value] | None
            protocol.model_rebuild(force=True)


def prepare_requests(
    refused: Callable[[VllmConfig], str | None],
    extra_args: Callable[[VllmConfig, SamplingParams, str], Any],
    admit: Callable[[InputProcessor, EngineCoreRequest], None],
) -> None:
    """Make streamed-input requests an error with the sentence of ``refused(vllm_config)``, if any.

    Of every other request replace its extra arguments by ``extra_args(vllm_config, its parameters,
    request_id)``: a worker is told a request's parameters and not its id. Then
    ``admit(input_processor, request)`` may change the request, or raise ``ValueError``. Sentences
    of ours that refuse one, from here or from checks of its parameters, are given its id.
    Symptom: vLLM has no check of its own that a plugin could add to, and none that may change a
    prompt for ``LLM`` and server alike; and its asynchronous scheduler takes a token back at the
    end of a turn that the model has read already.
    Can go when turns end where the model's state does, workers are told ids, and plugins may
    prepare requests.
    """
    from vllm.exceptions import VLLMValidationError

    def checked(
        original: Callable[..., Any], processor: Any, request_id: str, *args: Any, **kwargs: Any
    ) -> Any:
        why = refused(processor.vllm_config) if kwargs.get("resumable") else None
        if why:
            raise VLLMValidationError(of_request(why, request_id))
        try:
            prepared = original(processor, request_id, *args, **kwargs)
        except (ValueError, VLLMValidationError) as error:
            if not str(error).startswith("pacellm: "):
                raise
            raise VLLMValidationError(of_request(error, request_id)) from None
        params = prepared.sampling_params
        if params is not None:
            config, request_id = processor.vllm_config, prepared.request_id
            params.extra_args = extra_args(config, params, request_id)
            try:
                admit(processor, prepared)
            except ValueError as error:
                raise VLLMValidationError(of_request(error, request_id)) from None
        return prepared

    _patch("prepare_requests", checked)


def follow_answers(
    ended: Callable[[EngineCoreRequest], Callable[[Sequence[int]], None] | None],
) -> None:
    """Call what ``ended(request)`` returns, unless None, with the token ids of its whole answer.

    It is called before anybody is told that the request is done, and not where it was aborted.
    Symptom: plugins are not told of answers on the front end.
    Can go when they can be.
    """
    from vllm.v1.engine import FinishReason

    def added(
        original: Callable[..., None],
        processor: OutputProcessor,
        request: EngineCoreRequest,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        original(processor, request, *args, **kwargs)
        # Of streamed input the last call ends its state.
        if (state := processor.request_states.get(request.request_id)) is not None:
            state._pacellm_ended = ended(request)  # type: ignore[attr-defined]

    def made(
        original: Callable[..., Any],
        state: RequestState,
        new_token_ids: list[int],
        pooling_output: Any,
        finish_reason: FinishReason | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        done = getattr(state, "_pacellm_ended", None)
        broken = (None, FinishReason.ABORT, FinishReason.ERROR)
        if done is not None and finish_reason not in broken and state.detokenizer is not None:
            done(state.detokenizer.output_token_ids)
        return original(state, new_token_ids, pooling_output, finish_reason, *args, **kwargs)

    _patch("follow_answers", added)
    _patch("answers_made", made)


# Writes a request's span with attributes besides vLLM's.
WriteSpan = Callable[[dict[str, Any]], None]
_hold: ContextVar[Callable[[WriteSpan], None] | None] = ContextVar("hold", default=None)


def hold_spans(holder: Callable[[Any], Callable[[RequestState, WriteSpan], None] | None]) -> None:
    """Give spans of finished requests to what ``holder(engine)`` returns, if anything.

    It is called where vLLM would have written the span, with the request's state and what writes
    the span later, with the same end.
    Symptom: vLLM writes a request's span in one call, with attributes of its own.
    Can go when a plugin can add some, and may ask its engine first.
    """

    def started(original: Callable[..., Any], engine: Any, *args: Any, **kwargs: Any) -> None:
        original(engine, *args, **kwargs)
        hold = holder(engine)
        if hold is None:
            return
        processor = engine.output_processor
        trace = processor.do_tracing

        def do_tracing(output: Any, state: RequestState, stats: Any) -> None:
            token = _hold.set(functools.partial(hold, state))
            try:
                trace(output, state, stats)
            finally:
                _hold.reset(token)

        processor.do_tracing = do_tracing

    def written(original: Callable[..., Any], *, attributes: dict[str, Any], **span: Any) -> None:
        hold = _hold.get()
        if hold is None:
            original(attributes=attributes, **span)
            return
        span = {"end_time": time.time_ns(), **span}
        hold(lambda more: original(attributes={**attributes, **more}, **span))

    _patch("hold_spans", started)
    _patch("write_spans", written)


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

    _patch("watch_requests", watched)


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


def hash_turns_by_their_own() -> None:
    """Let the blocks of a session's next turn be hashed with that turn's parameters.

    Symptom: vLLM hashes the turn's tokens before it gives the request the turn's parameters, so a
    key of :func:`add_block_hash_key` would be the last turn's, and other requests would find blocks
    computed with other settings. Can go when it changes parameters first.
    """

    def updated(original: Callable[..., Any], scheduler: Any, session: Request, update: Any) -> Any:
        session.sampling_params = update.sampling_params
        return original(scheduler, session, update)

    _patch("hash_turns_by_their_own", updated)


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

    _patch("count_cached_tokens_without", counted)


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


# Pools that hold banks, and what hashes the blocks of requests in their engines.
_keyed_pools: WeakSet[BlockPool] = WeakSet()
_keyed_hashers: WeakSet[Callable[..., Any]] = WeakSet()


def add_block_hash_key(key: Callable[[Request], tuple[str, str] | None], pool: BlockPool) -> None:
    """Make ``key(request)``, unless None, part of the block hashes of the engine with ``pool``.

    It must not raise. Requests of other engines in this process keep vLLM's hashes.
    Symptom: vLLM hashes tokens, adapters, images and the salt; what else changes activations
    would be shared by prefix caching. Can go when requests can carry hash keys of their own.
    """
    _keyed_pools.add(pool)

    def keyed(original: Callable[..., Any], request: Request, *args: Any, **kwargs: Any) -> Any:
        keys, next_mm = original(request, *args, **kwargs)
        ours = key(request) if request._block_hasher in _keyed_hashers else None
        return ((*(keys or ()), ours) if ours else keys), next_mm

    def told(original: Callable[..., Any], core: EngineCore, request: EngineCoreRequest) -> Any:
        manager = getattr(core.scheduler, "kv_cache_manager", None)
        if core.request_block_hasher and manager and manager.block_pool in _keyed_pools:
            key_hashes_of(core.request_block_hasher)
        return original(core, request)

    _patch("add_block_hash_key", keyed)
    # A request knows its hasher and no engine, the engine its hasher.
    _patch("key_hashes_of", told)


def key_hashes_of(hasher: Callable[..., Any]) -> None:
    """Let the key of :func:`add_block_hash_key` into what ``hasher`` hashes."""
    _keyed_hashers.add(hasher)


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


def pack_cpu_attention(vllm_config: VllmConfig) -> None:
    """Let the attention layers of vLLM's own CPU builds share blocks with banks.

    Symptom: CPU_ATTN declares one KV cache layout, which keeps layers apart; its kernels follow
    strides, and on block-outermost caches do the same.
    Can go when ``CPUAttentionBackend`` declares BLHNC.
    """
    from vllm.model_executor.layers.attention import Attention
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    for layer in vllm_config.compilation_config.static_forward_context.values():
        if isinstance(layer, Attention):
            layer.attn_backend = _packing(layer.attn_backend)


@functools.cache
def _packing(backend: Any) -> Any:
    """``backend`` if it is none of the CPU's or packs already, else a subclass that does."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    from vllm.v1.kv_cache_layout import KVCacheLayout

    if not issubclass(backend, CPUAttentionBackend):
        return backend
    known = backend.supported_kv_cache_layouts()
    if KVCacheLayout.BLHNC in known:
        return backend
    layouts = (*known, KVCacheLayout.BLHNC)
    body = {"supported_kv_cache_layouts": classmethod(lambda cls: layouts)}
    return type(f"Packed{backend.__name__}", (backend,), body)


def set_cpu_worker(vllm_config: VllmConfig, name: str) -> None:
    """Have class ``name`` as the worker of an engine on a CPU, where the user named none.

    Symptom: ``CPUModelRunner._zero_block_ids`` leaves out groups whose layers have specs of their
    own (``UniformTypeKVCacheSpecs``), as all groups beside banks do, so attention would find NaN
    where a bank's bytes were. Can go when it zeroes those too.
    Raises ``ValueError`` where another worker is named.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    parallel = vllm_config.parallel_config
    module = name.rpartition(".")[0]
    # A checked configuration may be checked again.
    if parallel.worker_cls.startswith(f"{module}."):
        return
    if parallel.worker_cls not in ("auto", "vllm.v1.worker.cpu_worker.CPUWorker"):
        raise ValueError(
            f"pacellm: worker class {parallel.worker_cls} does not work with memory on a CPU: it "
            "does not zero what banks have written before attention gets it; drop --worker-cls."
        )
    parallel.worker_cls = name


def start_state_updates(vllm_config: VllmConfig) -> None:
    """Choose how this worker's Mamba layers update their states in decode steps, if it has any.

    Symptom: vLLM does so when it has planned the KV cache, and overlooks groups whose layers have
    specs of their own (``UniformTypeKVCacheSpecs``), as all groups beside banks do: the first
    decode step finds that "Mamba SSU backend has not been initialized". Can go when
    ``initialize_mamba_ssu_backend`` looks into such groups.
    """
    from vllm.model_executor.layers.mamba.abstract import MambaBase
    from vllm.model_executor.layers.mamba.ops.ssu_dispatch import initialize_mamba_ssu_backend
    from vllm.v1.kv_cache_interface import MambaSpec

    layers = vllm_config.compilation_config.static_forward_context.values()
    kinds = {layer.mamba_type for layer in layers if isinstance(layer, MambaBase)}
    specs = [MambaSpec(block_size=1, shapes=(), dtypes=(), mamba_type=kind) for kind in kinds]
    groups: Any = SimpleNamespace(
        kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec) for spec in specs]
    )
    initialize_mamba_ssu_backend(
        vllm_config.mamba_config, groups, use_replayssm=vllm_config.cache_config.use_replayssm
    )


def place_shared_layers() -> None:
    """Let attention layers that share another one's KV cache stand beside banks.

    Symptom: vLLM adds such a layer to the group of the other and not to the specs of its own that
    the group's layers have beside banks (``UniformTypeKVCacheSpecs``): ``KeyError`` of the layer's
    name. Can go when ``add_kv_sharing_layers_to_kv_cache_groups`` adds it there, too.
    """
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    def placed(
        original: Callable[..., None],
        shared: dict[str, str],
        groups: Iterable[Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        original(shared, groups, *args, **kwargs)
        for group in groups:
            if isinstance(group.kv_cache_spec, UniformTypeKVCacheSpecs):
                specs = group.kv_cache_spec.kv_cache_specs
                specs |= {name: specs[shared[name]] for name in group.layer_names if name in shared}

    _patch("place_shared_layers", placed)


def with_final_blocks(vllm_config: VllmConfig) -> VllmConfig:
    """A copy of the configuration with the KV block size that a model, once built, will have.

    Symptom: vLLM chooses the size, which recurrent layers can make large, when it has loaded the
    weights, so a size that does not fit would be refused only then.
    Can go when it chooses before (``update_block_size_for_backend`` in v1/executor).
    """
    from vllm.platforms import current_platform

    final = copy.copy(vllm_config)
    final.cache_config = copy.copy(vllm_config.cache_config)
    current_platform.update_block_size_for_backend(final)
    return final


def rows_of_requests(rows: int) -> torch.Tensor | None:
    """Which of a step's rows are tokens of requests, [rows] bool on the device, and not padding.

    None in profiling runs. Nothing is read on the host, and graphs see each step's own rows.
    Symptom: vLLM pads batches for its graphs and tells layers outside of attention nothing about
    it; where keys and values go is what it marks padding in, with -1.
    Can go when the forward context says how many tokens a step has, on the device.
    """
    from vllm.forward_context import get_forward_context

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
