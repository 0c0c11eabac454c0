"""What memory costs a running engine: the same model, shape and load variant by variant.

    python scripts/bench_serving.py --shape mid --json out.json

    absent     vLLM without this plugin (on a CPU its platform stays: without it nothing runs)
    installed  plugin installed, not configured
    packed     the same with the KV cache layout that memory asks for (--layout): what memory
               costs beyond it is its own
    pa2, pa4   memory in two layers, in four
    pa2ce      memory in two layers, and experts as --experts says (made while loading)
    pa2@paper  memory by that preset (any of the last three, any preset)

Weights are random: vLLM's own (``load_format="dummy"``), or with ``pa2ce``, which orders what it
loads, a checkpoint written for the run. Prompts draw on a few token ids, so that tokens recur
and every regime of the memory occurs; the counts are printed. All variants' engines are alive at
once and take turns, a few steps each, so that they share whatever else the machine does; what
is compared is each round's ratio to ``installed``, and the median over rounds. Two processes of
one variant can differ by some percent for as long as they live: ``--starts`` begins again with new
ones and pools the rounds. On a GPU, give ``--kv-gib`` so that all variants fit, or ``--alone`` to
start and stop them one after another. On a CPU that is busy with other work, ``--cpu-time``
measures the engine's processor time instead.
"""

import argparse
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, int]] = {
    # hidden, FFN, layers, heads, KV heads, vocabulary
    "tiny": {"hidden": 256, "ffn": 1024, "layers": 4, "heads": 4, "kv": 2, "vocab": 2048},
    "mid": {"hidden": 1024, "ffn": 4096, "layers": 12, "heads": 16, "kv": 4, "vocab": 8192},
    "0.5b": {"hidden": 896, "ffn": 4864, "layers": 24, "heads": 14, "kv": 2, "vocab": 151936},
    "7b": {"hidden": 3584, "ffn": 18944, "layers": 28, "heads": 28, "kv": 4, "vocab": 152064},
}
VARIANTS = ("absent", "installed", "packed", "pa2", "pa4", "pa2ce")
BASELINE = "installed"
DISTINCT_TOKENS = 160
MARK = "REPLY "


def write_checkpoint(
    directory: Path, shape: dict[str, int], max_len: int, dtype: str, weights: bool
) -> None:
    """A Qwen2 config.json, and weights unless vLLM is to make them up."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["ffn"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv"],
        vocab_size=shape["vocab"],
        max_position_embeddings=max_len,
        tie_word_embeddings=False,
        dtype=dtype,
    )
    config.save_pretrained(directory)
    if weights:
        torch.manual_seed(0)
        torch.set_default_dtype(getattr(torch, dtype))
        Qwen2ForCausalLM(config).save_pretrained(directory)


def memory_layers(num_layers: int, count: int) -> list[int]:
    """``count`` layers evenly through the depth; for two, the paper's relative places."""
    if count == 2:
        return [12 * num_layers // 28, 26 * num_layers // 28]
    return [(2 * i + 1) * num_layers // (2 * count) for i in range(count)]


class Worker:
    """One variant's engine in its own process, driven over pipes."""

    def __init__(self, variant: str, args: argparse.Namespace, model: Path) -> None:
        self.variant = variant
        self.settings: dict[str, Any] = {
            "model": str(model),
            "dtype": args.dtype,
            "max_model_len": args.max_len,
            "max_num_seqs": max(args.batch),
            "max_num_batched_tokens": args.chunk,
            "enforce_eager": args.eager,
            "load_format": "auto" if args.weights else "dummy",
        }
        if args.kv_gib:
            self.settings["kv_cache_memory_bytes"] = int(args.kv_gib * 2**30)
        kind, _, preset = variant.partition("@")
        if kind[2:3].isdigit():
            layers = memory_layers(SHAPES[args.shape]["layers"], int(kind[2]))
            pace = {"layers": layers, "segment_size": args.segment, **json.loads(args.pace)}
            if preset:
                pace["preset"] = preset
            if kind.endswith("ce"):
                pace["experts"] = json.loads(args.experts)
            self.settings["hf_overrides"] = {"architectures": ["PaceQwen2ForCausalLM"]}
            self.settings["additional_config"] = {"pacellm": pace}
        plugins = "pacellm_cpu" if variant == "absent" else "pacellm_cpu,pacellm"
        env = {
            "PACELLM_CPU_PLATFORM": "1",
            **os.environ,
            "VLLM_PLUGINS": plugins,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
        }
        if variant == "packed":
            env["VLLM_KV_CACHE_LAYOUT"] = args.layout
        started = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        self.facts = self.ask("start", cpu_time=args.cpu_time, **self.settings)
        self.facts["start_s"] = time.perf_counter() - started

    def ask(self, what: str, **details: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"what": what, **details}) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        raise SystemExit(f"the {self.variant} engine ended with {self.process.wait()}")

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=600)


