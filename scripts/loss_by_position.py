"""Loss by position in a text, with and without memory, on the same texts.

    python scripts/loss_by_position.py MODEL OUT.png [--tokens 3584] [--texts 8] [--memory JSON]

Reads the built-in haystack and prints mean loss (nats per token) in doubling ranges of positions,
and the differences to off with paired bootstrap 95 % intervals over texts.
"""

import argparse
import itertools
import json
import os
import random
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("PACELLM_CPU_PLATFORM", "1")

from transformers import AutoTokenizer

from pacellm_vllm.evals.answers import offline_engine
from pacellm_vllm.evals.bootstrap import paired_difference
from pacellm_vllm.evals.plots import curves
from pacellm_vllm.evals.settings import parse_settings
from pacellm_vllm.evals.text import sentences

ENGINE = {"dtype": "float32", "block_size": 16, "kv_cache_memory_bytes": 128 << 20}


def losses(llm: object, texts: list[list[int]]) -> list[list[float]]:
    """Loss of every token after the first of each text."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": text} for text in texts], params, use_tqdm=False)
    return [
        [
            -entry[token].logprob
            for entry, token in zip(o.prompt_logprobs[1:], o.prompt_token_ids[1:], strict=True)
        ]
        for o in outputs
    ]


def main(args: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = []
    for seed in range(args.texts):
        source = sentences(random.Random(seed))
        words = " ".join(next(source) for _ in range(args.tokens // 8))
        texts.append(tokenizer(words).input_ids[: args.tokens])
    edges = [0]
    while edges[-1] < args.tokens:
        edges.append(min(max(64, 2 * edges[-1]), args.tokens))
    ranges = list(itertools.pairwise(edges))
    means: dict[str, list[list[float]]] = {}
    for setting in parse_settings(args.configs, json.loads(args.memory)):
        engine = {**ENGINE, "max_model_len": args.tokens + 1}
        with offline_engine(args.model, setting.memory, engine) as llm:
            by_text = losses(llm, texts)
        means[setting.name] = [
            [sum(loss[a:b]) / len(loss[a:b]) for loss in by_text] for a, b in ranges
        ]
    first = next(iter(means))
    print("| positions | " + " | ".join(means) + " |\n" + "|---" * (len(means) + 1) + "|")
    for i, (a, b) in enumerate(ranges):
        cells = [f"{sum(means[first][i]) / args.texts:.3f}"]
        cells += [str(paired_difference(means[first][i], means[n][i])) for n in [*means][1:]]
        print(f"| {a} to {b} | " + " | ".join(cells) + " |")
    lines = {
        name: ([b for _, b in ranges], [sum(m) / args.texts for m in by_range])
        for name, by_range in means.items()
    }
    curves(args.out, lines, "up to position (tokens)", "loss (nats per token)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=3584)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--configs", default="off,official,paper")
    parser.add_argument("--memory", default='{"segment_size": 64}')
    main(parser.parse_args())
