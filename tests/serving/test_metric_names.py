"""Metrics that documents name exist, all of them are named, and what a scrape shows of them."""

import asyncio
import re
from pathlib import Path
from types import SimpleNamespace

import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from pacellm_vllm.memory.counts import MemoryCounts, PlainCounts, PoolCounts
from pacellm_vllm.serving import metrics
from pacellm_vllm.serving.asking import EngineReport
from pacellm_vllm.serving.metrics import families

DOCS = Path(__file__).parent.parent.parent / "docs"
NAME = re.compile(r"pacellm:[a-z_]+")
AGE = "pacellm:report_age_seconds"


def exposed(counts):
    """The sample names of one engine with ``counts`` in one layer, as a scraper reads them."""

    class Collector:
        def collect(self):
            layer = {"preset": "gentle", "bank_size": 7, **counts.as_dict()}
            share = {"1": {"share": 0.5}}
            report = EngineReport(0, {"1": layer}, share, PoolCounts().as_dict())
            return families([report], "tiny")

    registry = CollectorRegistry()
    registry.register(Collector())
    text = generate_latest(registry).decode()
    return {s.name for f in text_string_to_metric_families(text) for s in f.samples}


def test_documents_name_what_there_is():
    there = exposed(MemoryCounts(plain=PlainCounts())) | {AGE}
    for file in ("grafana.json", "alerts.yml"):
        text = (DOCS / file).read_text()
        named = set(NAME.findall(text))
        assert named
        assert named <= there, file
    told = set(NAME.findall((DOCS / "operating.md").read_text()))
    for name in there:
        assert re.sub(r"_bucket$", "", name) in told, name
    assert yaml.safe_load((DOCS / "alerts.yml").read_text())["groups"]


def test_what_kernels_do_not_count_is_left_out():
    left_out = exposed(MemoryCounts(plain=PlainCounts())) - exposed(MemoryCounts())
    assert left_out == {
        "pacellm:slots_total",
        "pacellm:dropped_tokens_total",
        "pacellm:lookup_similarity_ratio_bucket",
    }


def test_what_was_last_said_is_shown_while_engines_do_not_say(monkeypatch):
    """Busy for long, or failing: a scrape is never an error, and tells how old its numbers are."""
    model = SimpleNamespace(served_model_name="tiny")
    client = SimpleNamespace(vllm_config=SimpleNamespace(model_config=model))
    logged = []
    monkeypatch.setattr(metrics, "PATIENCE_S", 0.05)
    monkeypatch.setattr(metrics.logger, "error", lambda *words: logged.append(words))

    def experts(share):
        return [EngineReport(0, {}, {"1": {"share": share}}, {})]

    async def scrape():
        found = {one.name: one.samples for one in await scrapes.metrics()}
        return [s.value for s in found.get("pacellm:experts_share_ratio", [])], AGE in found

    async def answer(said):
        if isinstance(said, Exception):
            raise said
        return await said if isinstance(said, asyncio.Future) else said

    async def ask():
        late = asyncio.get_running_loop().create_future()
        answers = [OSError("a"), OSError("b"), experts(0.5), OSError("c"), late, experts(0.9)]
        monkeypatch.setattr(metrics, "ask_engines", lambda client: answer(answers.pop(0)))
        seen = [await scrape() for _ in range(6)]
        # Two scrapes while the engines are busy have asked them once.
        assert len(answers) == 1
        late.set_result(experts(0.7))
        return [*seen, await scrape(), await scrape()]

    scrapes = metrics.Scrapes(client)
    seen = asyncio.run(ask())
    assert seen == [([], False), ([], False), *[([0.5], True)] * 4, ([0.7], True), ([0.9], True)]
    # Said once until engines say something again.
    assert len(logged) == 2
