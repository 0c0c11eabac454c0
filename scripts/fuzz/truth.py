"""Truth: what the oracle says of a sequence that an engine has read and written."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from oracle import OracleModel

# How far from a tie every decision must lie for two implementations to take it alike.
GAP = 1e-6


@dataclass(frozen=True)
class Reading:
    """Of a sequence of T tokens.

    ``chosen`` [T - 1] is the log-probability of each token after the first, ``best`` [T - 1] that
    of the likeliest token in its place. From token ``sure`` on nothing is certain: a decision of
    the memory came too close to a tie.
    """

    chosen: list[float]
    best: list[float]
    sure: int


class Truth(OracleModel):
    """The oracle, reading sequences that are known already."""

    def __init__(self, path: Any, pace: dict[str, Any]) -> None:
        super().__init__(path, pace)
        self._known: dict[Any, Reading] = {}

    def read(self, text: Sequence[int], **overrides: Any) -> Reading:
        """What follows from an empty memory."""
        key = (*text, *sorted(overrides.items()))
        if key not in self._known:
            self._known[key] = self._read(list(text), overrides)
        return self._known[key]

    def _read(self, text: list[int], overrides: dict[str, Any]) -> Reading:
        self._reset(overrides)
        size = self.rules.segment_size
        logits, sure = [], None
        for begin in range(0, len(text), size):
            logits.append(self._feed(text[begin : begin + size]))
            closest = min((bank.closest_call for bank in self.banks.values()), default=1.0)
            if sure is None and closest <= GAP:
                sure = begin
        logprobs = torch.cat(logits)[:-1].log_softmax(dim=-1)
        chosen = logprobs.gather(1, torch.tensor(text[1:])[:, None])[:, 0].tolist()
        best = logprobs.max(dim=-1).values.tolist()
        return Reading(chosen, best, len(text) if sure is None else sure)
