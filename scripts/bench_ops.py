"""One segment and one decode step of the memory: time, peak memory, share of the machine.

    python scripts/bench_ops.py --width 18944 --tokens 1024 --json out.json

    published  the paper's formulation, re-stated: cosine by broadcast, gathers of values
    look-up    ours on ordinary tensors, Enhance alone
    segment    ours as served: Enhance, Update and commit on paged banks
    one by one, batched   a decode step of --batch requests as served, without and with batching

Each case runs in a process of its own, so that its peak memory is its own: above its inputs, which
the bank and the activations are. The published formulation needs T x M x D numbers several times
over (23 GB at the defaults): it runs on --published-tokens of them, by default all that fit the
machine's free memory, and where they are fewer both figures are scaled up, which the table says.
"""

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from pacellm_vllm.config import PaceConfig
from pacellm_vllm.memory.layout import BankLayout
from pacellm_vllm.memory.store import PagedStore, unit_view
from pacellm_vllm.ops.lookup import look_up
from pacellm_vllm.ops.steps import advance_steps
from pacellm_vllm.ops.update import advance

CASES = ("published", "look-up", "segment", "one by one", "batched")


def activations(tokens: int, width: int, seed: int, device: str) -> torch.Tensor:
    """Clustered rows: high, mid and low tokens all occur."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(40, width, generator=torch.Generator().manual_seed(0))
    rows = centres[torch.randint(40, (tokens,), generator=generator)]
    rows += (
        2
        * torch.rand(tokens, 1, generator=generator) ** 2
        * torch.randn(tokens, width, generator=generator)
    )
    return rows.to(device)


def published(a: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Look-up, blend and update as the paper's text and tables describe them (`official`)."""
    sims = F.cosine_similarity(a[:, None], keys[None], dim=-1)
    best, top = sims.topk(5, dim=1)
    bottom = sims.topk(2, dim=1, largest=False).indices
    mean_top, mean_bottom = values[top].mean(1), values[bottom].mean(1)
    high, mid = best[:, :1] > 0.75, (best[:, :1] > 0.25) & (best[:, :1] <= 0.75)
    recalled = torch.where(high, mean_top + 0.1 * mean_bottom, 0.5 * mean_top + 0.1 * mean_bottom)
    o = torch.where(high | mid, 0.8 * a + 0.2 * recalled, a)
    mean = best.mean(1)
    merging = (mean > 0.25) & (mean <= 0.75)
    if merging.any():
        slots = top[merging].unique()
        keys[slots] = 0.5 * keys[slots] + 0.5 * a[merging].mean(0)
        values[slots] = 0.5 * values[slots] + 0.5 * o[merging].mean(0)
    for slot, token in enumerate((mean <= 0.25).nonzero().flatten()[: len(keys)]):
        keys[slot], values[slot] = a[token], o[token]
    return o


def prepare(case: str, args: argparse.Namespace) -> Callable[[], Any]:
    """The case as a function without arguments; its state may be run again and again."""
    device, size = args.device, args.segment
    dtype = getattr(torch, args.dtype)
    rules = PaceConfig.from_sources({"segment_size": size, "bank_size": args.slots}).rules()
    if case in ("published", "look-up"):
        a = activations(args.tokens, args.width, 1, device).to(dtype)
        keys, values = (activations(args.slots, args.width, i, device).to(dtype) for i in (2, 3))
        if case == "published":
            a = a[: published_tokens(args)]
            return lambda: published(a, keys, values)
        return lambda: look_up(a, keys, values, rules)

    banks = args.batch if case in ("one by one", "batched") else 1
    page_bytes = args.page_kib * 1024
    layout = BankLayout.plan(rules, args.width, dtype, page_bytes)
    blocks = banks * layout.num_pages + 1
    # As in a block-outermost pool of two memory layers: this layer's pages are every other one.
    pool = torch.zeros(blocks, 2, page_bytes, dtype=torch.uint8, device=device)
    units = unit_view(pool[:, :1, None], layout, dtype)
    shuffled = torch.randperm(blocks - 1, generator=torch.Generator().manual_seed(0)) + 1
    pages = shuffled.view(banks, layout.num_pages).tolist()
    stores = [PagedStore(units, row, layout) for row in pages]
    first = activations(size, args.width, 2, device).to(dtype)
    for store in stores:
        advance(store, first, 0, rules)
    if case == "segment":
        a = activations(args.tokens, args.width, 1, device).to(dtype)
        return lambda: advance(stores[0], a, 2 * size - len(a), rules)
    a = activations(banks, args.width, 1, device).to(dtype)
    positions = [size] * banks
    if case == "batched":
        return lambda: advance_steps(stores, a, positions, [rules] * banks)
    return lambda: [advance(store, a[i : i + 1], size, rules) for i, store in enumerate(stores)]


