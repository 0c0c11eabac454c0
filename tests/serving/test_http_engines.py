"""Two data parallel engines behind one server: whoever answers, one answer and one report."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from servers import FORKED, serving

from pacellm_vllm.serving import asking
from pacellm_vllm.serving.report import add_experts, add_layers, add_pools

TINY = Path(__file__).parent.parent.parent / "scripts" / "tiny"
FILLER = "The old farmer carries the basket. " * 10
ENGINE = ["--dtype", "float32", "--max-model-len", "512", "--kv-cache-memory-bytes", str(32 << 20)]
MEMORY = ["--segment-size", "64", "--block-size", "16", "--no-enable-prefix-caching"]
TOKENS = 12


def test_reports_of_two_engines_add_up():
    def layer(*counts, peak, similarity):
        names = ("high", "mid", "low", "commits", "merged", "filled", "replaced", "dropped")
        found = {"preset": "gentle", "bank_size": 9, "slots_last": peak, "slots_peak": peak}
        return {"1": {**found, **dict(zip(names, counts, strict=True)), "similarity": similarity}}

    one = layer(1, 2, 3, 4, 5, 6, 7, 8, peak=9, similarity=[1, 2])
    other = layer(10, 20, 30, 40, 50, 60, 70, 80, peak=5, similarity=[30, 40])
    both = layer(11, 22, 33, 44, 55, 66, 77, 88, peak=9, similarity=[31, 42])
    assert add_layers([one, other]) == both


def test_shares_of_experts_are_of_all_tokens():
    def layer(tokens, share):
        return {"1": {"num_experts": 8, "way": "grouped", "tokens": tokens, "share": share}}

    assert add_experts([layer(10, 0.5), layer(30, 0.25)]) == layer(40, 12.5 / 40)
    assert add_experts([layer(0, None), layer(30, 0.25)]) == layer(30, 0.25)
    assert add_experts([layer(10, 0.5), layer(0, None)]) == layer(10, 0.5)


def test_pools_of_two_engines_add_up():
    pools = [{"published": 1, "hit": 2}, {"published": 10, "hit": 20}]
    assert add_pools(pools) == {"published": 11, "hit": 22}


@pytest.mark.parametrize("engine", [0, 1])
def test_an_answer_is_asked_of_every_engine(engine, monkeypatch):
    """Each of two ranks, of which the second has other layers."""

    async def ask_all_engines(client, method, request_id, first):
        engines = [[None, None], [None, None]]
        if request_id == "cmpl-7-0":
            engines[engine] = [{1: {"first": first}}, {3: {"first": first}}]
        return engines

    monkeypatch.setattr(asking, "ask_all_engines", ask_all_engines)
    found = asyncio.run(asking.ask_answer(None, "cmpl-7", 5))
    assert found == {"1": {"first": 5}, "3": {"first": 5}}
    assert asyncio.run(asking.ask_answer(None, "cmpl-8", 5)) is None


def test_two_engines_answer_as_one_and_report_together(tmp_path):
    hidden = "The magic number of Rome is"
    prompts = [f"{FILLER}{hidden} {n}. {FILLER}{hidden}" for n in (12, 47, 63, 85)]
    parallel = ["--data-parallel-size", "2", "--distributed-executor-backend", "uni"]
    command = [*FORKED, "serve", str(TINY), *ENGINE, *MEMORY, *parallel, "--api-server-count", "1"]
    log = tmp_path / "server.log"
    with serving(command, log) as url:

        def complete(prompt):
            body = {"model": str(TINY), "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
            answer = requests.post(f"{url}/v1/completions", json=body, timeout=120)
            answer.raise_for_status()
            usage = answer.json()["usage"]
            computed = usage["prompt_tokens"] + usage["completion_tokens"] - 1
            return answer.json()["choices"][0]["text"], computed

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(complete, prompts * 2))
        metrics = requests.get(f"{url}/metrics", timeout=60).text
        report = requests.get(f"{url}/plugins/pacellm/memory", timeout=60).json()["layers"]
    assert answers[:4] == answers[4:]
    assert len({text for text, _ in answers}) == 4
    done = [
        float(line.split()[-1])
        for line in metrics.splitlines()
        if line.startswith("vllm:request_success_total") and 'reason="length"' in line
    ]
    assert len(done) == 2
    assert min(done) > 0
    assert sum(done) == 8
    for counts in report.values():
        assert sum(counts[kind] for kind in ("high", "mid", "low")) == sum(n for _, n in answers)
