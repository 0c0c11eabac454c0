"""A request on its way in: checked, prepared, and its parameters told to workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pacellm_vllm.compat.patching import patch
from pacellm_vllm.sentences import of_request, shown

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.input_processor import InputProcessor


def check_http_requests(
    ours_in: Callable[[Any], Any], check: Callable[[SamplingParams], None]
) -> None:
    """Make bad settings of a request over HTTP a 4xx, before anything of a stream is sent.

    ``ours_in`` tells one of our keys in what a request has beside its fields, ``check`` raises
    ``ValueError`` for bad settings.
    Symptom: vLLM checks parameters when a streamed answer has begun, which then is a 200 with an
    error in it, or on ``/v1/responses`` breaks off; what stands beside ``vllm_xargs`` instead of in
    it is ignored; and beam search and ``/generative_scoring`` drop them without a word.
    Can go when requests are admitted before their stream begins, unknown fields can be refused,
    and ``BeamSearchParams`` carries extra arguments.
    """
    from vllm.exceptions import VLLMValidationError

    def sampled(original: Callable[..., Any], request: Any, *args: Any, **kwargs: Any) -> Any:
        if (key := ours_in(request.model_extra)) is not None:
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
        if (
            key := ours_in({**(request.model_extra or {}), "vllm_xargs": request.vllm_xargs})
        ) is not None:
            raise VLLMValidationError(
                f"pacellm: {shown(key)} is not supported with use_beam_search: vLLM does not pass "
                "vllm_xargs on to beams; drop one of the two."
            )
        return original(request, *args, **kwargs)

    def scored(original: Callable[..., Any], serving: Any, request: Any, *args: Any) -> Any:
        if (key := ours_in(request.model_extra)) is not None:
            raise VLLMValidationError(
                f"pacellm: {shown(key)} is not read by this route, whose requests "
                "have the settings of the engine; drop it."
            )
        return original(serving, request, *args)

    patch("check_http_requests", sampled)
    patch("refuse_in_scoring", scored)
    patch("refuse_in_beam_search", beams)


def keep_booleans() -> None:
    """Leave booleans in ``vllm_xargs`` booleans; before vLLM's routes are imported.

    Symptom: its type has numbers and no booleans, so that ``true`` is 1, which is a number that a
    setting may have.
    Can go when its type has booleans.
    """
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.speech_to_text.transcription.protocol import TranscriptionRequest
    from vllm.entrypoints.speech_to_text.translation.protocol import TranslationRequest

    value = bool | str | int | float | list[str | int | float]
    for protocol in (
        AnthropicMessagesRequest,
        ChatCompletionRequest,
        CompletionRequest,
        ResponsesRequest,
        TranscriptionRequest,
        TranslationRequest,
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

    patch("prepare_requests", checked)


def watch_turns(check: Callable[[VllmConfig, SamplingParams, SamplingParams], None]) -> None:
    """Call ``check(vllm_config, the first turn's parameters, its own)`` of each later turn.

    It may raise ``ValueError``, which ends the streamed input with that sentence.
    Symptom: a turn of streamed input may have parameters of its own, and a request that is
    preempted is computed again from its beginning with its last turn's.
    Can go when a request has one set of parameters.
    """
    from vllm.exceptions import VLLMValidationError

    async def added(original: Callable[..., Any], engine: Any, request: Any, *args: Any) -> None:
        states, first = engine.output_processor.request_states, request.sampling_params
        if request.resumable and (state := states.get(request.request_id)) is not None:
            first = getattr(state, "_pacellm_first", first)
            try:
                check(engine.vllm_config, first, request.sampling_params)
            except ValueError as error:
                raise VLLMValidationError(of_request(error, request.external_req_id)) from None
        await original(engine, request, *args)
        if request.resumable and (state := states.get(request.request_id)) is not None:
            state._pacellm_first = first

    patch("watch_turns", added)
