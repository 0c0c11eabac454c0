"""What is kept of one context under the chosen settings."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from recall_bench import Bench, following, places, score
from recall_items import Item
from recall_memory import Compressor, Reading, Recall, Site, random_projection
from torch import Tensor

NARROW = (64, 128, 256)


class Memory:
    """The chosen compressors and gate of a task, for a model."""

    def __init__(self, bench: Bench, out: Path) -> None:
        self.knobs = json.loads((out / f"{bench.task}-knobs.json").read_text())
        self.sites: dict[str, Site] = {
            use: (self.knobs[use]["site"][0], self.knobs[use]["site"][1])
            for use in ("find", "token", "focus")
        }
        if self.sites["token"] != self.sites["focus"]:
            raise ValueError("both ways of reading tokens need one site")
        sites = sorted(set(self.sites.values()))
        bench.reader.watch(sites)
        means = bench.means(sites)
        self.compress: dict[str, Compressor] = {}
        # What finding would be with keys of fewer numbers; nothing else uses these.
        self.narrow: dict[int, Compressor] = {}
        for use, site in self.sites.items():
            mean, width = means[site], self.knobs[use]["width"]
            projection = random_projection(len(mean), width) if width else None
            if not self.knobs[use].get("centred", True):
                mean = torch.zeros_like(mean)
            self.compress[use] = Compressor(mean, projection)
            if use == "find":
                for fewer in NARROW:
                    projection = random_projection(len(mean), fewer)
                    self.narrow[fewer] = Compressor(mean, projection)

    def store(self, reading: Reading, stored: slice, item: Item) -> "Store":
        """Of what ``Bench.context`` read: keys as they would lie in bfloat16."""
        keys = {
            use: compress(reading.states[self.sites[use]][stored]).bfloat16().float()
            for use, compress in self.compress.items()
        }
        return Store(self, item, keys)


class Store:
    """What is kept of one item's context."""

    def __init__(self, memory: Memory, item: Item, keys: dict[str, Tensor]) -> None:
        self.memory, self.item, self.keys = memory, item, keys
        self.follow, self.where = following(item), places(item)

    def find(self, states: Tensor) -> tuple[list[int], float]:
        """Passages, the most relevant to the states ``[m, D]`` first; how sure that is."""
        knobs = self.memory.knobs
        query = self.memory.compress["find"](states)
        scores, level = score(query, self.item, self.keys["find"], knobs["find"]["spread"])
        sure = level if knobs["gate"]["score"] == "level" else float(scores.max()) / len(query)
        return scores.argsort(descending=True).tolist(), sure

    def opens(self, sure: float) -> bool:
        """Whether the gate is open for a relevance of ``sure``."""
        return sure > self.memory.knobs["gate"]["threshold"]

    def recall(self, use: str, passages: Sequence[int] | None = None) -> Recall:
        """What recalls tokens, from ``passages`` alone if any are named."""
        knobs = self.memory.knobs[use]
        keys, follow = self.keys[use], self.follow
        if passages is not None:
            inside = torch.isin(self.where, torch.tensor(list(passages)))
            keys, follow = keys[inside], follow[inside]
        return Recall(
            self.memory.compress[use],
            keys,
            follow,
            knobs["temperature"],
            knobs["threshold"],
            knobs["weight"],
        )
