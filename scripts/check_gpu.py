"""Whether engines on a GPU give one answer: runners, graphs, backends, schedules, long requests.

    python scripts/check_gpu.py --json checks.json

A small random model with memory in two of four layers answers the same requests in many engines,
one after another, each in a process of its own; a group's engines must all say what its first one
says. In fp32 answers and counts must be equal. In bf16 a product's rounding may depend on how many
tokens a step has, so each backend's group is run without memory as well: what differs there too is
not the memory's doing, and differences are shown without making the script fail.

The first engine's process also counts how often the host waited for the device in the package's
own lines, and in the end an engine reads one request of each of ``--long`` tokens. Results are
printed and written as they come. ``--device cpu`` tries out the part that a CPU can do.
"""

import argparse
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench_serving import make_prompts, memory_counts, memory_layers, write_checkpoint

# The FFN is no power of two, and its rows cross pages.
SHAPE = {"hidden": 512, "ffn": 5004, "layers": 4, "heads": 8, "kv": 2, "vocab": 512}
PACE = {
    "bank_size": 37,
    "segment_size": 64,
    "max_insertions": 20,
    "theta_high": 0.45,  # with which all kinds of tokens occur
}
CHUNK = 256
ANSWER = 40
KINDS = ("high", "mid", "low", "commits")
MARK = "ANSWER "
V1, V2 = ({"VLLM_USE_V2_MODEL_RUNNER": flag} for flag in "01")


@dataclass(frozen=True)
class Case:
    """One engine of a group: ``engine`` are arguments of ``LLM``."""

    group: str
    name: str
    dtype: str
    engine: dict[str, Any]
    env: dict[str, str] = field(default_factory=dict)
    memory: bool = True


def cases(device: str, backends: list[str]) -> list[Case]:
    if device == "cpu":
        chunks: list[tuple[str, dict[str, Any]]] = [
            ("chunks of 256", {}),
            ("chunks of 96", {"max_num_batched_tokens": 96}),
            ("one request at a time", {"max_num_seqs": 1}),
        ]
        return [Case("fp32", name, "float32", more) for name, more in chunks]
    eager = {"enforce_eager": True, "async_scheduling": False}
    graphs = {"enforce_eager": False, "async_scheduling": False}
    piecewise = {**graphs, "compilation_config": {"cudagraph_mode": "PIECEWISE"}}
    exact: list[tuple[str, dict[str, Any], dict[str, str]]] = [
        ("V2, eager", eager, V2),
        ("V2, full and piecewise graphs", graphs, V2),
        ("V2, piecewise graphs", piecewise, V2),
        ("V2, graphs, asynchronous", {**graphs, "async_scheduling": True}, V2),
        ("V1, eager", eager, V1),
        ("V1, full and piecewise graphs", graphs, V1),
        ("V2, chunks of 96", {**eager, "max_num_batched_tokens": 96}, V2),
        ("V2, one request at a time", {**eager, "max_num_seqs": 1}, V2),
    ]
    found = [
        Case("fp32", name, "float32", {**engine, "attention_backend": "TRITON_ATTN"}, env)
        for name, engine, env in exact
    ]
    for backend in backends:
        for memory in (True, False):
            group = f"bf16, {backend}, {'memory' if memory else 'no memory'}"
            for name, engine in (("eager", eager), ("graphs", graphs)):
                engine = {**engine, "attention_backend": backend}
                found.append(Case(group, name, "bfloat16", engine, memory=memory))
    return found


def settings(case: Case, model: Path, max_len: int) -> dict[str, Any]:
    found = {
        "model": str(model / case.dtype),
        "dtype": case.dtype,
        "max_model_len": max_len,
        "max_num_seqs": 16,
        "max_num_batched_tokens": CHUNK,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        **case.engine,
    }
    if case.memory:
        found["hf_overrides"] = {"architectures": ["PaceQwen2ForCausalLM"]}
        found["additional_config"] = {
            "pacellm": {"layers": memory_layers(SHAPE["layers"], 2), **PACE}
        }
    return found


def work(task: dict[str, Any]) -> None:
    """The child: one engine, its answers, and what its memory counted."""
    import torch
    from vllm import LLM, SamplingParams

    begun = time.perf_counter()
    llm = LLM(**task["engine"])
    started = time.perf_counter()
    params = [
        SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False)
        for n in task["answers"]
    ]
    prompts: Any = [{"prompt_token_ids": prompt} for prompt in task["prompts"]]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if task["waits"]:
            torch.cuda.set_sync_debug_mode("warn")
        outputs = llm.generate(prompts, params, use_tqdm=False)
        if task["waits"]:
            torch.cuda.set_sync_debug_mode("default")
    found = {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "counts": memory_counts(llm.llm_engine),
        "start_s": started - begun,
        "answer_s": time.perf_counter() - started,
    }
    if task["waits"]:
        syncs = [w for w in seen if "synchronizing" in str(w.message).lower()]
        found["waits"] = sorted(
            f"{w.filename}:{w.lineno}" for w in syncs if "pacellm" in w.filename
        )
        found["waits_in_all"] = len(syncs)
    print(MARK + json.dumps(found), flush=True)


