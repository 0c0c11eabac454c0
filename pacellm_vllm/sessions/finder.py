"""Finder: which pages of a session a request's words are about."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import HashingVectorizer

# Okapi BM25, as measured in docs/recall.md.
_K1, _B = 1.5, 0.75
# Where words are not set apart, characters are words.
_CHARACTERS = r"\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_CHARACTERS}]|[^\W{_CHARACTERS}]+")
_SENTENCE_END = re.compile(r"(?<=[.!?:\n\u3002\uff01\uff1f\uff1a])\s*")
_SENTENCE_WORDS, _SENTENCES_ASKED = 3, 2


@dataclass(frozen=True)
class Match:
    """A page whose ``score`` (BM25) is above zero, and how ``sure`` it is meant.

    ``sure`` is the score over the geometric mean of the most it could be and of what one word
    weighs that no page has, so that what else is said in a long query counts half; minus 0.12
    log10 of the number of pages (at least 3), as of many pages one resembles any query.
    """

    page: int
    score: float
    sure: float


class Finder:
    """Counts of words by page, and BM25 over them. Pages are numbered by the caller."""

    def __init__(self) -> None:
        # Words are told apart by their hashes, so there is no vocabulary to keep.
        self._count = HashingVectorizer(
            token_pattern=_WORD.pattern, norm=None, alternate_sign=False
        )
        self._rows: dict[int, sparse.csr_matrix] = {}
        self._all: sparse.csc_matrix | None = None
        self._usual_length = 1.0

    def add(self, texts: dict[int, str]) -> None:
        """Pages by number, with their text."""
        if texts:
            counts = self._count.transform(texts.values()).tocsr()
            self._rows.update({page: counts[i] for i, page in enumerate(texts)})
            self._all = None

    def remove(self, page: int) -> None:
        del self._rows[page]
        self._all = None

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, query: str) -> list[Match]:
        """The pages that have words of ``query``, the best first."""
        words = self._words(query)
        if not len(words) or not self._rows:
            return []
        pages = len(self._rows)
        scores, rarity = self._scores(self._pages(), words)
        most = (_K1 + 1) * math.sqrt(rarity.sum() * math.log(2 * pages + 2))
        sure = scores / most - 0.12 * math.log10(max(pages, 3))
        numbers = list(self._rows)
        order = np.argsort(-scores, kind="stable")
        return [Match(numbers[i], float(scores[i]), float(sure[i])) for i in order if scores[i] > 0]

    def counted(self, texts: Sequence[str]) -> sparse.csc_matrix:
        """Texts that are no pages, for :meth:`best_of`."""
        return self._count.transform(texts).tocsc()

    def best_of(self, texts: sparse.csc_matrix, query: str) -> float:
        """The best score that one of ``texts``, which are no pages, has for ``query``."""
        words = self._words(query)
        return float(self._scores(texts, words)[0].max()) if len(words) else 0.0

    def _words(self, query: str) -> np.ndarray:
        return np.unique(self._count.transform([query]).indices)

    def _pages(self) -> sparse.csc_matrix:
        if self._all is None:
            self._all = sparse.vstack(list(self._rows.values()), format="csc")
            # The page of a mean word: texts end in pages of a word or two.
            lengths = np.asarray(self._all.sum(1)).ravel()
            self._usual_length = max((lengths**2).sum() / max(lengths.sum(), 1), 1)
        return self._all

    def _scores(self, texts: sparse.csc_matrix, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """BM25 [n] of ``texts`` [n, words], and how rare each of ``words`` is among the pages."""
        every = self._pages()
        having = (every[:, words].toarray() > 0).sum(0)
        rarity = np.log1p((every.shape[0] - having + 0.5) / (having + 0.5))
        counts = texts[:, words].toarray()
        lengths = np.asarray(texts.sum(1)).ravel()
        norm = _K1 * (1 - _B + _B * lengths / self._usual_length)
        return (rarity * counts * (_K1 + 1) / (counts + norm[:, None])).sum(1), rarity


def queries(text: str) -> tuple[list[str], str]:
    """What ``text`` may ask, its last sentences that have a few words, and what it says before."""
    parts = _SENTENCE_END.split(text)
    worded = [i for i, part in enumerate(parts) if len(_WORD.findall(part)) >= _SENTENCE_WORDS]
    asked = worded[-_SENTENCES_ASKED:]
    return ([parts[i] for i in asked], " ".join(parts[: asked[0]])) if asked else ([text], "")
