"""A model with the items of a task, and what is worked out of one item."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from recall_items import Item, essays, needles, questions
from recall_memory import Reader, Reading, Site, relevance, similarities
from torch import Tensor
from transformers import AutoTokenizer

DEVELOPED = 120  # development items at most
CALIBRATION = 8  # development contexts that a state's mean is taken of
PASSAGES = 10
NEEDLE_TOKENS = 1500
TEXT_PROMPT, TEXT_SCORED, TEXT_ASKED = 256, 128, 32


class Bench:
    """A model, its tokenizer and the items of a task."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.set_num_threads(1)
        self.task: str = getattr(args, "task", "qa")
        self.data: Path = args.data
        self.tokenizer: Any = AutoTokenizer.from_pretrained(args.model)
        self.reader = Reader(args.model)
        self.stop = {
            token for token in range(len(self.tokenizer)) if "\n" in self.tokenizer.decode([token])
        } | {self.tokenizer.eos_token_id}

    def items(self, held_out: bool, count: int) -> list[Item]:
        """The first ``count`` items of the task, of either half."""
        if self.task == "qa":
            return questions(self.tokenizer, self.data, held_out, count, PASSAGES)
        return needles(self.tokenizer, self.data, held_out, count, NEEDLE_TOKENS)

    def site(self, depth: float, kind: str) -> Site:
        """The layer at ``depth`` (0 to 1), and the kind."""
        return int(depth * self.reader.layers), kind

    def decode(self, tokens: Sequence[int]) -> str:
        """What was said, without the token that ended it."""
        return str(self.tokenizer.decode([t for t in tokens if t not in self.stop])).strip()

    def context(self, item: Item) -> tuple[Reading, slice]:
        """Read an item's context behind its head; where its stored states are.

        The first token is the attention's sink and resembles nothing; the last has no next one.
        """
        ids = item.head + item.context
        return self.reader.read(ids), slice(max(1, len(item.head)), len(ids) - 1)

    def means(self, sites: Sequence[Site]) -> dict[Site, Tensor]:
        """Each site's mean over development contexts: it looks at nothing of what is measured."""
        sums: dict[Site, Tensor] = {}
        tokens = 0
        for item in self.items(held_out=False, count=CALIBRATION):
            reading, stored = self.context(item)
            tokens += stored.stop - stored.start
            for site in sites:
                total = reading.states[site][stored].float().sum(0)
                sums[site] = sums[site] + total if site in sums else total
        return {site: total / tokens for site, total in sums.items()}


def places(item: Item) -> Tensor:
    """The passage of each stored token."""
    of = [i for i, passage in enumerate(item.passages) for _ in passage]
    return torch.tensor(of[0 if item.head else 1 : -1])


def following(item: Item) -> Tensor:
    """The token after each stored token."""
    return torch.tensor(item.context[1 if item.head else 2 :])


def target(logprobs: Tensor, answer: Sequence[int]) -> Tensor:
    """Log-probability of each token of ``answer``; row i of ``logprobs`` is what comes at i."""
    return logprobs[: len(answer)].gather(1, torch.tensor(list(answer))[:, None])[:, 0]


def score(query: Tensor, item: Item, keys: Tensor, spread: bool) -> tuple[Tensor, float]:
    """Relevance of each passage, and how alike the query's tokens are to the most relevant."""
    best = similarities(query, keys, places(item), len(item.passages))
    scores = relevance(best, spread)
    return scores, float(best[scores.argmax()].mean())


def text_for_development(bench: Bench) -> list[list[int]]:
    """Texts about nothing that is in the stores of development items, 256 tokens each."""
    if bench.task == "qa":
        source = [token for text in essays(bench.tokenizer, bench.data, False) for token in text]
    else:
        asked = questions(bench.tokenizer, bench.data, False, 2 * DEVELOPED, 2)
        source = [token for item in asked for token in item.part(item.gold)]
    step = (len(source) - 256) // DEVELOPED
    return [source[i * step : i * step + 256] for i in range(DEVELOPED)]


def passages_of_questions(bench: Bench, number: int) -> Item:
    """Passages of Natural Questions as a store for a model that was tuned on needles."""
    return questions(bench.tokenizer, bench.data, True, number + 1, 10)[number]


def unrelated(items: Sequence[Item], chosen: Sequence[int]) -> Item:
    """The first item after the ``chosen`` ones that has none of their passages."""
    words = {text for n in chosen for text in items[n].words}
    return next(item for item in items[chosen[-1] + 1 :] if not words & {*item.words})


def beside(item: Item) -> list[int]:
    """The gold passage and one more: a prompt that has what its question needs."""
    spare = next(i for i in range(len(item.passages)) if i not in item.gold)
    return item.part({*item.gold, spare})


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The results of a file of ``Records``, in order."""
    return [line for line in map(json.loads, path.open()) if "id" in line]
