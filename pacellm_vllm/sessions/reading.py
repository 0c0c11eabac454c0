"""SessionReader: what a request reads of its session before it is scheduled."""

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any
from uuid import uuid4

import numpy as np

from pacellm_vllm.request import SessionRead
from pacellm_vllm.sessions.finder import Match, queries
from pacellm_vllm.sessions.store import (
    PAGE_TOKENS,
    Page,
    Session,
    SessionStore,
    head_length,
    passage,
    tail_length,
)

PAGES_READ = 2
MARGIN_TOKENS = 16
# A question looks things up with its last words, at most so many tokens.
ASKING_TOKENS = 64
# Of questions about something else 4 to 10 in 100 are surer (docs/recall.md, "The gate").
SURE = 0.16
# A page is in a prompt where most runs of so many of its tokens, or all of a shorter page, are.
_RUN_TOKENS = 8
_MARKER = re.compile(r"<\S+>|\[\S+\]")
_NOTES = 1000


@dataclass(frozen=True)
class Reading:
    """``tokens`` to be put before position ``place`` of a prompt, and how ``sure`` that was."""

    place: int
    tokens: tuple[int, ...]
    sure: float
    pages: int


class SessionReader:
    """Looks a prompt up in the text of its session. ``tokenizer`` is the model's."""

    def __init__(self, store: SessionStore, tokenizer: Any) -> None:
        self.id = uuid4().hex
        self.store = store
        self._tokenizer = tokenizer
        self._markers = _markers_of(tokenizer)
        self._gap = tuple(tokenizer.encode("\n\n", add_special_tokens=False))
        # By request: what it has read, of the last ones.
        self.notes: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def note(self, request_id: str, reading: Reading) -> None:
        """Keep for reports what a request has read."""
        self.notes[request_id] = {
            "place": reading.place,
            "tokens": len(reading.tokens),
            "pages": reading.pages,
            "sure": round(reading.sure, 4),
        }
        while len(self.notes) > _NOTES:
            self.notes.popitem(last=False)

    def read(self, key: bytes, prompt: Sequence[int], room: int, how: SessionRead) -> Reading:
        """At most ``room`` tokens of the session ``key`` that ``prompt`` asks about."""
        nothing = Reading(0, (), 0.0, 0)
        session = self.store.get(key)
        if session is None or how == "never":
            return nothing
        tokens = np.array(prompt, np.int32)
        place, end = self._own(session, tokens)
        begin = max(place, end - ASKING_TOKENS)
        asked = self._tokenizer.decode(tokens[begin:end].tolist(), skip_special_tokens=True)
        found = self._asked_about(session, asked, tokens, begin, how)
        sure = found[0].sure if found else 0.0
        if how == "auto" and sure <= SURE:
            return Reading(0, (), sure, 0)
        chosen: list[Page] = []
        read: tuple[int, ...] = ()
        for match in found:
            longer = tuple(self._joined([*chosen, session.pages[match.page]]))
            if len(longer) > room:
                break
            chosen.append(session.pages[match.page])
            read = longer
        for page in chosen:
            self.store.touch(page)
        return Reading(place if chosen else 0, read, sure, len(chosen))

    def _asked_about(
        self, session: Session, asked: str, tokens: np.ndarray, own: int, how: SessionRead
    ) -> list[Match]:
        """The best pages that the prompt of ``tokens`` does not have itself.

        Of what ``asked`` may ask it is what is surest of its best page: what else is said around a
        question is not looked up with it. With ``auto`` it is nothing that the prompt's first
        ``own`` tokens, or what is said before it is asked, have as much of.
        """
        runs, finder = cache(partial(_runs, tokens)), session.finder
        ways, before = queries(asked)

        @cache
        def said() -> Any:
            starts = range(0, own, PAGE_TOKENS)
            pages = (tokens[i : min(i + PAGE_TOKENS, own)].tolist() for i in starts)
            texts = (self._tokenizer.decode(page, skip_special_tokens=True) for page in pages)
            return finder.counted([before, *texts])

        best: list[Match] = []
        for query in ways:
            found: list[Match] = []
            for match in finder.find(query):
                if not _is_in(session.pages[match.page], runs):
                    found.append(match)
                if len(found) == PAGES_READ:
                    break
            if not found or (best and found[0].sure <= best[0].sure):
                continue
            gated = how == "auto" and found[0].sure > SURE
            if gated and finder.best_of(said(), query) >= found[0].score:
                continue
            best = found
        return best

    def _own(self, session: Session, tokens: np.ndarray) -> tuple[int, int]:
        """Where in a prompt its own words begin and end.

        Before and behind is what all prompts of the session have in common, a system prompt and
        what a chat template adds, as far as whole lines and special tokens go.
        """
        assert session.head is not None
        assert session.tail is not None
        begin = head_length(session.head, tokens)
        while begin and not self._ends_line(int(tokens[begin - 1])):
            begin -= 1
        end = len(tokens) - tail_length(session.tail, tokens)
        while end < len(tokens) and not self._begins_line(int(tokens[end])):
            end += 1
        return begin, max(begin, end)

    def _ends_line(self, token: int) -> bool:
        return token in self._markers or self._tokenizer.decode([token]).endswith("\n")

    def _begins_line(self, token: int) -> bool:
        return token in self._markers or self._tokenizer.decode([token]).startswith("\n")

    def _joined(self, pages: Sequence[Page]) -> Iterator[int]:
        """``pages`` in the order in which they were read, with what stands around them.

        Markers would end a message where there is none, so they are left out.
        """
        chains: list[list[Page]] = []
        for page in sorted(pages, key=lambda page: page.number):
            if chains and page.parent is chains[-1][-1]:
                chains[-1].append(page)
            else:
                chains.append([page])
        for chain in chains:
            yield from (t for t in passage(chain, MARGIN_TOKENS) if t not in self._markers)
            yield from self._gap


def _markers_of(tokenizer: Any) -> frozenset[int]:
    """Tokens that say where a message, a thought or the call of a tool begins or ends.

    ``all_special_ids`` has only those that the tokenizer has a use for itself, and some
    (``</think>``) are not special at all, but in the chat template. Other tokens that tokenizers
    add, blanks and tags of HTML, are text.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    template = str(getattr(tokenizer, "chat_template", None) or "")
    marked = (
        number
        for number, token in added.items()
        if token.special or (_MARKER.fullmatch(token.content) and token.content in template)
    )
    return frozenset({*tokenizer.all_special_ids, *marked})


def _runs(tokens: np.ndarray, length: int) -> set[bytes]:
    """All runs of ``length`` tokens, the whole where there are fewer."""
    if len(tokens) < length:
        return {tokens.tobytes()}
    windows = np.lib.stride_tricks.sliding_window_view(tokens, length)
    return {window.tobytes() for window in windows}


def _is_in(page: Page, runs: Callable[[int], set[bytes]]) -> bool:
    """Whether most of a page is in the prompt whose ``runs`` of a length are given."""
    assert page.tokens is not None
    length = min(_RUN_TOKENS, len(page.tokens))
    mine = _runs(page.tokens, length)
    return 2 * len(mine & runs(length)) > len(mine)