def raise_norms(engine: Any) -> None:
    """Set the norms of dummy weights to 1.

    They are 1e-3 at most, which would leave activations of next to nothing; with 1 the same tokens
    give like activations and others unlike ones.
    """
    core = engine.engine_core.engine_core
    model = core.model_executor.driver_worker.worker.model_runner.model
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.fill_(1)


def memory_counts(engine: Any) -> dict[int, dict[str, int]]:
    """What the memory of each layer did so far; empty without memory."""
    config = engine.engine_core.engine_core.vllm_config
    layers = config.compilation_config.static_forward_context
    return {
        layer.index: layer.counts.as_dict()
        for name, layer in layers.items()
        if name.endswith(".memory")
    }


def work() -> None:
    """The child: answer one JSON line per request line until stdin ends."""
    begun = time.perf_counter()
    start = json.loads(sys.stdin.readline())
    start.pop("what")
    clock = time.process_time if start.pop("cpu_time") else time.perf_counter
    import torch
    from vllm import LLM, SamplingParams
    from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

    llm = LLM(
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        **start,
    )
    engine = llm.llm_engine
    core = engine.engine_core.engine_core
    config = core.vllm_config
    if start["load_format"] == "dummy":
        raise_norms(engine)
    serial = 0

    def add(prompts: list[list[int]], max_tokens: int) -> None:
        nonlocal serial
        params = SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
        )
        for prompt in prompts:
            serial += 1
            engine.add_request(str(serial), {"prompt_token_ids": prompt}, params)

    def answer(value: Any) -> None:
        print(MARK + json.dumps(value), flush=True)

    answer(
        {
            "engine_s": time.perf_counter() - begun,
            "blocks": config.cache_config.num_gpu_blocks,
            "block_size": config.cache_config.block_size,
            "requests_at_once": get_max_concurrency_for_kv_cache_config(
                config, core.scheduler.kv_cache_config
            ),
        }
    )
    for line in sys.stdin:
        task = json.loads(line)
        if task["what"] == "prefill":
            begun = clock()
            add(task["prompts"], 1)
            while engine.has_unfinished_requests():
                engine.step()
            answer(clock() - begun)
        elif task["what"] == "open":
            add(task["prompts"], task["max_tokens"])
            waiting = len(task["prompts"])
            while waiting:
                waiting -= sum(len(o.outputs[0].token_ids) == 1 for o in engine.step())
            answer(None)
        elif task["what"] == "decode":
            times = []
            for _ in range(task["steps"]):
                begun = clock()
                engine.step()
                times.append(clock() - begun)
            answer(times)
        elif task["what"] == "close":
            engine.abort_request([str(i + 1) for i in range(serial)], internal=False)
            while engine.has_unfinished_requests():
                engine.step()
            answer(None)
        elif task["what"] == "counts":
            answer(memory_counts(engine))
        elif task["what"] == "device":
            answer(torch.cuda.get_device_name() if torch_has_cuda() else "CPU")


def make_prompts(seed: int, count: int, length: int, vocab: int) -> list[list[int]]:
    generator = random.Random(seed)
    known = [generator.randrange(vocab) for _ in range(DISTINCT_TOKENS)]
    return [[generator.choice(known) for _ in range(length)] for _ in range(count)]


