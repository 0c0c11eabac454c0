"""MemoryRules: every number Enhance and Update depend on."""

from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Literal

import numpy as np


class UpdateRule(Enum):
    """Which published update is followed where the paper and its code differ."""

    OFFICIAL = "official"
    PAPER = "paper"


@dataclass(frozen=True)
class MemoryRules:
    """Sizes in slots or tokens, similarities as cosines, weights without unit.

    ``mid_self_weight`` is the share of the token's own activation in the mid regime: 0.5 in the
    paper (Algorithm 1), 0 in the published code. The memory's share there is 0.5 in both. With
    ``clip`` a slot whose key is longer than the token is shortened to the token's length when it is
    blended in.
    """

    bank_size: int
    segment_size: int
    max_insertions: int
    top_k: int
    negative_k: int
    theta_high: float
    theta_low: float
    noise: float
    alpha: float
    momentum: float
    mid_self_weight: float
    update: UpdateRule
    clip: bool

    high_weight = 1.0
    mid_weight = 0.5

    @cached_property
    def thresholds(self) -> tuple[float, float]:
        """``theta_low`` and ``theta_high`` as in float32, which is how tensors are compared."""
        return float(np.float32(self.theta_low)), float(np.float32(self.theta_high))

    def kind(self, similarity: float) -> Literal["high", "mid", "low"] | None:
        """Of a token with this ``similarity``, as ``LookUp`` decides; None of NaN."""
        theta_low, theta_high = self.thresholds
        if similarity > theta_high:
            return "high"
        if similarity > theta_low:
            return "mid"
        return "low" if similarity <= theta_low else None
