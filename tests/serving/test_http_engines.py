"""Two data parallel engines behind one server: whoever answers, one answer and one report."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import requests
from servers import FORKED, serving

TINY = Path(__file__).parent.parent.parent / "scripts" / "tiny"
FILLER = "The old farmer carries the basket. " * 10
ENGINE = ["--dtype", "float32", "--max-model-len", "512", "--kv-cache-memory-bytes", str(32 << 20)]
MEMORY = ["--segment-size", "64", "--block-size", "16", "--no-enable-prefix-caching"]
TOKENS = 12


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