def measure(workers: list[Worker], args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Seconds per metric, variant and round; a decode step's is the round's median step."""
    vocab = SHAPES[args.shape]["vocab"]
    seconds: dict[str, dict[str, list[float]]] = {}

    def turn(metric: str, task: Any) -> None:
        # Rotating who goes first keeps a drift of the machine out of the ratios.
        for counted in range(-1, args.rounds):
            shift = counted % len(workers)
            for worker in workers[shift:] + workers[:shift]:
                value = task(worker, counted)
                if counted >= 0:
                    seconds.setdefault(metric, {}).setdefault(worker.variant, []).append(value)
            print(f"{metric}: round {counted + 1} of {args.rounds}", file=sys.stderr)

    turn(
        "prefill",
        lambda w, i: w.ask("prefill", prompts=make_prompts(i, 1, args.prompt, vocab)),
    )
    for batch in args.batch:
        steps = args.steps * (args.rounds + 1) + 2
        for worker in workers:
            prompts = make_prompts(batch, batch, args.context, vocab)
            worker.ask("open", prompts=prompts, max_tokens=steps)
        turn(
            f"decode {batch}",
            lambda w, i: statistics.median(w.ask("decode", steps=args.steps)),
        )
        for worker in workers:
            worker.ask("close")
    return seconds


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def report(
    seconds: dict[str, dict[str, list[float]]],
    facts: dict[str, dict[str, Any]],
    args: argparse.Namespace,
) -> str:
    """Markdown: one row per metric, one column per variant."""
    variants = list(facts)
    base = BASELINE if BASELINE in facts else variants[0]
    lines = [
        f"| | {' | '.join(variants)} |",
        f"|---|{'---|' * len(variants)}",
    ]
    for metric, by_variant in seconds.items():
        kind, *rest = metric.split()
        tokens = args.prompt if kind == "prefill" else int(rest[0])
        name = (
            f"prefill of {tokens} tokens (TTFT alone)"
            if kind == "prefill"
            else f"decode step of {tokens} (inter-token latency)"
        )
        cells = []
        for variant in variants:
            median = statistics.median(by_variant[variant])
            ratios = [a / b for a, b in zip(by_variant[variant], by_variant[base], strict=True)]
            low, middle, high = quartiles(ratios)
            cell = f"{1e3 * median:.4g} ms, {tokens / median:.4g} tokens/s"
            if variant != base:
                cell += f", time x{middle:.3f} ({low:.3f} to {high:.3f})"
            cells.append(cell)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for name, key, pattern in (
        ("KV blocks", "blocks", "{}"),
        (f"requests of {args.max_len} tokens at once", "requests_at_once", "{:.1f}"),
        ("start-up, process to ready", "start_s", "{:.1f} s"),
    ):
        cells = [pattern.format(facts[variant][key]) for variant in variants]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    rounds = f"{args.rounds}" + (f" in each of {args.starts} starts" if args.starts > 1 else "")
    lines += ["", f"Ratios are to `{base}`, round by round: median (quartiles) of {rounds}."]
    for variant in variants:
        for layer, counts in facts[variant].get("counts", {}).items():
            lines.append(f"{variant}, layer {layer}: {counts}")
    return "\n".join(lines)


def torch_has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="mid")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument(
        "--batch", type=lambda s: [int(x) for x in s.split(",") if x], default=[1, 8]
    )
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of a timed prefill")
    parser.add_argument("--context", type=int, default=1100, help="tokens before decoding")
    parser.add_argument(
        "--layout",
        default="BLNHC" if torch_has_cuda() else "BLHNC",
        help="of packed, as in VLLM_KV_CACHE_LAYOUT (%(default)s)",
    )
    parser.add_argument("--steps", type=int, default=8, help="decode steps a turn")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--starts", type=int, default=1, help="new engines, all of it again")
    parser.add_argument("--chunk", type=int, default=512, help="max_num_batched_tokens")
    parser.add_argument("--segment", type=int, default=1024)
    parser.add_argument("--max-len", type=int, default=4096)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--kv-gib", type=float, default=0.5, help="0: vLLM decides")
    parser.add_argument("--pace", default="{}", help="further pacellm settings, as JSON")
    parser.add_argument("--experts", default='{"num_experts": 64}', help="of pa2ce, as JSON")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, not wall time")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--alone", action="store_true", help="one engine at a time")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work()
        return

    import torch
    import vllm

    if args.dtype == "auto":
        args.dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    variants = args.variants.split(",")
    args.weights = any(variant.partition("@")[0].endswith("ce") for variant in variants)
    facts: dict[str, dict[str, Any]] = {}
    seconds: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as directory:
        shape = SHAPES[args.shape]
        write_checkpoint(Path(directory), shape, args.max_len, args.dtype, args.weights)
        groups = [[v] for v in variants] if args.alone else [variants]
        for number, group in itertools.product(range(args.starts), groups):
            print(f"start {number + 1} of {args.starts}: {', '.join(group)}", file=sys.stderr)
            workers = [Worker(variant, args, Path(directory)) for variant in group]
            for metric, by_variant in measure(workers, args).items():
                for variant, values in by_variant.items():
                    seconds.setdefault(metric, {}).setdefault(variant, []).extend(values)
            for worker in workers:
                facts[worker.variant] = {**worker.facts, "counts": worker.ask("counts")}
                device = worker.ask("device")
                worker.stop()
    where = (
        f"{args.shape}: {SHAPES[args.shape]}, {args.dtype}, {device}, "
        f"{torch.get_num_threads()} threads, {platform.processor() or platform.machine()}, "
        f"torch {torch.__version__}, vllm {vllm.__version__}, {time.strftime('%Y-%m-%d')}\n"
        f"command: python scripts/bench_serving.py {' '.join(sys.argv[1:])}\n"
    )
    print(where)
    print(report(seconds, facts, args))
    if args.json:
        result = {
            "where": where,
            "arguments": {k: str(v) for k, v in vars(args).items()},
            "seconds": seconds,
            "facts": facts,
        }
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
