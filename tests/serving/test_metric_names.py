"""The dashboard, the alerts and the document name metrics that exist, and all of them."""

import re
from pathlib import Path

import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from pacellm_vllm.memory.counts import MemoryCounts, PlainCounts, PoolCounts
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
