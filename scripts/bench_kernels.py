"""The GPU kernels at a model's shapes: right, repeatable, how fast against what must be read.

    python scripts/bench_kernels.py --json out.json

    decode B    one token each of B requests within their second segment, replayed as a CUDA graph
    prefill N   N tokens of one request, a whole segment with its commit where N is --segment

For each: the error against the plain PyTorch ops on the same device (root of the mean square, over
that of the memory's contribution), whether repeated runs from one state leave the same bits in
outputs and pages, and the time against reading what the case has to read (keys, activations in and
out, blended values) at the bandwidth measured in the same run. ``--device cpu`` with
TRITON_INTERPRET=1 and small sizes tries the script out; its times mean nothing.

    python scripts/bench_kernels.py --host

measures what the host does, on tensors without memory and with launches left out: metadata of a
step, once for all layers, and the rounds of a step in one layer.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton
from bench_ops import activations
from triton.runtime.jit import JITFunction
from vllm.v1.attention.backend import CommonAttentionMetadata

from pacellm_vllm.config import PaceConfig
from pacellm_vllm.memory.backend import BankMetadataBuilder
from pacellm_vllm.memory.device import DeviceTables, counts_of, new_tally
from pacellm_vllm.memory.layout import BankLayout
from pacellm_vllm.memory.store import PagedStore, unit_view
from pacellm_vllm.ops.update import advance
from pacellm_vllm.request import RequestSettings


class Case:
    """``batch`` requests with one committed segment each, about to take ``tokens`` more each."""

    def __init__(self, batch: int, tokens: int, args: argparse.Namespace) -> None:
        self.device = torch.device(args.device)
        self.dtype = getattr(torch, args.dtype)
        settings = {"segment_size": args.segment, "bank_size": args.slots, "preset": args.preset}
        self.rules = PaceConfig.from_sources(settings).rules()
        self.layout = BankLayout.plan(self.rules, args.width, self.dtype, args.page_kib * 1024)
        self.tokens, self.batch, size = tokens, batch, args.segment
        pages = self.layout.num_pages
        # As in a block-outermost pool of two memory layers: this layer's pages are every other one.
        shape = (batch * pages + 1, 2, args.page_kib * 1024)
        self.pool = torch.zeros(shape, dtype=torch.uint8, device=self.device)
        ids = torch.randperm(batch * pages, generator=torch.Generator().manual_seed(0)) + 1
        self.table = ids.view(batch, pages).to(self.device, torch.int32)
        self.tally = new_tally(batch, self.device)
        self.tables = DeviceTables(self.layout, self.rules, batch, batch * tokens, self.device)
        units = unit_view(self.pool[:, :1, None], self.layout, self.dtype)
        for i, held in enumerate(self.table.tolist()):
            first = activations(size, args.width, 2 + i, args.device).to(self.dtype)
            advance(PagedStore(units, held, self.layout), first, 0, self.rules)
        self.a = activations(batch * tokens, args.width, 1, args.device).to(self.dtype)
        self.out = torch.empty_like(self.a)
        # A segment's first token also sums the keys' squared norms.
        self.position = size + (tokens == 1)
        starts = np.arange(batch + 1) * tokens
        lengths = np.full(batch, self.position + tokens)
        self.step = self.tables.of_batch(self.table, starts, lengths, {})
        self.before = self.pool.clone()

    def run(self) -> None:
        cache, a, out = self.pool[:, :1, None], self.a, self.out
        self.step.run(cache, self.layout, self.dtype, self.rules, a, out, self.tally, None)

    def from_the_start(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Bits of the outputs and the pages after one run from the first state."""
        self.pool.copy_(self.before)
        self.out.fill_(float("nan"))
        self.run()
        return self.out.clone().view(torch.uint8), self.pool.clone()

    def error(self) -> float:
        """Of the first request's outputs, against the plain ops."""
        units = unit_view(self.before.clone()[:, :1, None], self.layout, self.dtype)
        store = PagedStore(units, self.table[0].tolist(), self.layout)
        a = self.a[: self.tokens]
        want = advance(store, a, self.position, self.rules)[0].double()
        self.from_the_start()
        apart = (self.out[: self.tokens].double() - want).square().mean().sqrt()
        return float(apart / (want - a.double()).square().mean().sqrt().clamp_min(1e-30))

    def bytes_read(self) -> int:
        """What a step must move at least, if values are read once for each token."""
        rows = self.batch * self.rules.bank_size + 2 * self.batch * self.tokens
        listed = min(self.rules.top_k + self.rules.negative_k, self.rules.bank_size)
        rows += self.batch * min(self.tokens * listed, self.rules.bank_size)
        return rows * self.layout.width * self.layout.itemsize


# Elements; 512 MB, where an H100 has 50 MB of cache.
_LARGER_THAN_CACHES = 1 << 27


def timed(run: Callable[[], Any], repeats: int, device: str) -> float:
    """Median seconds of a call; on a GPU each finds the caches full of something else."""
    times = []
    other = torch.empty(_LARGER_THAN_CACHES if device == "cuda" else 0, device=device)
    for _ in range(repeats):
        if device == "cuda":
            other.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            begun = time.perf_counter()
            run()
            times.append(time.perf_counter() - begun)
    return statistics.median(times)


