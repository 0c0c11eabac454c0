"""Finder: which pages of a session a request's words are about."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import HashingVectorizer

from pacellm_vllm.sessions.words import WORD

# Okapi BM25, as measured in docs/recall.md.
_K1, _B = 1.5, 0.75
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


class Counts:
    """How often words, by their hashes, are in texts: of ``rows`` [texts, all hashes].

    Columns are kept for the words that there are, not for all 2^20 hashes.
    """

    def __init__(self, rows: sparse.csr_matrix) -> None:
        self._words, columns = np.unique(rows.indices, return_inverse=True)
        shape = (rows.shape[0], len(self._words))
        self._counts = sparse.csr_matrix((rows.data, columns, rows.indptr), shape).tocsc()
        self.lengths = np.asarray(self._counts.sum(1)).ravel()

    def of(self, words: np.ndarray) -> np.ndarray:
        """[texts, len(words)]"""
        counts = np.zeros((len(self.lengths), len(words)))
        known = np.isin(words, self._words)
        columns = np.searchsorted(self._words, words[known])
        counts[:, known] = self._counts[:, columns].toarray()
        return counts


class Finder:
    """Counts of words by page, and BM25 over them. Pages are numbered by the caller."""

    def __init__(self) -> None:
        # Words are told apart by their hashes, so there is no vocabulary to keep.
        self._count = HashingVectorizer(token_pattern=WORD.pattern, norm=None, alternate_sign=False)
        self._rows: dict[int, sparse.csr_matrix] = {}
        self._all: Counts | None = None
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

    def counted(self, texts: Sequence[str]) -> Counts:
        """Texts that are no pages, for :meth:`best_of`."""
        return Counts(self._count.transform(texts))

    def best_of(self, texts: Counts, query: str) -> float:
        """The best score that one of ``texts``, which are no pages, has for ``query``."""
        words = self._words(query)
        return float(self._scores(texts, words)[0].max()) if len(words) else 0.0

    def _words(self, query: str) -> np.ndarray:
        return np.unique(self._count.transform([query]).indices)

    def _pages(self) -> Counts:
        if self._all is None:
            self._all = Counts(sparse.vstack(list(self._rows.values()), format="csr"))
            # The page of a mean word: texts end in pages of a word or two.
            lengths = self._all.lengths
            self._usual_length = max((lengths**2).sum() / max(lengths.sum(), 1), 1)
        return self._all

    def _scores(self, texts: Counts, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """BM25 [n] of ``texts``, and how rare each of ``words`` is among the pages."""
        having = (self._pages().of(words) > 0).sum(0)
        rarity = np.log1p((len(self._rows) - having + 0.5) / (having + 0.5))
        counts = texts.of(words)
        norm = _K1 * (1 - _B + _B * texts.lengths / self._usual_length)
        return (rarity * counts * (_K1 + 1) / (counts + norm[:, None])).sum(1), rarity


def queries(text: str) -> tuple[list[str], str]:
    """What ``text`` may ask, its last sentences that have a few words, and what it says before."""
    parts = _SENTENCE_END.split(text)
    worded = [i for i, part in enumerate(parts) if len(WORD.findall(part)) >= _SENTENCE_WORDS]
    asked = worded[-_SENTENCES_ASKED:]
    return ([parts[i] for i in asked], " ".join(parts[: asked[0]])) if asked else ([text], "")
