"""What is patched in vLLM, and how: each function once, by the name of what patches it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

# By the function of ``compat`` that does it, or by what it does there. No other class or module is
# patched, and none at all where no engine of ours runs. What belongs to one engine is changed in
# its own objects (``pool.keep_out_of_events``), and ``requests.keep_booleans`` changes a field.
PATCHED = {
    "load_with_drafts": (
        "vllm.v1.sample.logits_processor:build_logitsprocs",
        "vllm.v1.worker.gpu_model_runner:build_logitsprocs",
    ),
    "check_http_requests": (
        "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest.to_sampling_params",
        "vllm.entrypoints.openai.completion.protocol:CompletionRequest.to_sampling_params",
        "vllm.entrypoints.openai.responses.protocol:ResponsesRequest.to_sampling_params",
        "vllm.entrypoints.speech_to_text.transcription.protocol:"
        "TranscriptionRequest.to_sampling_params",
        "vllm.entrypoints.speech_to_text.translation.protocol:"
        "TranslationRequest.to_sampling_params",
    ),
    "refuse_in_beam_search": (
        "vllm.entrypoints.openai.chat_completion.protocol:"
        "ChatCompletionRequest.to_beam_search_params",
        "vllm.entrypoints.openai.completion.protocol:CompletionRequest.to_beam_search_params",
        "vllm.entrypoints.speech_to_text.transcription.protocol:"
        "TranscriptionRequest.to_beam_search_params",
        "vllm.entrypoints.speech_to_text.translation.protocol:"
        "TranslationRequest.to_beam_search_params",
    ),
    "refuse_in_scoring": (
        "vllm.entrypoints.generate.generative_scoring.serving:"
        "ServingGenerativeScoring.create_generative_scoring",
    ),
    "prepare_requests": ("vllm.v1.engine.input_processor:InputProcessor.process_inputs",),
    "watch_turns": ("vllm.v1.engine.async_llm:AsyncLLM._add_request",),
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
    "count_cached_tokens_without": (
        "vllm.v1.core.kv_cache_manager:KVCacheManager.estimate_cached_tokens",
    ),
    "place_shared_layers": (
        "vllm.v1.worker.utils:add_kv_sharing_layers_to_kv_cache_groups",
        "vllm.v1.worker.gpu_model_runner:add_kv_sharing_layers_to_kv_cache_groups",
        "vllm.v1.worker.gpu.attn_utils:add_kv_sharing_layers_to_kv_cache_groups",
    ),
    "take_requests": ("vllm.v1.engine.core:EngineCore.preprocess_add_request",),
    # Added, where all others are wrapped.
    "add_engine_method": ("vllm.v1.engine.core:EngineCore.pacellm_pool_report",),
}
# Too heavy to import for it; imported later, it takes the patched function from the other module.
_TAKERS = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.attn_utils")


# By the same names; of several engines in a process the last one's.
_wrappers: dict[str, Callable[..., Any]] = {}


def patch(what: str, wrapper: Callable[..., Any]) -> None:
    """Make the functions that ``PATCHED`` lists for ``what`` call ``wrapper(original, ...)``.

    Called again, the later ``wrapper`` is called instead. The mark is our own, as vLLM may decorate
    the original with wrappers of its own.
    """
    _wrappers[what] = wrapper
    for name in PATCHED[what]:
        module, _, path = name.partition(":")
        if module in _TAKERS and module not in sys.modules:
            continue
        *outer, last = path.split(".")
        owner = functools.reduce(getattr, outer, import_module(module))
        original = getattr(owner, last)
        if not getattr(original, "_pacellm_wrapped", False):
            setattr(owner, last, _wrapped(original, what))


def _wrapped(original: Callable[..., Any], what: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return _wrappers[what](original, *args, **kwargs)

    wrapped._pacellm_wrapped = True  # type: ignore[attr-defined]
    return wrapped
