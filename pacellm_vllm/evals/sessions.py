"""Needles in text that a session's requests have brought, asked about when it is gone."""

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tqdm import tqdm

from pacellm_vllm.evals.answers import Offline
from pacellm_vllm.evals.niah import (
    Grid,
    Item,
    Needle,
    draw_needles,
    haystack,
    item_id,
    rendered_message,
    result,
)
from pacellm_vllm.evals.records import EvalError, Records
from pacellm_vllm.sessions.store import PAGE_TOKENS

# The question alone; behind as much of the text as the window holds; in the text's session.
ARMS = ("alone", "window", "session")


@dataclass(frozen=True)
class Told:
    """A text of ``length`` tokens with one needle at each depth."""

    length: int
    sample: int
    needles: tuple[Needle, ...]
    text: list[int]

    def id(self, depth: float) -> str:
        return item_id(self.length, depth, self.sample)


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
    )


@dataclass(frozen=True)
class Asked:
    """How prompts are written: as they are, or with ``chat`` as a user's message."""

    tokenizer: Any
    chat: bool

    def prompt(self, text: Sequence[int], question: str = "") -> list[int]:
        """The tokens of ``text``, then the question if any, begun as the tokenizer begins them."""
        if self.chat:
            said = self.tokenizer.decode(text, skip_special_tokens=True).strip()
            return rendered_message(self.tokenizer, "\n\n".join(filter(None, (said, question))))
        asked = list(self.tokenizer(question, add_special_tokens=False).input_ids)
        return [*self._begin, *text, *asked]

    def within(self, room: int, text: Sequence[int], questions: Sequence[str]) -> list[list[int]]:
        """Each question behind as much of the end of ``text`` as fits ``room`` tokens with any.

        ``EvalError`` if none does.
        """
        kept = room - max(len(self.prompt((), question)) for question in questions)
        while kept > 0:
            prompts = [self.prompt(text[-kept:], question) for question in questions]
            # Written as a message, a text may take a few tokens more.
            over = max(map(len, prompts)) - room
            if over <= 0:
                return prompts
            kept -= over
        raise EvalError(
            f"pacellm: this engine has room for {room} tokens beside an answer, which is no text "
            "beside a question; raise max_model_len in --engine."
        )

    @cached_property
    def _begin(self) -> list[int]:
        with_all, alone = (
            list(self.tokenizer("a", add_special_tokens=special).input_ids)
            for special in (True, False)
        )
        return with_all[: with_all.index(alone[0])]


def tokens_kept(length: int, piece: int, around: int) -> int:
    """The ``session_tokens`` that hold a text of ``length`` tokens fed in requests of ``piece``.

    A request leaves whole pages, however full, of its piece, of the ``around`` tokens that stand
    about it, and of the one that it answered. Written as a message, a piece may take more.
    """
    pages = math.ceil((piece + piece // 8 + around + 1) / PAGE_TOKENS)
    return math.ceil(length / piece) * pages * PAGE_TOKENS


def encoded(tokenizer: Any, sentence: str) -> list[int]:
    """A sentence inside of a text."""
    return list(tokenizer(f" {sentence}", add_special_tokens=False).input_ids)


def run_sessions(
    grid: Grid,
    tokenizer: Any,
    answerer: Offline,
    records: Records,
    piece: int,
    progress: bool,
) -> None:
    """Ask what ``records`` lacks, a text at a time, fed in requests of ``piece`` tokens."""
    asked = Asked(tokenizer, grid.chat)
    with tqdm(total=len(grid.lengths) * grid.samples, desc="texts", disable=not progress) as bar:
        for length in grid.lengths:
            for sample in range(grid.samples):
                ids = [(arm, item_id(length, d, sample)) for arm in ARMS for d in grid.depths]
                if not all(each in records.done for each in ids):
                    told = make_text(grid, tokenizer, length, sample)
                    _ask(grid, told, asked, answerer, records, piece)
                bar.update()


def _ask(
    grid: Grid, told: Told, asked: Asked, answerer: Offline, records: Records, piece: int
) -> None:
    room = answerer.max_model_len - grid.max_tokens
    pieces = [asked.prompt(told.text[i : i + piece]) for i in range(0, len(told.text), piece)]
    if max(map(len, pieces)) >= answerer.max_model_len:
        raise EvalError(
            f"pacellm: this engine has room for {answerer.max_model_len} tokens, which is less "
            f"than a --piece of {piece} takes; raise max_model_len in --engine, or feed smaller "
            "pieces."
        )
    windows = asked.within(room, told.text, [needle.question for needle in told.needles])
    name = f"{grid.seed}/{told.length}/{told.sample}"
    for arm in ARMS:
        missing = [d for d in grid.depths if (arm, told.id(d)) not in records.done]
        if not missing:
            continue
        begun = time.perf_counter()
        extra = None
        if arm == "session":
            extra = {"pacellm_session": name, "pacellm_session_write": False}
            writing = {"pacellm_session": name, "pacellm_session_read": "never"}
            for part in pieces:
                answerer.answer([part], 1, extra_args=writing)
        fed = time.perf_counter() - begun
        for depth, needle, window in zip(grid.depths, told.needles, windows, strict=True):
            if depth not in missing:
                continue
            begun = time.perf_counter()
            alone = asked.prompt((), needle.question)
            prompt = window if arm == "window" else alone
            item = Item(told.length, depth, told.sample, needle.answer, prompt)
            [output] = answerer.answer([item.prompt], grid.max_tokens, extra_args=extra)
            records.add(
                result(arm, item, output)
                | {
                    "fed_seconds": round(fed, 2),
                    "seconds": round(time.perf_counter() - begun, 3),
                    "tokens": output.prompt_tokens,
                }
            )
