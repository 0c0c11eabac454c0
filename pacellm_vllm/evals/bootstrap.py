"""Paired bootstrap: how sure a difference between two configurations on the same items is."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap

RESAMPLES = 10_000

# Fewer items have intervals that are too narrow: of one item it is a point.
FEWEST = 10
# How much lower an interval may reach for "no worse": 0.6 points of 100.
NO_WORSE = -0.006


def warned(count: int, what: str) -> str:
    """What to say behind the intervals of a table over ``count`` of ``what``, if anything."""
    if count >= FEWEST:
        return ""
    return f" Intervals of fewer than {FEWEST} {what} tend to be too narrow."


@dataclass(frozen=True)
class Difference:
    """Mean of ``b - a`` over ``items`` items, and its 95 % interval (percentile bootstrap)."""

    mean: float
    low: float
    high: float
    items: int

    @property
    def better(self) -> bool:
        return self.low > 0 and self.items >= FEWEST

    @property
    def verdict(self) -> str:
        """What the interval allows to say, for scores from 0 to 1."""
        if self.mean == self.low == self.high == 0:
            return "equal on every item"
        if self.items < FEWEST:
            return "too few items"
        if self.better:
            return "better"
        if self.high < 0:
            return "worse"
        return "no worse" if self.low > NO_WORSE else "not told apart"

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def paired_difference(a: Sequence[float], b: Sequence[float], seed: int = 0) -> Difference:
    """Compare two configurations whose scores ``a`` and ``b`` are of the same items, in order.

    Items are resampled with replacement, both scores of an item together. Raises ``ValueError``
    for no items or different counts.
    """
    return grouped_difference([(a, b)], seed=seed)


def grouped_difference(
    pairs: Sequence[tuple[Sequence[float], Sequence[float]]], by_size: bool = False, seed: int = 0
) -> Difference:
    """``paired_difference`` of several tasks: the mean of their means, or of all their items.

    Each task's items are resampled among themselves; where a task has fewer than ``FEWEST``, all
    items together, which is as wide or wider.
    """
    total = sum(len(a) for a, _ in pairs)
    rng = np.random.default_rng(seed)
    # What an item adds to the mean of its task's resamples.
    parts = []
    for a, b in pairs:
        if len(a) != len(b) or not len(a):
            raise ValueError(
                f"paired scores of the same items are needed, got {len(a)} and {len(b)}"
            )
        share = len(a) / total if by_size else 1 / len(pairs)
        parts.append(share * (np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)))
    mean = sum(float(part.mean()) for part in parts)
    if min(map(len, parts)) < FEWEST:
        parts = [np.concatenate([part * (total / len(part)) for part in parts])]
    means = sum(_resampled_means(part, rng) for part in parts)
    low, high = np.quantile(means, [0.025, 0.975])
    return Difference(mean, float(low), float(high), total)


def _resampled_means(differences: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    n = len(differences)
    # Of one item scipy makes no distribution.
    if n == 1:
        return np.full(RESAMPLES, differences[0])
    # A few resamples at a time: all at once would be RESAMPLES x n numbers.
    batch = max(1, 1_000_000 // n)
    found = bootstrap(
        (differences,), np.mean, n_resamples=RESAMPLES, batch=batch, method="percentile", rng=rng
    )
    return found.bootstrap_distribution
