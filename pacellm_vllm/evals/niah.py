"""Needle in a haystack: a grid of context lengths and depths, on the same items for everyone."""

import hashlib
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pacellm_vllm.evals.answers import STOP, Answer, Answerer
from pacellm_vllm.evals.matching import has_words, words
from pacellm_vllm.evals.prompts import rendered_chat
from pacellm_vllm.evals.records import EvalError, Records
from pacellm_vllm.evals.rouge import rouge_l_recall
from pacellm_vllm.evals.text import KEYS, NEEDLE, QUESTION, sentences

_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")


@dataclass(frozen=True)
class Needle:
    """A sentence to hide, the question that asks for it, and the answer expected."""

    needle: str
    question: str
    answer: str


@dataclass(frozen=True)
class Grid:
    """What is asked: ``samples`` items for every length (tokens) and depth (percent)."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int = 5
    needles: int = 1
    digits: int = 7
    seed: int = 0
    chat: bool = False
    max_tokens: int = 16
    haystack: tuple[Path, ...] = ()
    needle_file: Path | None = None

    @property
    def num_items(self) -> int:
        return len(self.lengths) * len(self.depths) * self.samples

    @cached_property
    def given_needles(self) -> list[Needle] | None:
        """Those of ``needle_file``; ``EvalError`` if it holds something else."""
        return None if self.needle_file is None else _read_needles(self.needle_file)

    def describe(self) -> dict[str, Any]:
        """The grid as JSON, files by name and the sha256 of what is in them."""
        return {
            "lengths": list(self.lengths),
            "depths": list(self.depths),
            "samples": self.samples,
            "needles": self.needles,
            "digits": self.digits,
            "seed": self.seed,
            "chat": self.chat,
            "max_tokens": self.max_tokens,
            "haystack": [_fingerprint(path) for path in self.haystack],
            "needle_file": _fingerprint(self.needle_file) if self.needle_file else None,
        }


def item_id(length: int, depth: float, sample: int) -> str:
    """How the records name the item at this place of a grid."""
    return f"{length}/{depth:g}/{sample}"


@dataclass(frozen=True)
class Item:
    """One prompt of the grid as token ids."""

    length: int
    depth: float
    sample: int
    answer: str
    prompt: list[int] = field(repr=False)

    @property
    def id(self) -> str:
        return item_id(self.length, self.depth, self.sample)


def make_items(grid: Grid, tokenizer: Any) -> Iterator[Item]:
    """Items in grid order; each depends on the grid's seed and its own place only.

    The prompt holds at most ``length`` tokens, question and chat template included, and as many
    whole sentences as fit. The needle asked for is at ``depth`` percent of the sentences, the
    other ones (``needles - 1``) at random places. Raises ``EvalError`` for a length too short.
    """
    for length in grid.lengths:
        for depth in grid.depths:
            for sample in range(grid.samples):
                rng = random.Random(f"{grid.seed}/{item_id(length, depth, sample)}")
                hidden = draw_needles(rng, grid, grid.needles)
                prompt = _fit(rng, grid, tokenizer, hidden, length, depth)
                yield Item(length, depth, sample, hidden[0].answer, prompt)


def run_grid(
    grid: Grid,
    tokenizer: Any,
    name: str,
    answerer: Answerer,
    records: Records,
    batch: int,
    progress: bool,
) -> None:
    """Answer what ``records`` lacks of configuration ``name``, ``batch`` prompts at a time."""
    with tqdm(total=grid.num_items, desc=name, disable=not progress, unit="item") as bar:
        waiting: list[Item] = []

        def ask() -> None:
            if not waiting:
                return
            outputs = answerer.answer([item.prompt for item in waiting], grid.max_tokens)
            for item, output in zip(waiting, outputs, strict=True):
                tokens = len(item.prompt)
                records.add({**result(name, item, output), "tokens": tokens})
                bar.update()
            waiting.clear()

        for item in make_items(grid, tokenizer):
            if (name, item.id) in records.done:
                bar.update()
                continue
            waiting.append(item)
            if len(waiting) == batch:
                ask()
        ask()


def result(config: str, item: Item, output: Answer) -> dict[str, Any]:
    """A line of the records."""
    return {
        "config": config,
        "id": item.id,
        "length": item.length,
        "depth": item.depth,
        "sample": item.sample,
        "answer": item.answer,
        "output": output.text,
        "ended": output.ended,
        "exact": exact_match(item.answer, output.text),
        "rouge_l": rouge_l_recall(item.answer, output.text),
    }


def exact_match(answer: str, output: str) -> float:
    """1 when the answer's words stand together in the output, whatever the case, else 0."""
    return float(has_words(output, answer))


def _fingerprint(path: Path) -> str:
    try:
        return f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
    except OSError as error:
        raise EvalError(f"pacellm: {path} cannot be read ({error.strerror}).") from None


