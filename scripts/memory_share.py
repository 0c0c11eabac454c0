"""How much of a running engine's processor time the memory takes, and looking at it, on a CPU.

    OMP_NUM_THREADS=1 python scripts/memory_share.py
    OMP_NUM_THREADS=1 python scripts/memory_share.py --model FOLDER --reports 8

One engine of ``bench_serving.py``'s mid shape with memory in two layers, or a model of yours; the
time inside of the memory layers and of the metadata they share, against the rest of each step.
Unlike a comparison of two engines it does not see how differently two processes run, nor what the
memory does to the rest of a step (caches, one more KV cache group).

With ``--reports``, so many requests ask for a report, and the time is told that notes for it take,
that the engine takes to hand it out and a front end to turn it into JSON, and that one reading of
the metrics takes, all against the requests' own. Each is paired with one that asks for nothing, one
or the other first, and the ratio of the two is told with everything that looking takes in it.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench_serving import SHAPES, make_prompts, memory_layers, raise_norms, write_checkpoint

CHUNK = 512
# Processor seconds by part.
inside: dict[str, float] = defaultdict(float)


@contextmanager
def counted(part: str) -> Iterator[None]:
    begun = time.process_time()
    yield
    inside[part] += time.process_time() - begun


def watch(owner: type, name: str, part: str) -> None:
    """Count the processor time in one method."""
    method: Callable[..., Any] = getattr(owner, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        with counted(part):
            return method(*args, **kwargs)

    setattr(owner, name, watched)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a checkpoint; the mid shape with random weights without")
    parser.add_argument("--reports", type=int, default=0, help="requests that ask for a report")
    parser.add_argument("--tokens", type=int, default=1000, help="of a prompt that asks for one")
    parser.add_argument("--answer", type=int, default=50, help="tokens of its answer")
    parser.add_argument("--pace", type=json.loads, default={}, help="JSON of memory settings")
    args = parser.parse_args()
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR")
    os.environ.setdefault("PACELLM_CPU_PLATFORM", "1")
    from vllm import LLM

    from pacellm_vllm.memory.backend import BankMetadataBuilder
    from pacellm_vllm.memory.layer import PaceMemory

    settings: dict[str, Any] = {
        "max_model_len": 4096,
        "max_num_batched_tokens": CHUNK,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 2**29,
    }
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(args.model or directory)
        if not args.model:
            settings |= {"dtype": "float32", "load_format": "dummy"}
            write_checkpoint(folder, SHAPES["mid"], 4096, "float32", weights=False)
        config = json.loads((folder / "config.json").read_text())
        pace = {"layers": memory_layers(config["num_hidden_layers"], 2), **args.pace}
        [architecture] = config["architectures"]
        engine = LLM(
            str(folder),
            hf_overrides={"architectures": [f"Pace{architecture}"]},
            additional_config={"pacellm": pace},
            **settings,
        ).llm_engine
    if not args.model:
        raise_norms(engine)
    watch(PaceMemory, "forward", "memory")
    watch(BankMetadataBuilder, "build", "memory")
    if args.reports:
        look(engine, args)
    else:
        step(engine, config["vocab_size"])


def step(engine: Any, vocabulary: int) -> None:
    """Steps of a prompt and of an answer."""
    from vllm import SamplingParams

    def go(what: str, steps: int) -> None:
        inside.clear()
        begun = time.process_time()
        for _ in range(steps):
            engine.step()
        total, memory = time.process_time() - begun, inside["memory"]
        print(
            f"{what}: {1e3 * total / steps:.1f} ms a step, memory {1e3 * memory / steps:.2f} ms, "
            f"{memory / (total - memory):.2%} of the rest"
        )

    for i in range(2):
        params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, detokenize=False)
        prompt = make_prompts(i, 1, 4 * CHUNK, vocabulary)[0]
        engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
        go(f"prefill of {CHUNK} tokens, first segment", 2)
        go(f"prefill of {CHUNK} tokens, second segment", 2)
        go("decode step of 1", 30)
        engine.abort_request([str(i)], internal=False)
        while engine.has_unfinished_requests():
            engine.step()


def look(engine: Any, args: argparse.Namespace) -> None:
    """Requests whose reports are read, and the metrics."""
    from prometheus_client import CollectorRegistry, generate_latest
    from vllm import SamplingParams
    from vllm.v1.engine import UtilityOutput
    from vllm.v1.engine.core_client import InprocClient
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder, UtilityResult

    from pacellm_vllm.memory.journal import Journal
    from pacellm_vllm.memory.layer import PaceMemory
    from pacellm_vllm.memory.manager import POOL_METHOD
    from pacellm_vllm.serving.asking import EngineReport
    from pacellm_vllm.serving.metrics import families
    from pacellm_vllm.serving.report import (
        ANSWER_METHOD,
        EXPERTS_METHOD,
        REPORT_METHOD,
        merge_reports,
    )

    assert isinstance(engine.engine_core, InprocClient)
    core: Any = engine.engine_core.engine_core
    pool_report = getattr(type(core), POOL_METHOD)
    watch(Journal, "note", "notes")
    watch(PaceMemory, "_nearest", "notes")
    encoder, decoder = MsgpackEncoder(), MsgpackDecoder(UtilityOutput)

    def asked(part: str, method: str, *given: Any) -> Any:
        """As through vLLM's sockets, which lie between the two processes of a server."""
        with counted(f"{part}, engine"):
            said = engine.collective_rpc(method, args=given)
            sent = encoder.encode(UtilityOutput(0, result=UtilityResult(said)))
        with counted(f"{part}, front end"):
            return decoder.decode(sent).result.result

    def answer(name: str, seed: int, **asks: Any) -> float:
        """Processor seconds of one request."""
        params = SamplingParams(
            temperature=0,
            max_tokens=args.answer,
            ignore_eos=True,
            detokenize=False,
            extra_args=asks,
        )
        rng = random.Random(seed)
        prompt = [rng.randrange(256) for _ in range(args.tokens)]
        begun = time.process_time()
        engine.add_request(name, {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            engine.step()
        return time.process_time() - begun

    def look_at(name: str) -> dict[str, Any]:
        """Its report and the metrics, to the bytes that a client gets; returns the report."""
        found = merge_reports(asked("report", ANSWER_METHOD, name))
        with counted("report, front end"):
            json.dumps({"id": name, "layers": found}).encode()
        layers = merge_reports(asked("metrics", REPORT_METHOD))
        experts = merge_reports(asked("metrics", EXPERTS_METHOD))
        with counted("metrics, engine"):
            pool = pool_report(core)
        with counted("metrics, front end"):
            registry = CollectorRegistry(auto_describe=False)
            report = EngineReport(0, layers, experts, pool)
            registry.register(_Found(list(families([report], "name"))))
            generate_latest(registry)
        return found

    total, ratios = 0.0, []
    for i in range(args.reports + 1):
        times = {}
        for reports in random.sample((True, False), 2):
            begun = time.process_time()
            if reports:
                total += answer(f"{i}", i, pacellm_report=True)
                found = look_at(f"{i}")
            else:
                answer(f"{i} without", i)
            times[reports] = time.process_time() - begun
        ratios.append(times[True] / times[False])
        if not i:
            # The first ones are slower, in all parts.
            total, ratios = 0.0, []
            inside.clear()
    rest = total - inside["notes"]
    kinds = found[min(found)]["tokens"]
    print(f"{args.reports} requests of {args.tokens} and {args.answer} tokens, {kinds} in the last")
    print(f"a request: {1e3 * rest / args.reports:.0f} ms of processor time, notes aside")
    for part, seconds in sorted(inside.items()):
        print(f"{part}: {1e3 * seconds / args.reports:.2f} ms, {seconds / rest:.3%} of it")
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"with everything to without, paired: x{middle:.4f} ({low:.4f} to {high:.4f})")


class _Found:
    def __init__(self, metrics: list[Any]) -> None:
        self.collect = lambda: metrics


if __name__ == "__main__":
    main()
