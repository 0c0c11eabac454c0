"""Tally: what happened, counted, and whether it is good enough."""

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

# Of the life of a server, what does not count: caches fill, and memory is taken.
WARM_UP_SECONDS = 600.0


@dataclass(frozen=True)
class Growth:
    """Resident memory of one server life, in MB: means of the first and of the last fifth of the
    time after the warm-up, and the slope of a line through all of it."""

    before: float
    after: float
    slope_per_hour: float
    samples: int

    @property
    def grown(self) -> float:
        return self.after - self.before

    @classmethod
    def of(cls, samples: list[tuple[float, float]]) -> "Growth | None":
        """From (seconds, MB). The warm-up is at most a third of the time; None for too few."""
        if not samples:
            return None
        start, end = samples[0][0], samples[-1][0]
        warm = start + min(WARM_UP_SECONDS, (end - start) / 3)
        kept = [sample for sample in samples if sample[0] >= warm]
        if len(kept) < 5:
            return None
        fifth = max(len(kept) // 5, 1)
        times, sizes = zip(*kept, strict=True)
        mean_time, mean_size = sum(times) / len(kept), sum(sizes) / len(kept)
        spread = sum((time - mean_time) ** 2 for time in times)
        product = sum((time - mean_time) * (size - mean_size) for time, size in kept)
        return cls(
            before=sum(sizes[:fifth]) / fifth,
            after=sum(sizes[-fifth:]) / fifth,
            slope_per_hour=3600 * product / spread,
            samples=len(kept),
        )


@dataclass
class Tally:
    """Counters, for many threads."""

    requests: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    counters: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    memory: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def request(self, kind: str) -> None:
        with self._lock:
            self.requests[kind] += 1

    def fail(self, kind: str, example: str = "") -> None:
        """Count it; the first of a kind is said at once."""
        with self._lock:
            self.failures[kind] += 1
            if kind not in self.examples:
                self.examples[kind] = example
                print(f"failed: {kind}: {example}", flush=True)

    def count(self, name: str, by: int = 1) -> None:
        with self._lock:
            self.counters[name] += by

    def resident(self, life: int, seconds: float, size: float) -> None:
        with self._lock:
            self.memory.setdefault(life, []).append((seconds, size))

    def growth(self) -> Growth | None:
        """Of the longest life."""
        if not self.memory:
            return None
        return Growth.of(max(self.memory.values(), key=len))

    def verdict(self, most_growth: float) -> list[str]:
        """Sentences about what is wrong; none when all is well."""
        wrong = [
            f"{count} x {kind}" + (f": {self.examples[kind]}" if self.examples[kind] else "")
            for kind, count in sorted(self.failures.items())
        ]
        if self.counters["blocks lost"]:
            wrong.append(f"{self.counters['blocks lost']} blocks lost")
        growth = self.growth()
        if growth and growth.grown > most_growth:
            wrong.append(f"resident memory grew by {growth.grown:.1f} MB, above {most_growth:g}")
        return wrong

    def table(self, minutes: float) -> str:
        """Markdown."""
        rows: list[tuple[str, Any]] = [("minutes", f"{minutes:.1f}")]
        rows += [(f"requests: {kind}", count) for kind, count in sorted(self.requests.items())]
        rows.append(("failures", sum(self.failures.values())))
        rows += [(f"failures: {kind}", count) for kind, count in sorted(self.failures.items())]
        rows += sorted(self.counters.items())
        growth = self.growth()
        if growth:
            rows += [
                ("resident memory after warm-up", f"{growth.before:.1f} MB"),
                ("resident memory at the end", f"{growth.after:.1f} MB"),
                ("growth", f"{growth.grown:+.1f} MB"),
                ("slope", f"{growth.slope_per_hour:+.1f} MB an hour"),
            ]
        return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])

    def as_dict(self) -> dict[str, Any]:
        growth = self.growth()
        return {
            "requests": dict(self.requests),
            "failures": dict(self.failures),
            "examples": self.examples,
            "counters": dict(self.counters),
            "growth": vars(growth) if growth else None,
            "memory": self.memory,
        }
