"""Speed of one FFN when each token computes a share of its experts; dense and routed in one run.

    python scripts/bench_experts.py [--hidden 3584] [--neurons 18944] [--experts 64] [--threads 2]
    python scripts/bench_experts.py --device cuda --dtype bfloat16

Random weights, so tokens choose without preference; trained ones would share experts more.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from pacellm_vllm.experts.ffn import FfnWeights, grouped_output
from pacellm_vllm.experts.fused import fused_output
from pacellm_vllm.experts.routing import ExpertRouter

SHARES = (1.0, 0.75, 0.5, 0.25)


def act(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def seconds(run: Callable[[], torch.Tensor], repeats: int) -> float:
    """Median of ``repeats`` after one more that does not count."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else bool
    run()
    times = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@torch.inference_mode()
def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    if args.device == "cuda" and dtype == torch.float32:
        raise SystemExit("on a GPU float32 is masked, not routed; use --dtype bfloat16")
    compute = grouped_output if args.device == "cpu" else fused_output
    torch.manual_seed(0)
    torch.set_default_device(args.device)
    gate_up = torch.randn(2 * args.neurons, args.hidden, dtype=dtype) / args.hidden**0.5
    down = torch.randn(args.hidden, args.neurons, dtype=dtype) / args.neurons**0.5
    w = FfnWeights(gate_up, down, act)
    routers = []
    for share in SHARES:
        top_k = round(share * args.experts)
        router = ExpertRouter(args.experts, args.hidden, act, top_k=top_k, dtype=dtype)
        router.fill(*gate_up.split(args.neurons))
        routers.append(router)

    def dense(x: torch.Tensor) -> torch.Tensor:
        a = act(torch.nn.functional.linear(x, gate_up))
        return torch.nn.functional.linear(a, down)

    what = f"{args.neurons} x {args.hidden}, {args.experts} experts, {args.dtype}, {args.device}"
    print(f"{what}, torch {torch.__version__}, {args.threads} threads;", end=" ")
    print("ms, and times the dense FFN's speed")
    print("| tokens | dense | " + " | ".join(f"{s:.0%}" for s in SHARES) + " | router alone |")
    print("|---" * (len(SHARES) + 3) + "|")
    for tokens in args.tokens:
        x = torch.randn(tokens, args.hidden, dtype=dtype)
        repeats = 3 if tokens > 64 else 7
        base = seconds(lambda x=x: dense(x), repeats)
        cells = [f"{tokens}", f"{1e3 * base:.1f}"]
        for router in routers:
            took = seconds(lambda x=x, r=router: compute(x, w, r.choose(x)), repeats)
            cells.append(f"{1e3 * took:.1f} ({base / took:.2f})")
        alone = seconds(lambda x=x: routers[2].choose(x), repeats)
        print("| " + " | ".join([*cells, f"{1e3 * alone:.2f}"]) + " |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden", type=int, default=3584)
    parser.add_argument("--neurons", type=int, default=18944)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    main(parser.parse_args())
