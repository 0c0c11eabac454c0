"""Sample: a request whose answer the oracle knows."""

import random
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from oracle import OracleModel
from transformers import AutoTokenizer

from pacellm_vllm.evals.text import sentences

# A sample is taken when no decision of the memory, and no choice of a token, is closer than this.
GAP, LOGIT_GAP = 1e-6, 1e-3
LONGEST = 700


@dataclass(frozen=True)
class Sample:
    """``tokens`` are what greedy decoding says to ``prompt``, for ``settings`` of the request."""

    prompt: list[int]
    tokens: list[int]
    settings: dict[str, Any]


SETTINGS: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    ({}, {}),
    ({"pacellm_alpha": 0.9}, {"alpha": 0.9}),
    ({"pacellm_enabled": False}, {"layers": ()}),
)


def make_texts(model: Path, count: int, seed: int) -> list[list[int]]:
    """Prompts of up to LONGEST tokens, many of which begin alike."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    rng = random.Random(seed)
    shared = [" ".join(islice(sentences(random.Random(i)), 60)) for i in range(3)]
    texts = []
    for _ in range(count):
        own = " ".join(islice(sentences(rng), rng.randint(1, 12)))
        start = rng.choice(shared)
        ids = tokenizer(start).input_ids[: rng.choice([0, 64, 130, 300, 500])]
        texts.append((ids + tokenizer(own).input_ids)[:LONGEST])
    return texts


def make_samples(model: Path, pace: dict[str, Any], count: int, seed: int) -> list[Sample]:
    """``count`` requests that are clear of ties, with the oracle's answers."""
    oracle = OracleModel(model, pace)
    samples: list[Sample] = []
    for number, prompt in enumerate(make_texts(model, 4 * count, seed)):
        settings, overrides = SETTINGS[number % len(SETTINGS)]
        tokens, clear = _greedy(oracle, prompt, 12 + number % 30, overrides)
        if clear:
            samples.append(Sample(prompt, tokens, settings))
        if len(samples) == count:
            return samples
    raise RuntimeError(f"only {len(samples)} of {count} prompts are clear of ties")


def _greedy(
    oracle: OracleModel, prompt: list[int], count: int, overrides: dict[str, Any]
) -> tuple[list[int], bool]:
    tokens, _ = oracle.generate(prompt, count, **overrides)
    # As one text, for how far the choices were from others.
    logits = oracle.forward(prompt + tokens[:-1], **overrides)[len(prompt) - 1 :]
    best = logits.topk(2, dim=-1).values
    margin = (best[:, 0] - best[:, 1]).min().item()
    closest = min((bank.closest_call for bank in oracle.banks.values()), default=1.0)
    return tokens, margin > LOGIT_GAP and closest > GAP
