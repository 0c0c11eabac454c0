"""A request on its way out: its answer, and the span that is written of it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from pacellm_vllm.compat.patching import patch

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState


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

    patch("follow_answers", added)
    patch("answers_made", made)


# Writes a request's span with attributes besides vLLM's.
WriteSpan = Callable[[dict[str, Any]], None]
_hold: ContextVar[Callable[[WriteSpan], None] | None] = ContextVar("hold", default=None)


# Given a request's id as clients know it, how many of its tokens were cached, and its span.
HoldSpan = Callable[[str, int, WriteSpan], None]


def hold_spans(holder: Callable[[Any], HoldSpan | None]) -> None:
    """Give spans of finished requests to what ``holder(engine)`` returns, if anything.

    It is called where vLLM would have written the span, with what writes the span later, with the
    same end.
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
            about = state.external_req_id, state.num_cached_tokens
            token = _hold.set(functools.partial(hold, *about))
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

    patch("hold_spans", started)
    patch("write_spans", written)
