"""SessionStore: the text of sessions, in pages that the longest unused give way of."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from threading import Lock

import numpy as np

from pacellm_vllm.sessions.finder import Finder

PAGE_TOKENS = 128
# Of what prompts begin and end with, this much is compared.
_HEAD_TOKENS, _TAIL_TOKENS = 4096, 64


@dataclass(eq=False)
class Page:
    """Up to ``PAGE_TOKENS`` token ids behind those of ``parent``; None where they had to go."""

    number: int
    parent: "Page | None"
    digest: bytes
    tokens: np.ndarray | None
    children: dict[bytes, "Page"] = field(default_factory=dict)


@dataclass
class StoreCounts:
    """Of the whole store: sessions, and tokens and pages that they keep; pages that had to go."""

    sessions: int = 0
    pages: int = 0
    tokens: int = 0
    evicted: int = 0


class Session:
    """The texts of one session, which share their beginnings page by page."""

    def __init__(self) -> None:
        self.root = Page(-1, None, b"", np.empty(0, np.int32))
        self.pages: dict[int, Page] = {}
        self.finder = Finder()
        # What all prompts so far begin and end with.
        self.head: np.ndarray | None = None
        self.tail: np.ndarray | None = None

    def learn(self, prompt: np.ndarray) -> None:
        """Take ``prompt`` into what all of them begin and end with."""
        head, tail = prompt[:_HEAD_TOKENS], prompt[-_TAIL_TOKENS:]
        self.head = head[: head_length(head if self.head is None else self.head, head)].copy()
        self.tail = tail if self.tail is None else self.tail
        self.tail = tail[len(tail) - tail_length(self.tail, tail) :].copy()


class SessionStore:
    """Sessions by key, together at most ``max_pages`` pages, full or not.

    Everything is done under ``lock``, which the caller holds: requests are admitted in one thread
    and end in another.
    """

    def __init__(self, max_pages: int, decode: Callable[[Sequence[int]], str]) -> None:
        self.max_pages = max_pages
        self.lock = Lock()
        self._decode = decode
        self._sessions: dict[bytes, Session] = {}
        # The longest unused first.
        self._used: OrderedDict[int, tuple[bytes, Page]] = OrderedDict()
        self._next = 0
        self._tokens = 0
        self._evicted = 0

    def get(self, key: bytes) -> Session | None:
        return self._sessions.get(key)

    def counts(self) -> StoreCounts:
        return StoreCounts(len(self._sessions), len(self._used), self._tokens, self._evicted)

    def as_dict(self) -> dict[str, int]:
        with self.lock:
            return asdict(self.counts())

    def add(self, key: bytes, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """Keep ``prompt`` and ``answer`` as one text of the session ``key``."""
        session = self._sessions.setdefault(key, Session())
        session.learn(np.array(prompt, np.int32))
        tokens = np.array((*prompt, *answer), np.int32)
        page = session.root
        new: dict[int, str] = {}
        try:
            for start in range(0, len(tokens), PAGE_TOKENS):
                page = self._child(key, page, tokens[start : start + PAGE_TOKENS].copy(), new)
        finally:
            session.finder.add(new)
        while len(self._used) > self.max_pages:
            self._evict()

    def touch(self, page: Page) -> None:
        """Let others go first."""
        self._used.move_to_end(page.number)

    def _child(self, key: bytes, parent: Page, tokens: np.ndarray, new: dict[int, str]) -> Page:
        """The page of ``tokens`` behind ``parent``, made, filled again or found.

        The text of one that was not there goes into ``new``.
        """
        session = self._sessions[key]
        digest = hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()
        page = parent.children.get(digest)
        if page is None:
            for other in [*parent.children.values()]:
                # A text that goes on where another one ended.
                if other.tokens is not None and _begins(tokens, other.tokens):
                    self._drop(key, other)
            page = Page(self._next, parent, digest, None)
            self._next += 1
            parent.children[digest] = page
        if page.tokens is None:
            new[page.number] = self._decode(tokens.tolist())
            page.tokens = tokens
            self._tokens += len(tokens)
            session.pages[page.number] = page
        self._used[page.number] = (key, page)
        self._used.move_to_end(page.number)
        return page

    def _evict(self) -> None:
        key, page = next(iter(self._used.values()))
        self._drop(key, page)
        self._evicted += 1
        if not self._sessions[key].pages:
            del self._sessions[key]

    def _drop(self, key: bytes, page: Page) -> None:
        session = self._sessions[key]
        assert page.tokens is not None
        self._tokens -= len(page.tokens)
        page.tokens = None
        del self._used[page.number], session.pages[page.number]
        session.finder.remove(page.number)
        while page.parent is not None and page.tokens is None and not page.children:
            del page.parent.children[page.digest]
            page = page.parent


def passage(pages: Sequence[Page], margin: int) -> list[int]:
    """The tokens of ``pages``, each behind the one before it in a text.

    With ``margin`` more on either side, as far as they are kept.
    """
    before = pages[0].parent.tokens if pages[0].parent else None
    after = [child.tokens for child in pages[-1].children.values() if child.tokens is not None]
    parts = [before if before is None else before[-margin:]]
    parts += [page.tokens for page in pages]
    parts += [tokens[:margin] for tokens in after[-1:]]
    return [int(token) for part in parts if part is not None for token in part]


def _begins(tokens: np.ndarray, other: np.ndarray) -> bool:
    return len(other) < len(tokens) and bool((tokens[: len(other)] == other).all())


def head_length(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens both begin with."""
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length


def tail_length(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens both end with."""
    return head_length(one[::-1], other[::-1])