def published_tokens(args: argparse.Namespace) -> int:
    """How many tokens the published formulation runs on: what was asked for, or what fits."""
    if args.published_tokens:
        return args.published_tokens
    if args.device == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        free = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])
    # Both sides broadcast and their product, with something to spare.
    each = 3 * args.slots * args.width * getattr(torch, args.dtype).itemsize
    return max(1, min(args.tokens, int(0.9 * free) // each // 32 * 32))


def resident(field: str) -> int:
    """Bytes of VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"no {field} in /proc/self/status")


def timed(run: Callable[[], Any], repeats: int, args: argparse.Namespace) -> float:
    """Median seconds."""
    clock = time.process_time if args.cpu_time else time.perf_counter
    device = args.device
    times = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        begun = clock()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - begun)
    return statistics.median(times)


def peak_of(run: Callable[[], Any], device: str) -> int:
    """Bytes at the peak of one call, above what was there before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def ceilings(args: argparse.Namespace) -> dict[str, float]:
    """What this machine does right now: products in FLOP/s, reading in bytes/s."""
    a = torch.randn(args.tokens, args.width, device=args.device, dtype=getattr(torch, args.dtype))
    keys = torch.randn(4 * args.slots, args.width, device=args.device, dtype=a.dtype)
    product = timed(lambda: a @ keys.t(), 5, args)
    big = torch.ones(1 << 27, device=args.device)
    reading = timed(lambda: big.sum(), 5, args)
    return {
        "flops": 2 * args.tokens * args.width * len(keys) / product,
        "bytes": big.numel() * 4 / reading,
    }


def child(case: str, args: argparse.Namespace) -> dict[str, float]:
    run = prepare(case, args)
    peak = peak_of(run, args.device)
    repeats = 1 if case == "published" else args.repeats
    scale = 1.0
    if case == "published":
        scale = args.tokens / published_tokens(args)
    seconds = timed(run, repeats, args) * scale
    return {"seconds": seconds, "peak": peak * scale, "scale": scale, **ceilings(args)}


def report(results: dict[str, dict[str, float]], args: argparse.Namespace) -> str:
    itemsize = getattr(torch, args.dtype).itemsize
    lines = ["| case | time | peak memory | share of the ceiling |", "|---|---|---|---|"]
    for case, got in results.items():
        if case in ("one by one", "batched"):
            # What a step must at least read: every bank's keys.
            ideal = args.batch * args.slots * args.width * itemsize / got["bytes"]
            share = f"{ideal / got['seconds']:.1%} of reading at {got['bytes'] / 1e9:.1f} GB/s"
        else:
            ideal = 4 * args.tokens * args.slots * args.width / got["flops"]
            share = f"{ideal / got['seconds']:.2%} of products at {got['flops'] / 1e9:.0f} GFLOP/s"
        note = f" (scaled up x{got['scale']:g})" if got["scale"] != 1 else ""
        lines.append(
            f"| {case}{note} | {1e3 * got['seconds']:.4g} ms | {got['peak'] / 1e6:.4g} MB | "
            f"{share} |"
        )
    if {"published", "segment"} <= set(results):
        theirs, ours = results["published"], results["segment"]
        lines.append("")
        lines.append(
            f"The segment as served is {theirs['seconds'] / ours['seconds']:.0f} times faster and "
            f"{theirs['peak'] / max(ours['peak'], 1):.0f} times smaller than as published."
        )
    if {"one by one", "batched"} <= set(results):
        ratio = results["one by one"]["seconds"] / results["batched"]["seconds"]
        lines.append(f"A decode step of {args.batch} is {ratio:.2f} times faster batched.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=18944)
    parser.add_argument("--slots", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--segment", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--published-tokens", type=int, default=0, help="0: what fits")
    parser.add_argument("--page-kib", type=int, default=448)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cpu-time", action="store_true", help="processor time of all threads")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not 0 < args.tokens <= args.segment:
        parser.error(f"--tokens {args.tokens} must be from 1 to --segment {args.segment}")
    if args.case:
        print(json.dumps(child(args.case, args)))
        return
    results = {}
    for case in args.cases.split(","):
        print(f"{case} ...", file=sys.stderr)
        command = [sys.executable, __file__, *sys.argv[1:], "--case", case]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results[case] = json.loads(done.stdout.splitlines()[-1])
    name = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    where = (
        f"D = {args.width}, M = {args.slots}, {args.tokens} tokens, {args.dtype}, {name}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{time.strftime('%Y-%m-%d')}\ncommand: python scripts/bench_ops.py "
        f"{' '.join(sys.argv[1:])}\n"
    )
    print(where)
    print(report(results, args))
    if args.json:
        args.json.write_text(json.dumps({"where": where, "results": results}, indent=1))


if __name__ == "__main__":
    main()
