"""``/metrics`` and spans of real servers: counts are the report's, and the oracle's."""

import gzip
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import pytest
import requests
from checkpoints import make_prompt
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from oracle import OracleModel
from prometheus_client.parser import text_string_to_metric_families
from servers import FORKED, VLLM, serving

TINY = Path(__file__).parent.parent.parent / "scripts" / "tiny"
# Thresholds at ends of the similarity's buckets.
PACE = {"segment_size": 64, "bank_size": 40, "theta_high": 0.7, "theta_low": 0.3}
MEMORY = [
    word for name, value in PACE.items() for word in (f"--{name.replace('_', '-')}", str(value))
]
ENGINE = ["--dtype", "float32", "--max-model-len", "4096", "--block-size", "16"]
ENGINE += ["--kv-cache-memory-bytes", str(32 << 20), "--served-model-name", "tiny"]
LAYERS = ("1", "3")
ANSWER = 17
LABELS = ("engine", "layer", "kind", "change", "le")


def metrics(url):
    """Values by name and labels of every metric of ours, not older than this call."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        asked = time.monotonic()
        found = read(url)
        [age] = found["pacellm:report_age_seconds"].values() or [float("inf")]
        if age <= time.monotonic() - asked:
            return found
    raise AssertionError("the engines do not say")


def read(url, **params):
    answer = requests.get(f"{url}/metrics", params=params, timeout=60)
    answer.raise_for_status()
    found = defaultdict(dict)
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            labels = dict(sample.labels)
            if sample.name.startswith("pacellm:"):
                assert labels.pop("model_name") == "tiny"
                key = tuple(labels[name] for name in LABELS if name in labels)
                found[sample.name][key] = sample.value
    return found


def report(url):
    answer = requests.get(f"{url}/plugins/pacellm/memory", timeout=60)
    answer.raise_for_status()
    return answer.json()


def ask(url, prompt, max_tokens=ANSWER):
    return complete(url, prompt, max_tokens=max_tokens)["usage"]


def complete(url, prompt, **settings):
    body = {"model": "tiny", "prompt": prompt, "max_tokens": ANSWER, "temperature": 0}
    body |= {"ignore_eos": True, **settings}
    answer = requests.post(f"{url}/v1/completions", json=body, timeout=120)
    answer.raise_for_status()
    return answer.json()


class Collector(BaseHTTPRequestHandler):
    """Takes the spans that servers send, into ``spans``: attributes by name."""

    spans: ClassVar[list[dict]] = []

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                self.spans.extend(
                    {one.key: value_of(one.value) for one in span.attributes}
                    for span in scope.spans
                    if span.name == "llm_request"
                )
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args):
        pass


def value_of(value):
    if value.HasField("array_value"):
        return [value_of(one) for one in value.array_value.values]
    return getattr(value, value.WhichOneof("value"))


@pytest.fixture(scope="module")
def collector():
    """Where spans are sent."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1/traces"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def two_servers(tmp_path_factory, collector):
    """Two API servers before one engine, which send spans."""
    log = tmp_path_factory.mktemp("log") / "server.log"
    command = [*FORKED, "serve", str(TINY), *MEMORY, *ENGINE, "--api-server-count", "2"]
    command += ["--otlp-traces-endpoint", collector]
    protocol = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}
    with serving(command, log, **protocol, OTEL_BSP_SCHEDULE_DELAY="200") as url:
        yield url


def test_counts_are_the_oracles_and_the_reports(two_servers):
    before = metrics(two_servers)
    prompt = make_prompt(3, 5 * 64 - ANSWER + 1)
    oracle = OracleModel(TINY, {**PACE, "layers": [1, 3]})
    oracle.generate(prompt, ANSWER)
    ask(two_servers, prompt)
    after = metrics(two_servers)

    def new(name, *labels):
        return after[name][labels] - before[name].get(labels, 0)

    for layer in LAYERS:
        bank = oracle.banks[int(layer)]
        write, slots = bank.counts["write"], bank.counts["slots"]
        kinds = {"high": write["high"], "mid": write["mid"], "low": write["low"] + write["empty"]}
        assert sum(kinds.values()) == 5 * 64
        assert min(kinds.values()) > 0
        for kind, count in kinds.items():
            assert new("pacellm:tokens_total", "0", layer, kind) == count
        for change in ("merged", "filled", "replaced"):
            assert new("pacellm:slots_total", "0", layer, change) == slots[change]
        assert new("pacellm:dropped_tokens_total", "0", layer) == slots["dropped"]
        assert new("pacellm:commits_total", "0", layer) == 5
        assert after["pacellm:bank_slots"]["0", layer] == bank.num_valid
        assert after["pacellm:bank_size_slots"]["0", layer] == 40
        below = {
            end: new("pacellm:lookup_similarity_ratio_bucket", "0", layer, end)
            for end in ("0.3", "0.7", "+Inf")
        }
        assert below["0.3"] == write["low"]
        assert below["0.7"] - below["0.3"] == write["mid"]
        assert below["+Inf"] == 4 * 64
    counts = report(two_servers)["layers"]
    for (_, layer, kind), value in after["pacellm:tokens_total"].items():
        assert counts[layer][kind] == value


