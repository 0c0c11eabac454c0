"""Verdict: what is said of one engine."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Verdict:
    """What is said of one engine."""

    seed: int
    about: str
    faults: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    features: list[str] = field(default_factory=list)
    seconds: float = 0.0
    crashed: bool = False

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
