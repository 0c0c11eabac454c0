"""Needles in text that a session's requests have brought, asked about when it is gone."""

import random
import time
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from pacellm_vllm.evals.answers import Offline
from pacellm_vllm.evals.niah import Grid, Item, Needle, draw_needles, haystack, prompt_of, result
from pacellm_vllm.evals.records import EvalError, Records

# The question alone; behind as much of the text as the window holds; in the text's session.
ARMS = ("alone", "window", "session")


@dataclass(frozen=True)
class Told:
    """A text of ``length`` tokens with one needle at each depth, and the questions' tokens."""

    length: int
    sample: int
    needles: tuple[Needle, ...]
    text: list[int]
    questions: tuple[list[int], ...]

    def id(self, depth: float) -> str:
        return f"{self.length}/{depth:g}/{self.sample}"


def make_text(grid: Grid, tokenizer: Any, length: int, sample: int) -> Told:
    """The text depends on the grid's seed and its own place only."""
    rng = random.Random(f"{grid.seed}/{length}/session/{sample}")
    needles = draw_needles(rng, grid, len(grid.depths))
    source = haystack(rng, grid)
    room = length - sum(len(encoded(tokenizer, each.needle)) for each in needles)
    hay: list[list[int]] = []
    while room > 0:
        hay.append(encoded(tokenizer, next(source)))
        room -= len(hay[-1])
    places = [round(depth / 100 * len(hay)) for depth in grid.depths]
    for place, needle in sorted(zip(places, needles, strict=True), key=lambda at: -at[0]):
        hay.insert(place, encoded(tokenizer, needle.needle))
    return Told(
        length,
        sample,
        tuple(needles),
        [token for sentence in hay for token in sentence],
        tuple(prompt_of(grid, tokenizer, each.question) for each in needles),
    )


def encoded(tokenizer: Any, sentence: str) -> list[int]:
    """A sentence inside of a text."""
    return list(tokenizer(f" {sentence}", add_special_tokens=False).input_ids)


def run_sessions(
    grid: Grid,
    tokenizer: Any,
    answerer: Offline,
    records: Records,
    piece: int,
    progress: bool = True,
) -> None:
    """Ask what ``records`` lacks, a text at a time, fed in requests of ``piece`` tokens."""
    with tqdm(total=len(grid.lengths) * grid.samples, desc="texts", disable=not progress) as bar:
        for length in grid.lengths:
            for sample in range(grid.samples):
                ids = [(arm, f"{length}/{d:g}/{sample}") for arm in ARMS for d in grid.depths]
                if not all(each in records.done for each in ids):
                    told = make_text(grid, tokenizer, length, sample)
                    _ask(grid, told, answerer, records, piece)
                bar.update()


def _ask(grid: Grid, told: Told, answerer: Offline, records: Records, piece: int) -> None:
    window = answerer.max_model_len - grid.max_tokens - max(map(len, told.questions))
    if window < 1 or piece >= answerer.max_model_len:
        raise EvalError(
            f"pacellm: this engine has room for {answerer.max_model_len} tokens, which is no text "
            f"beside a question and its answer, or no --piece of {piece}; raise max_model_len in "
            "--engine, or feed smaller pieces."
        )
    name = f"{grid.seed}/{told.length}/{told.sample}"
    for arm in ARMS:
        missing = [d for d in grid.depths if (arm, told.id(d)) not in records.done]
        if not missing:
            continue
        begun = time.perf_counter()
        extra = None
        if arm == "session":
            extra = {"pacellm_session": name, "pacellm_session_write": False}
            pieces = [told.text[i : i + piece] for i in range(0, len(told.text), piece)]
            writing = {"pacellm_session": name, "pacellm_session_read": "never"}
            for part in pieces:
                answerer.answer([part], 1, extra_args=writing)
        fed = time.perf_counter() - begun
        before = told.text[-window:] if arm == "window" else []
        for depth, needle, question in zip(grid.depths, told.needles, told.questions, strict=True):
            if depth not in missing:
                continue
            begun = time.perf_counter()
            item = Item(told.length, depth, told.sample, needle.answer, before + question)
            [output] = answerer.answer([item.prompt], grid.max_tokens, extra_args=extra)
            records.add(
                result(arm, item, output)
                | {
                    "fed_seconds": round(fed, 2),
                    "seconds": round(time.perf_counter() - begun, 3),
                    "tokens": output.prompt_tokens,
                }
            )