def test_spans_say_what_the_oracle_did(two_servers):
    prompt = make_prompt(4, 3 * 64 - ANSWER + 1)
    oracle = OracleModel(TINY, {**PACE, "layers": [1, 3]})
    oracle.generate(prompt, ANSWER)
    answer = complete(two_servers, prompt)
    span = span_of(answer["id"])
    assert span["pacellm.layers"] == [1, 3]
    for i, layer in enumerate(LAYERS):
        write = oracle.banks[int(layer)].counts["write"]
        for kind in ("high", "mid", "low", "empty"):
            assert span[f"pacellm.tokens.{kind}"][i] == write[kind]
    assert span["pacellm.commits"] == [3, 3]
    assert span["pacellm.cached_tokens"] == 0
    # Where the front end alone knows that a request has ended.
    word = answer["choices"][0]["text"].split()[3]
    stopped = complete(two_servers, prompt, stop=[word])
    assert stopped["choices"][0]["stop_reason"] == word
    span = span_of(stopped["id"])
    assert span["pacellm.layers"] == [1, 3]
    assert span["pacellm.cached_tokens"] == 2 * 64


def span_of(answer_id):
    """Its request's span; behind the id of an answer vLLM writes which prompt it is of."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for span in Collector.spans:
            if span["gen_ai.request.id"] == f"{answer_id}-0":
                return span
        time.sleep(0.1)
    raise AssertionError(Collector.spans)


def test_any_of_several_api_servers_says_the_same(two_servers):
    with ThreadPoolExecutor(8) as pool:
        for usage in pool.map(lambda seed: ask(two_servers, make_prompt(seed, 100)), range(20, 36)):
            assert usage["prompt_tokens"] == 100
    # Each connection is a new one, which either process may take.
    said = [metrics(two_servers) for _ in range(12)]
    for name in said[0].keys() - {"pacellm:report_age_seconds"}:
        assert all(one[name] == said[0][name] for one in said), name
    text = requests.get(f"{two_servers}/metrics", timeout=60).text
    samples = [line.rsplit(" ", 1)[0] for line in text.splitlines() if not line.startswith("#")]
    assert len(set(samples)) == len(samples)
    # vLLM's own are still there, of both processes together.
    done = sum(
        float(line.split()[-1])
        for line in text.splitlines()
        if line.startswith("vllm:request_success_total")
    )
    assert done >= 16
    assert set(read(two_servers, **{"name[]": "pacellm:commits_total"})) == {
        "pacellm:commits_total"
    }
    only = requests.get(
        f"{two_servers}/metrics", params={"name[]": "vllm:request_success_total"}, timeout=60
    ).text
    assert "vllm:request_success_total" in only
    assert "pacellm:" not in only


def test_snapshots_and_blocks(two_servers):
    before = metrics(two_servers)
    prompt = make_prompt(50, 300)
    for _ in range(2):
        ask(two_servers, prompt, 2)
    after = metrics(two_servers)

    def new(name):
        return after[name]["0",] - before[name]["0",]

    assert new("pacellm:snapshots_published_total") >= 1
    assert new("pacellm:snapshots_hit_total") == 1
    # The last token is always computed, so whole segments below 300.
    assert new("pacellm:snapshot_hit_tokens_total") == 256
    assert after["pacellm:bank_blocks"]["0",] == after["pacellm:bank_requests"]["0",] == 0
    assert after["pacellm:streamed_requests"]["0",] == 0
    body = {"model": "tiny", "prompt": make_prompt(51, 300), "max_tokens": 3500, "stream": True}
    with requests.post(
        f"{two_servers}/v1/completions",
        json={**body, "ignore_eos": True},
        stream=True,
        timeout=60,
    ) as stream:
        lines = stream.iter_lines()  # the connection closes when this is collected
        assert next(lines)
        during = metrics(two_servers)
        assert during["pacellm:bank_requests"]["0",] == 1
        assert during["pacellm:bank_blocks"]["0",] > 1
    # Others' tokens push what nobody uses out of the pool.
    evicted = metrics(two_servers)["pacellm:snapshots_evicted_total"]["0",]
    for seed in range(60, 100):
        ask(two_servers, make_prompt(seed, 900), 1)
        if metrics(two_servers)["pacellm:snapshots_evicted_total"]["0",] > evicted:
            break
    else:
        pytest.fail("no snapshot was ever evicted")


def test_two_data_parallel_engines_are_told_apart(tmp_path):
    parallel = ["--data-parallel-size", "2", "--distributed-executor-backend", "uni"]
    command = [*FORKED, "serve", str(TINY), *MEMORY, *ENGINE, *parallel]
    command += ["--no-enable-prefix-caching", "--api-server-count", "2"]
    with serving(command, tmp_path / "server.log") as url:
        with ThreadPoolExecutor(8) as pool:
            usages = list(pool.map(lambda seed: ask(url, make_prompt(seed, 200)), range(8)))
        found, counts = metrics(url), report(url)["layers"]
    computed = sum(usage["prompt_tokens"] + usage["completion_tokens"] - 1 for usage in usages)
    for layer in LAYERS:
        by_engine = [
            sum(
                found["pacellm:tokens_total"][engine, layer, kind]
                for kind in ("high", "mid", "low")
            )
            for engine in ("0", "1")
        ]
        assert min(by_engine) > 0
        assert sum(by_engine) == computed
        assert sum(counts[layer][kind] for kind in ("high", "mid", "low")) == computed
        commits = [found["pacellm:commits_total"][engine, layer] for engine in ("0", "1")]
        assert sum(commits) == counts[layer]["commits"] == 8 * (216 // 64)


def test_a_server_without_memory_has_vllms_metrics_only(tmp_path, checkpoint):
    command = [*FORKED[:-1], VLLM[-1], "serve", str(checkpoint())]
    command += ["--skip-tokenizer-init", *ENGINE, "--max-model-len", "1024"]
    plugins = {"VLLM_PLUGINS": "pacellm,pacellm_cpu,pacellm_http"}
    with serving(command, tmp_path / "server.log", **plugins) as url:
        text = requests.get(f"{url}/metrics", timeout=60).text
    assert "vllm:num_requests_running" in text
    assert "pacellm" not in text
