"""PaceLLM's published memory, restated: the truth for "forwards of exactly S tokens".

A second implementation, apart from `oracle.py`, after the official code's column in the paper
notes: the whole forward is looked up first, then stored. Where the oracle follows one token at a
time, this one works with masks and matrices, so that the two are unlikely to share a mistake.

Shapes: S tokens, D activation size, M slots, A slots in use.
"""

import torch
from torch import Tensor

TOP_K = 5
BOTTOM_K = 2
NOISE = 0.1
FUSION = 0.2
REUSE_HIGH, REUSE_MID = 1.0, 0.5
MOMENTUM = 0.5


class PublishedBank:
    """The published bank with its published numbers.

    Attributes:
        keys, values: [M, D].
        usage: [M].
        valid: [M] bool, slots in use.
    """

    def __init__(
        self, bank_size: int, dim: int, theta_high: float = 0.75, theta_low: float = 0.25
    ) -> None:
        self.theta_high, self.theta_low = theta_high, theta_low
        self.keys = torch.zeros(bank_size, dim)
        self.values = torch.zeros(bank_size, dim)
        self.usage = torch.zeros(bank_size)
        self.valid = torch.zeros(bank_size, dtype=torch.bool)

    def step(self, a: Tensor) -> Tensor:
        """One forward: a [S, D] -> o [S, D]; the bank changes afterwards."""
        sim = torch.cosine_similarity(a[:, None], self.keys[self.valid][None], dim=-1)
        o = self._look_up(a, sim)
        self._store(a, o, sim)
        return o

    def _look_up(self, a: Tensor, sim: Tensor) -> Tensor:
        """a [S, D], sim [S, A] -> o [S, D]."""
        if sim.shape[1] == 0:
            return a
        values = self.values[self.valid]
        nearest = _membership(sim, TOP_K, largest=True)
        farthest = _membership(sim, BOTTOM_K, largest=False)
        positive = nearest @ values / nearest.sum(dim=1, keepdim=True)
        negative = farthest @ values / farthest.sum(dim=1, keepdim=True)
        best = sim.amax(dim=1, keepdim=True)
        recalled = torch.where(
            best > self.theta_high,
            REUSE_HIGH * positive + NOISE * negative,
            torch.where(best > self.theta_low, REUSE_MID * positive + NOISE * negative, a),
        )
        return (1 - FUSION) * a + FUSION * recalled

    def _store(self, a: Tensor, o: Tensor, sim: Tensor) -> None:
        """a, o [S, D], sim [S, A]: merge the middling tokens, then place the novel ones."""
        in_use = self.valid.nonzero()[:, 0]
        novel = torch.ones(len(a), dtype=torch.bool)
        if len(in_use):
            nearest = _membership(sim, TOP_K, largest=True)
            closeness = (sim * nearest).sum(dim=1) / nearest.sum(dim=1)
            novel = closeness <= self.theta_low
            middling = ~novel & (closeness <= self.theta_high)
            touched = in_use[nearest[middling].any(dim=0)]
            if len(touched):
                self.keys[touched] = torch.lerp(
                    a[middling].mean(dim=0), self.keys[touched], MOMENTUM
                )
                self.values[touched] = torch.lerp(
                    o[middling].mean(dim=0), self.values[touched], MOMENTUM
                )
                self.usage[touched] += 1
        # Free slots first, in order, then the least used.
        order = sorted(
            range(len(self.valid)),
            key=lambda slot: (bool(self.valid[slot]), float(self.usage[slot]), slot),
        )
        sources = novel.nonzero()[:, 0][: len(order)]
        slots = torch.tensor(order[: len(sources)], dtype=torch.long)
        self.keys[slots] = a[sources]
        self.values[slots] = o[sources]
        self.usage[slots] = 1
        self.valid[slots] = True


def _membership(sim: Tensor, k: int, largest: bool) -> Tensor:
    """sim [S, A] -> [S, A] of 0 and 1: the k extreme slots of each token, or all if A < k."""
    k = min(k, sim.shape[1])
    ranked = torch.sort(sim, dim=1, descending=largest, stable=True).indices[:, :k]
    return torch.zeros_like(sim).scatter_(1, ranked, 1.0)
