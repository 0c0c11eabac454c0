"""Paired bootstrap: how sure a difference between two configurations on the same items is."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True)
class Difference:
    """Mean of ``b - a`` over ``items`` items, and its 95 % interval (percentile bootstrap)."""

    mean: float
    low: float
    high: float
    items: int

    @property
    def better(self) -> bool:
        return self.low > 0

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def paired_difference(a: Sequence[float], b: Sequence[float], seed: int = 0) -> Difference:
    """Compare two configurations whose scores ``a`` and ``b`` are of the same items, in order.

    Items are resampled with replacement, both scores of an item together. Raises ``ValueError``
    for no items or different counts.
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(f"paired scores of the same items are needed, got {len(a)} and {len(b)}")
    differences = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    n = len(differences)
    rng = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    # A few rows at a time: all at once would be RESAMPLES x n numbers.
    rows = max(1, 1_000_000 // n)
    for begin in range(0, RESAMPLES, rows):
        count = min(rows, RESAMPLES - begin)
        means[begin : begin + count] = differences[rng.integers(0, n, (count, n))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Difference(float(differences.mean()), float(low), float(high), n)
