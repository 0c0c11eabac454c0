"""Two ways to serve without a GPU, side by side: start-up, prefill and decode, memory off and on.

    python scripts/bench_cpu.py MODEL --python .venv/bin/python .venv-before/bin/python
        [--layers 8,20] [--prompt 2048] [--rounds 3] [--dtype bfloat16]

MODEL is a local checkpoint. Each interpreter has a vLLM of its own: the PyTorch CPU platform, or
vLLM's own CPU build. Each runs engines with memory off and on by turns, ``--rounds`` times, and the
table has medians of processor seconds and, for each row, the ratio to the first interpreter's.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys

RUN = """
import json, os, sys, time
began = time.process_time()
from vllm import LLM, SamplingParams
model, layers, length, dtype = json.loads(sys.argv[1])
settings = {}
if layers:
    config = json.load(open(os.path.join(model, "config.json")))
    settings["hf_overrides"] = {"architectures": ["Pace" + config["architectures"][0]]}
    settings["additional_config"] = {"pacellm": {"layers": layers}}
llm = LLM(model, dtype=dtype, max_model_len=length + 256, max_num_batched_tokens=2048,
          enforce_eager=True, kv_cache_memory_bytes=1 << 30, enable_prefix_caching=False,
          **settings)
took = [time.process_time() - began]
prompt = {"prompt_token_ids": [100 + (i * i) % 997 for i in range(length)]}
for tokens in (1, 65):
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    llm.generate([prompt], params, use_tqdm=False)
    began = time.process_time()
    llm.generate([prompt], params, use_tqdm=False)
    took.append(time.process_time() - began)
start, prefill, both = took
print("RESULT", json.dumps([start, prefill, both - prefill]))
"""
ROWS = ("start-up", "prefill", "64 tokens after it")


def measure(python: str, model: str, layers: list[int], length: int, dtype: str) -> list[float]:
    """Processor seconds of start-up, of the prompt, and of the 64 tokens after it."""
    env = {**os.environ, "PACELLM_CPU_PLATFORM": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    env.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # What a server's workers have, and a single process has to be given.
    env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    done = subprocess.run(
        [python, "-c", RUN, json.dumps([model, layers, length, dtype])],
        env=env,
        capture_output=True,
        text=True,
    )
    [line] = [line for line in done.stdout.splitlines() if line.startswith("RESULT")] or [""]
    if not line:
        sys.exit(done.stderr[-2000:])
    return json.loads(line.removeprefix("RESULT"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--python", nargs="+", default=[sys.executable])
    parser.add_argument("--layers", default="8,20")
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    layers = [int(index) for index in args.layers.split(",")]
    model = os.path.abspath(args.model)
    found: dict[tuple[str, str], list[list[float]]] = {}
    for round_ in range(args.rounds):
        for memory in ("off", "on"):
            for python in args.python:
                chosen = layers if memory == "on" else []
                took = measure(python, model, chosen, args.prompt, args.dtype)
                found.setdefault((memory, python), []).append(took)
                print(f"round {round_ + 1}, {python}, memory {memory}: {took}", flush=True)
    print("\n" + "  ".join(["processor seconds".ljust(28), *args.python, "ratios to the first"]))
    for row, name in enumerate(ROWS):
        for memory in ("off", "on"):
            took = [[run[row] for run in found[memory, python]] for python in args.python]
            ratios = [
                statistics.median(a / b for a, b in zip(mine, took[0], strict=True))
                for mine in took[1:]
            ]
            cells = [f"{statistics.median(mine):.2f}" for mine in took]
            cells += [f"{ratio:.2f}" for ratio in ratios]
            print("  ".join([f"{name}, memory {memory}".ljust(28), *cells]))


if __name__ == "__main__":
    main()