def run(
    case: Case, model: Path, prompts: list[list[int]], answers: list[int], max_len: int, waits: bool
) -> dict[str, Any]:
    """The child's findings, or ``{"error": its last lines}``."""
    env = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        **case.env,
    }
    task = {
        "engine": settings(case, model, max_len),
        "prompts": prompts,
        "answers": answers,
        "waits": waits,
    }
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.run(
            [sys.executable, __file__, "--worker"],
            input=json.dumps(task),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=env,
        )
        for line in child.stdout.splitlines():
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        errors.seek(0)
        return {"error": errors.read()[-3000:]}


def verdict(got: dict[str, Any], first: dict[str, Any] | None) -> str:
    """``same`` also where ``got`` is the group's first."""
    if "error" in got:
        return "FAILED: " + got["error"].strip().splitlines()[-1]
    if first is None:
        return "no first one to compare with"
    equal = sum(a == b for a, b in zip(got["tokens"], first["tokens"], strict=True))
    return (
        "same" if equal == len(first["tokens"]) else f"{equal} of {len(first['tokens'])} the same"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", default="", help="cases whose group or name contains this")
    parser.add_argument("--backends", default="FLASH_ATTN,TRITON_ATTN,FLASHINFER")
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--long", default="131072,200000", help="tokens of long requests")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(json.loads(sys.stdin.read()))
        return
    if args.device == "cpu":
        os.environ.setdefault("PACELLM_CPU_PLATFORM", "1")

    lengths = [int(n) for n in args.long.split(",") if n]
    rng = random.Random(0)
    prompts = [
        make_prompts(i, 1, rng.randrange(20, 700), SHAPE["vocab"])[0] for i in range(args.requests)
    ]
    # Answers of different lengths, so that decode batches shrink and graphs are padded.
    answers = [ANSWER + 7 * (i % 5) for i in range(args.requests)]
    results: list[dict[str, Any]] = []
    ended_well = True

    def note(group: str, name: str, said: str, got: dict[str, Any]) -> None:
        print(f"| {group} | {name} | {said} | {got.get('counts', '')} |", flush=True)
        results.append({"group": group, "name": name, "verdict": said, **got})
        if args.json:
            args.json.write_text(json.dumps(results, indent=1))

    print("| group | engine | answers | counts by layer |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        for dtype in ("float32", "bfloat16") if args.device == "cuda" else ("float32",):
            path = Path(directory) / dtype
            write_checkpoint(path, SHAPE, max([2048, *lengths]) + 64, dtype, weights=True)
        first: dict[str, dict[str, Any] | None] = {}
        backends = args.backends.split(",")
        if "FLASHINFER" in backends and importlib.util.find_spec("flashinfer") is None:
            backends.remove("FLASHINFER")
            if args.device == "cuda":
                print("| bf16, FLASHINFER | | left out: flashinfer is not installed | |")
        for case in cases(args.device, backends):
            if args.only not in case.group and args.only not in case.name:
                continue
            waits = args.device == "cuda" and not first
            got = run(case, Path(directory), prompts, answers, 2048, waits)
            if case.group not in first:
                first[case.group] = None if "error" in got else got
            said = verdict(got, first[case.group])
            ended_well &= said == "same" or (case.dtype != "float32" and "error" not in got)
            note(case.group, case.name, said, got)
            if waits and "error" not in got:
                ended_well &= not got["waits"]
                where = ", ".join(got["waits"]) or "none"
                print(
                    f"\nWaits of the host in our lines: {where} (in all: {got['waits_in_all']})\n"
                )
        for tokens in lengths:
            dtype = "float32" if args.device == "cpu" else "bfloat16"
            case = Case("long", f"{tokens} tokens", dtype, {"max_num_batched_tokens": 8192})
            prompt = make_prompts(tokens, 1, tokens, SHAPE["vocab"])
            got = run(case, Path(directory), prompt, [8], tokens + 64, False)
            said = verdict(got, got)
            ended_well &= said == "same"
            note("long", case.name, f"in {got['answer_s']:.1f} s" if said == "same" else said, got)
    raise SystemExit(0 if ended_well else "not all engines gave their group's answer")


if __name__ == "__main__":
    main()
