"""RequestSpans: what memory did for a request, in the span that vLLM's tracing writes of it."""

import asyncio
import json
from typing import Any

from pacellm_vllm.compat import (
    HoldSpan,
    WriteSpan,
    ask_all_engines,
    hold_spans,
    plugin_logger,
)
from pacellm_vllm.memory.journal import KINDS
from pacellm_vllm.models.checks import can_report, carries_memory, is_traced, notes_tokens
from pacellm_vllm.serving.report import SUMMARIES_METHOD, merge_reports

logger = plugin_logger()

# What ``HoldSpan`` is called with.
EndedSpan = tuple[str, int, WriteSpan]


def hold_request_spans() -> None:
    """From now on, of engines with memory whose workers can be asked."""
    hold_spans(_holder)


def _holder(engine: Any) -> HoldSpan | None:
    config = engine.vllm_config
    asked = carries_memory(config) and is_traced(config) and can_report(config)
    return RequestSpans(engine).hold if asked else None


class RequestSpans:
    """Spans of one engine's requests, each written when the workers have said what they know.

    ``engine`` is vLLM's ``AsyncLLM`` or ``LLMEngine``. Of requests that end while workers are asked
    they are then asked together.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._asks = notes_tokens(engine.vllm_config)
        self._waits = asyncio.iscoroutinefunction(engine.collective_rpc)
        self._held: list[EndedSpan] = []
        self._writing: asyncio.Task[None] | None = None
        self._failed = False

    def hold(self, request_id: str, cached_tokens: int, write: WriteSpan) -> None:
        """The span of a request."""
        span = (request_id, cached_tokens, write)
        if not self._asks:
            _write([span], [])
            return
        if not self._waits:
            workers = self._engine.collective_rpc(SUMMARIES_METHOD, args=([request_id],))
            _write([span], [workers])
            return
        self._held.append(span)
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write_held())

    async def _write_held(self) -> None:
        while self._held:
            some, self._held = self._held, []
            request_ids = [request_id for request_id, _, _ in some]
            engines: list[list[dict[str, Any]]] = []
            try:
                engines = await ask_all_engines(self._engine, SUMMARIES_METHOD, request_ids)
            except Exception as error:
                if not self._failed:
                    logger.error(
                        "pacellm: spans lack what memory did, as workers do not say (%s: %s).",
                        type(error).__name__,
                        error,
                    )
                self._failed = True
            finally:
                _write(some, engines)


def _write(spans: list[EndedSpan], engines: list[list[dict[str, Any]]]) -> None:
    """``engines`` have for each worker the summaries by request."""
    for name, cached_tokens, write in spans:
        parts = [worker[name] for workers in engines for worker in workers if name in worker]
        write(attributes(merge_reports(parts), cached_tokens))


def attributes(layers: dict[str, dict[str, Any]], cached_tokens: int) -> dict[str, Any]:
    """Attributes of a span: numbers by layer are lists in the order of ``pacellm.layers``.

    ``layers`` is ``Journal.summary`` by layer; of a request without one, only what the prefix cache
    had of it is known.
    """
    found: dict[str, Any] = {"pacellm.cached_tokens": cached_tokens}
    if not layers:
        return found
    each = list(layers.values())
    found["pacellm.layers"] = [int(layer) for layer in layers]
    for kind in (kind for kind in KINDS.values() if kind != "cached"):
        found[f"pacellm.tokens.{kind}"] = [layer["tokens"][kind] for layer in each]
    for name in ("commits", "slots"):
        found[f"pacellm.{name}"] = [layer[name] for layer in each]
    found["pacellm.settings"] = json.dumps(each[0]["settings"])
    return found