def draw_needles(rng: random.Random, grid: Grid, count: int) -> list[Needle]:
    """``count`` of the grid's needles, each with another key."""
    given = grid.given_needles
    if given is not None:
        if len(given) < count:
            raise EvalError(
                f"pacellm: {count} needles are more than {grid.needle_file} has "
                f"({len(given)}); add needles or ask for fewer."
            )
        return rng.sample(given, count)
    question = "What is the magic number of {key}?" if grid.chat else QUESTION
    drawn = []
    for key in rng.sample(KEYS, count):
        value = rng.randrange(10 ** (grid.digits - 1), 10**grid.digits)
        drawn.append(
            Needle(NEEDLE.format(key=key, value=value), question.format(key=key), str(value))
        )
    return drawn


def _fit(
    rng: random.Random,
    grid: Grid,
    tokenizer: Any,
    hidden: Sequence[Needle],
    length: int,
    depth: float,
) -> list[int]:
    source = haystack(rng, grid)
    others = [rng.random() for _ in hidden[1:]]
    hay: list[str] = []
    low, high = 0, None
    # Sentences until one more would not fit; doubling, then halving the step.
    while high is None or high - low > 1:
        count = max(1, 2 * low) if high is None else (low + high) // 2
        while len(hay) < count:
            hay.append(next(source))
        prompt = _prompt(grid, tokenizer, hay[:count], hidden, depth, others)
        if len(prompt) <= length:
            low = count
        else:
            high = count
    prompt = _prompt(grid, tokenizer, hay[:low], hidden, depth, others)
    if len(prompt) > length:
        raise EvalError(
            f"pacellm: --lengths {length} is too short: the needles and the question alone take "
            f"{len(prompt)} tokens; raise it or hide fewer needles."
        )
    return prompt


def _prompt(
    grid: Grid,
    tokenizer: Any,
    hay: Sequence[str],
    hidden: Sequence[Needle],
    depth: float,
    others: Sequence[float],
) -> list[int]:
    text = list(hay)
    # Places are of the haystack alone, so the last goes in first.
    places = [depth / 100, *others]
    order = sorted(range(len(hidden)), key=lambda i: places[i], reverse=True)
    for i in order:
        text.insert(round(places[i] * len(hay)), hidden[i].needle)
    joined, question = " ".join(text), hidden[0].question
    return prompt_of(
        grid, tokenizer, f"{joined}\n\n{question}" if grid.chat else f"{joined} {question}"
    )


def prompt_of(grid: Grid, tokenizer: Any, text: str) -> list[int]:
    """``text`` as it is, or as a user's message."""
    if not grid.chat:
        return list(tokenizer(text).input_ids)
    return rendered_message(tokenizer, text)


def rendered_message(tokenizer: Any, text: str) -> list[int]:
    """``text`` as a user's message, in tokens."""
    rendered = rendered_chat(tokenizer, [{"role": "user", "content": text}])
    return list(tokenizer(rendered, add_special_tokens=False).input_ids)


def haystack(rng: random.Random, grid: Grid) -> Iterator[str]:
    """Endless sentences: of the grid's files, or made."""
    return _from_files(rng, grid.haystack) if grid.haystack else sentences(rng)


def _from_files(rng: random.Random, paths: Sequence[Path]) -> Iterator[str]:
    """Sentences of the files from a random one on, round and round."""
    text: list[str] = []
    for path in paths:
        if not path.is_file():
            raise EvalError(f"pacellm: --haystack {str(path)!r} is not a file.")
        text += [part.strip() for part in _SENTENCE.split(path.read_text()) if part.strip()]
    if not text:
        raise EvalError("pacellm: the files of --haystack hold no text.")
    at = rng.randrange(len(text))
    while True:
        yield text[at]
        at = (at + 1) % len(text)


def _read_needles(path: Path) -> list[Needle]:
    try:
        lines = path.read_text().splitlines()
        needles = [Needle(**json.loads(line)) for line in lines if line.strip()]
    except (OSError, ValueError, TypeError):
        raise EvalError(
            f"pacellm: --needle-file {str(path)!r} must hold one JSON object per line, each with "
            "needle, question and answer."
        ) from None
    for needle in needles:
        answer = needle.answer
        if not (isinstance(answer, str) and words(answer)) or any(s in answer for s in STOP):
            raise EvalError(
                f"pacellm: the answer {answer!r} of --needle-file {str(path)!r} cannot be "
                "found in what is said, which ends at the first full stop or line; it must be a "
                "text with a word, and neither."
            )
    return needles


def cell_means(
    results: Mapping[tuple[str, str], Mapping[str, Any]], name: str, grid: Grid, score: str
) -> list[list[float]]:
    """Mean ``score`` of configuration ``name``: rows are depths, columns lengths."""
    cells: dict[tuple[float, int], list[float]] = {}
    for (config, _), result in results.items():
        if config == name:
            cells.setdefault((result["depth"], result["length"]), []).append(result[score])
    return [[sum(cells[d, n]) / len(cells[d, n]) for n in grid.lengths] for d in grid.depths]
