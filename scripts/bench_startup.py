"""What the installed plugin costs an engine that does not use it, from start to first token.

    python scripts/bench_startup.py [--model scripts/tiny] [--pairs 8]

Starts a process with plain vLLM by turns with the plugin loaded and without, and prints the median
seconds of each and of the ratio of a pair; and how long the plugin's ``register()`` takes once vLLM
is imported.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

RUN = """
import json, sys, time
import vllm.model_executor.models.config, vllm.model_executor.models
from vllm import LLM, SamplingParams
began = time.perf_counter()
if sys.argv[2]:
    from pacellm_vllm.plugin import register
    register()
took = time.perf_counter() - began
llm = LLM(sys.argv[1], dtype="float32", max_model_len=1024, kv_cache_memory_bytes=64 << 20)
llm.generate("The old farmer", SamplingParams(max_tokens=1), use_tqdm=False)
heavy = [n for n in ("sklearn", "matplotlib", "pacellm_vllm.memory") if n in sys.modules]
print("RESULT", json.dumps([1000 * took, heavy]))
"""


def start(model: str, plugins: str) -> tuple[float, float, list[str]]:
    """Seconds from start to end, milliseconds of ``register()``, heavy modules found."""
    # The CPU platform in both: it is there because it is asked for, not because of the plugin.
    named = ",".join(filter(None, ["pacellm_cpu", plugins]))
    env = {**os.environ, "VLLM_PLUGINS": named, "VLLM_LOGGING_LEVEL": "ERROR"}
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", RUN, model, plugins], env=env, capture_output=True, text=True
    )
    took = time.perf_counter() - began
    [line] = [line for line in done.stdout.splitlines() if line.startswith("RESULT")] or [""]
    if not line:
        sys.exit(done.stderr[-2000:])
    milliseconds, heavy = json.loads(line.removeprefix("RESULT"))
    return took, milliseconds, heavy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="scripts/tiny")
    parser.add_argument("--pairs", type=int, default=8)
    args = parser.parse_args()
    os.environ.setdefault("PACELLM_CPU_PLATFORM", "1")
    start(args.model, "")
    pairs, registering = [], []
    heavy: dict[str, set[str]] = {"": set(), "pacellm": set()}
    for index in range(args.pairs):
        times = {}
        # By turns first, so that neither always finds the other's files warm.
        for plugins in ("", "pacellm") if index % 2 else ("pacellm", ""):
            times[plugins], milliseconds, found = start(args.model, plugins)
            heavy[plugins].update(found)
            if plugins:
                registering.append(milliseconds)
        pairs.append((times["pacellm"], times[""]))
        print(f"with {times['pacellm']:.2f} s, without {times['']:.2f} s", flush=True)
    ratios = sorted(a / b for a, b in pairs)
    print(
        f"median with the plugin {statistics.median(a for a, _ in pairs):.2f} s, without "
        f"{statistics.median(b for _, b in pairs):.2f} s; ratio of a pair "
        f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
    )
    print(
        f"register(): median {statistics.median(registering):.1f} ms, most {max(registering):.1f}"
    )
    more = heavy["pacellm"] - heavy[""]
    print(f"heavy modules imported because of the plugin: {', '.join(sorted(more)) or 'none'}")


if __name__ == "__main__":
    main()
