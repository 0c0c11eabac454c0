"""The memory's metrics: engines are asked for them when ``/metrics`` is read."""

import asyncio
import time
from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from pacellm_vllm.compat import plugin_logger
from pacellm_vllm.memory.counts import SIMILARITY_ENDS
from pacellm_vllm.serving.asking import EngineReport, ask_engines

logger = plugin_logger()

# An engine answers between two steps. A scraper waits so long; then it is given what was last said.
PATIENCE_S = 5.0

_SLOTS = {
    "merged": "Slots that a commit merged with a segment's tokens.",
    "filled": "Free slots that a commit gave to a token.",
    "replaced": "Used slots that a commit gave to another token.",
}
_POOL_COUNTERS = {
    "published": ("pacellm:snapshots_published", "Banks left in the prefix cache."),
    "hit": ("pacellm:snapshots_hit", "Banks restored from the prefix cache."),
    "hit_tokens": ("pacellm:snapshot_hit_tokens", "Tokens that restored banks stand for."),
    "evicted": ("pacellm:snapshots_evicted", "Banks that left the prefix cache."),
}
_POOL_GAUGES = {
    "blocks_held": ("pacellm:bank_blocks", "KV blocks that requests' banks hold now."),
    "requests": ("pacellm:bank_requests", "Requests that hold a bank now."),
    "streams": ("pacellm:streamed_requests", "Requests of streamed input that are open now."),
}


def families(reports: Iterable[EngineReport], model_name: str) -> Iterator[Metric]:
    """Every metric of ours, one sample for each engine, or for each engine and layer.

    What an engine does not count (see ``PlainCounts``) has no sample, rather than a zero.
    """
    reports = list(reports)
    layers = [
        ([model_name, str(report.rank), layer], counts)
        for report in reports
        for layer, counts in report.layers.items()
    ]
    engines = [([model_name, str(report.rank)], report.pool) for report in reports if report.pool]
    by_engine, by_layer = ["model_name", "engine"], ["model_name", "engine", "layer"]

    tokens = CounterMetricFamily(
        "pacellm:tokens",
        "Tokens by what their look-up asked of the memory.",
        labels=[*by_layer, "kind"],
    )
    slots = CounterMetricFamily(
        "pacellm:slots", "Slots by what commits did to them.", labels=[*by_layer, "change"]
    )
    commits = CounterMetricFamily("pacellm:commits", "Ended segments.", labels=by_layer)
    dropped = CounterMetricFamily(
        "pacellm:dropped_tokens", "Tokens that asked for a slot and found none.", labels=by_layer
    )
    last = GaugeMetricFamily(
        "pacellm:bank_slots", "Slots in use after the last commit, whose ever.", labels=by_layer
    )
    size = GaugeMetricFamily("pacellm:bank_size_slots", "Slots of a bank.", labels=by_layer)
    similar = HistogramMetricFamily(
        "pacellm:lookup_similarity_ratio",
        "Tokens that met a bank by the mean cosine with its most similar slots.",
        labels=by_layer,
    )
    for labels, counts in layers:
        for kind in ("high", "mid", "low"):
            tokens.add_metric([*labels, kind], counts[kind])
        commits.add_metric(labels, counts["commits"])
        last.add_metric(labels, counts["slots_last"])
        size.add_metric(labels, counts["bank_size"])
        if "merged" not in counts:
            continue
        for change in _SLOTS:
            slots.add_metric([*labels, change], counts[change])
        dropped.add_metric(labels, counts["dropped"])
        similar.add_metric(labels, _buckets(counts["similarity"]), None)
    yield from (tokens, commits, slots, dropped, last, size, similar)

    for name, (metric, text) in _POOL_COUNTERS.items():
        counter = CounterMetricFamily(metric, text, labels=by_engine)
        for labels, pool in engines:
            counter.add_metric(labels, pool[name])
        yield counter
    for name, (metric, text) in _POOL_GAUGES.items():
        gauge = GaugeMetricFamily(metric, text, labels=by_engine)
        for labels, pool in engines:
            gauge.add_metric(labels, pool[name])
        yield gauge

    share = GaugeMetricFamily(
        "pacellm:experts_share_ratio", "Share of experts that tokens computed.", labels=by_layer
    )
    for report in reports:
        for layer, counts in report.experts.items():
            if counts.get("share") is not None:
                share.add_metric([model_name, str(report.rank), layer], counts["share"])
    yield share


def _buckets(counts: list[int]) -> list[tuple[str, float]]:
    """Of a Prometheus histogram: each end and how many lie at or below it."""
    ends = [*map(str, SIMILARITY_ENDS), "+Inf"]
    return [(end, sum(counts[: i + 1])) for i, end in enumerate(ends)]


class Scrapes:
    """The engines' latest answer, asked for once however many read it at a time."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._asking: asyncio.Task[list[EngineReport]] | None = None
        self._said: list[EngineReport] = []
        self._said_at: float | None = None
        self._failed = False

    async def metrics(self) -> list[Metric]:
        """As of now, or of the last answer where engines are busy; none while none was had."""
        if self._asking is None:
            self._asking = asyncio.create_task(ask_engines(self._client))
            self._asking.add_done_callback(self._take)
        await asyncio.wait([self._asking], timeout=PATIENCE_S)
        if self._said_at is None:
            return []
        # As vLLM labels its own.
        name = self._client.vllm_config.model_config.served_model_name
        age = GaugeMetricFamily(
            "pacellm:report_age_seconds", "How old these numbers are.", labels=["model_name"]
        )
        age.add_metric([name], time.monotonic() - self._said_at)
        return [*families(self._said, name), age]

    def _take(self, asked: "asyncio.Task[list[EngineReport]]") -> None:
        self._asking = None
        error = asked.exception()
        if error is None:
            self._said, self._said_at, self._failed = asked.result(), time.monotonic(), False
        elif not self._failed:
            self._failed = True
            logger.error(
                "pacellm: /metrics has nothing new of the memory, as engines do not say (%s: %s); "
                "vLLM's own metrics go on.",
                type(error).__name__,
                error,
            )