def graph_of(run: Callable[[], Any]) -> Callable[[], Any]:
    """A CUDA graph of ``run``: it fails here if anything in it waits for the device."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def measure_host(args: argparse.Namespace) -> None:
    JITFunction.run = lambda self, *given, **options: None
    meta, dtype = torch.device("meta"), getattr(torch, args.dtype)
    rules = PaceConfig.from_sources(
        {"segment_size": args.segment, "bank_size": args.slots, "preset": args.preset}
    ).rules()
    layout = BankLayout.plan(rules, args.width, dtype, args.page_kib * 1024)
    builder = object.__new__(BankMetadataBuilder)
    builder._rules, builder._applied = rules, {}
    builder._tables = DeviceTables(layout, rules, 256, 8192, meta)
    builder.kv_cache_spec = SimpleNamespace(layout=layout, grid=None)
    own = {row: RequestSettings(alpha=0.5) for row in range(256)}
    pool = torch.empty(400, 1, 1, args.page_kib * 1024, dtype=torch.uint8, device=meta)
    tally = new_tally(256, meta)
    print("| step | metadata | with 256 own settings | rounds | a layer |")
    print("|---|---|---|---|---|")
    for name, counts, length in (
        ("decode 1", [1], 2000),
        ("decode 256", [1] * 256, 2000),
        ("decode 255, prompt 512", [1] * 255 + [512], 2000),
        ("prompt 8192", [8192], 8192),
    ):
        starts, requests = np.append(0, np.cumsum(counts)), len(counts)
        common = CommonAttentionMetadata(
            query_start_loc=torch.empty(requests + 1, dtype=torch.int32, device=meta),
            query_start_loc_cpu=torch.tensor(starts, dtype=torch.int32),
            seq_lens=torch.empty(requests, dtype=torch.int32, device=meta),
            num_reqs=requests,
            num_actual_tokens=int(starts[-1]),
            max_query_len=max(counts),
            max_seq_len=length,
            block_table_tensor=torch.empty(requests, 40, dtype=torch.int32, device=meta),
            slot_mapping=torch.empty(int(starts[-1]), dtype=torch.int64, device=meta),
            seq_lens_cpu_upper_bound=torch.full((requests,), length, dtype=torch.int32),
        )
        build = functools.partial(builder.build, 0, common)
        seconds = []
        for settings in (own, {}):
            builder._settings = settings
            seconds.append(timed(build, args.repeats, "cpu"))
        step = build().device
        a = torch.empty(int(starts[-1]), args.width, dtype=dtype, device=meta)
        given = pool, layout, dtype, rules, a, torch.empty_like(a), tally, None
        layer = timed(lambda step=step, given=given: step.run(*given), args.repeats, "cpu")
        print(
            f"| {name} | {1e6 * seconds[1]:.0f} us | {1e6 * seconds[0]:.0f} us | "
            f"{len(step.rounds)} | {1e6 * layer:.0f} us |"
        )


def measure(name: str, batch: int, tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    case = Case(batch, tokens, args)
    first = case.from_the_start()
    same = all(
        torch.equal(mine, theirs)
        for _ in range(args.repeats)
        for mine, theirs in zip(case.from_the_start(), first, strict=True)
    )
    error = case.error()
    eager = timed(case.run, args.repeats, args.device)
    seconds, graph_same = eager, True
    if args.device == "cuda" and tokens == 1:
        replay = graph_of(case.run)
        case.pool.copy_(case.before)
        replay()
        graph_same = torch.equal(case.out.view(torch.uint8), first[0])
        seconds = timed(replay, args.repeats, args.device)
    counts = counts_of(case.tally)
    return {
        "case": name,
        "seconds": seconds,
        "eager": eager,
        "bytes": case.bytes_read(),
        "error": error,
        "same bits": same and graph_same,
        "kinds": [counts.high, counts.mid, counts.low],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=18944)
    parser.add_argument("--slots", type=int, default=100)
    parser.add_argument("--segment", type=int, default=1024)
    parser.add_argument("--page-kib", type=int, default=448)
    parser.add_argument("--preset", choices=["gentle", "official", "paper"], default="official")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--decode", default="1,8,32,128,256", help="requests in a decode step")
    parser.add_argument("--prefill", default="128,1024", help="tokens, at most --segment")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--host", action="store_true")
    args = parser.parse_args()
    if args.host:
        measure_host(args)
        return
    big = torch.ones(1 << (28 if args.device == "cuda" else 20), device=args.device)
    bandwidth = big.numel() * 4 / timed(lambda: big.sum(), args.repeats, args.device)
    results = [
        measure(f"{kind} {n}", n if kind == "decode" else 1, 1 if kind == "decode" else n, args)
        for kind, given in (("decode", args.decode), ("prefill", args.prefill))
        for n in map(int, filter(None, given.split(",")))
    ]
    name = torch.cuda.get_device_name() if args.device == "cuda" else "interpreter"
    print(
        f"D = {args.width}, M = {args.slots}, {args.dtype}, {args.preset}, {name}, torch "
        f"{torch.__version__}, triton {triton.__version__}, {time.strftime('%Y-%m-%d')}\n"
        f"reading at {bandwidth / 1e9:.0f} GB/s\n"
    )
    print("| case | time | without a graph | of reading | error | same bits | high, mid, low |")
    print("|---|---|---|---|---|---|---|")
    for got in results:
        print(
            f"| {got['case']} | {1e6 * got['seconds']:.1f} us | {1e6 * got['eager']:.1f} us | "
            f"{got['bytes'] / bandwidth / got['seconds']:.1%} | {got['error']:.1e} | "
            f"{'yes' if got['same bits'] else 'NO'} | {got['kinds']} |"
        )
    if args.json:
        args.json.write_text(json.dumps({"bandwidth": bandwidth, "results": results}, indent=1))


if __name__ == "__main__":
    main()
