"""Verdict: what is said of one engine."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Verdict:
    """What is said of one engine; ``vllms`` if vLLM alone has these faults too."""

    seed: int
    about: str
    faults: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    features: list[str] = field(default_factory=list)
    seconds: float = 0.0
    vllms: bool = False

    @property
    def failed(self) -> bool:
        return bool(self.faults) and not self.vllms

    @property
    def state(self) -> str:
        return "FAILED" if self.failed else "vLLM's own" if self.faults else "ok"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
