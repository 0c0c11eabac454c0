"""LayerBanks: what one layer's recorded banks say, as numbers and as a table."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from rich.table import Table
from sklearn.decomposition import PCA

TOP_TOKENS = 5
KINDS = ("high", "mid", "low")


@dataclass(frozen=True)
class LayerBanks:
    """One layer's banks over a text of several segments.

    ``commits``: by segment, as ``serving.recorder.BankRecorder`` noted them. Of the last bank and
    of the segment read last: ``slots`` [m, 2] and ``current`` [n, 2] on one plane (principal
    components of the directions of activations, which are what is compared by), and the tokens
    that each speaks for, most first.
    """

    commits: Sequence[dict[str, Any]]
    slots: np.ndarray
    current: np.ndarray
    slot_words: Sequence[Sequence[str]]
    current_words: Sequence[Sequence[str]]

    @property
    def usage(self) -> list[int]:
        return self.commits[-1]["usage"]

    def rates(self) -> dict[str, float | None]:
        """Shares of tokens by kind, without the first segment's, which met an empty bank.

        None where no later segment has ended.
        """
        totals = {kind: sum(commit[kind] for commit in self.commits[1:]) for kind in KINDS}
        tokens = sum(totals.values())
        return {kind: total / tokens if tokens else None for kind, total in totals.items()}

    def map(self) -> tuple[np.ndarray, list[int], np.ndarray, list[str]]:
        """What ``plots.memory_map`` draws."""
        return self.slots, self.usage, self.current, [words[0] for words in self.slot_words]

    def as_dict(self) -> dict[str, Any]:
        return {
            "rates": self.rates(),
            "commits": list(self.commits),
            "slots": [
                {"usage": usage, "tokens": list(words), "place": place.tolist()}
                for usage, words, place in zip(self.usage, self.slot_words, self.slots, strict=True)
            ],
            "current": [
                {"tokens": list(words), "place": place.tolist()}
                for words, place in zip(self.current_words, self.current, strict=True)
            ],
        }


def read_banks(recorded: Mapping[int, Mapping[str, Any]], tokenizer: Any) -> dict[int, LayerBanks]:
    """By layer, from what a worker recorded (``MemoryReport.pacellm_memory_recorded``)."""
    layers = {}
    for index, found in sorted(recorded.items()):
        keys, current = (
            np.frombuffer(found[name], np.float32).reshape(-1, found["width"])
            for name in ("keys", "current")
        )
        directions = np.concatenate([keys, current])
        directions = directions / np.linalg.norm(directions, axis=1, keepdims=True).clip(1e-8)
        places = PCA(2, random_state=0).fit_transform(directions)
        words = [
            [[tokenizer.decode([token]) for token in row] for row in found[f"{name}_words"]]
            for name in ("keys", "current")
        ]
        layers[index] = LayerBanks(
            found["commits"], places[: len(keys)], places[len(keys) :], *words
        )
    return layers


def table(layers: Mapping[int, LayerBanks], title: str) -> Table:
    """One row a layer: rates, slots, median and largest usage, mean cosine of two slots after the
    first and the last segment, and the tokens that most slots speak for, by how many do.
    """
    made = Table(title=title)
    for name in ("layer", "high/mid/low %", "segments", "slots", "merged", "replaced"):
        made.add_column(name, justify="right")
    made.add_column("usage", justify="right")
    made.add_column("cosine", justify="right")
    made.add_column("slots speak for")
    for index, layer in layers.items():
        last = layer.commits[-1]
        shares = [
            f"{100 * rate:.0f}" if rate is not None else "-" for rate in layer.rates().values()
        ]
        cosines = [c["cosine"] for c in layer.commits if c["cosine"] is not None] or [float("nan")]
        words = Counter(words[0] for words in layer.slot_words).most_common(4)
        made.add_row(
            str(index),
            "/".join(shares),
            str(len(layer.commits)),
            str(last["valid"]),
            *(str(sum(c[name] for c in layer.commits)) for name in ("merged", "replaced")),
            f"{median(layer.usage):g} ({max(layer.usage)})",
            f"{cosines[0]:.2f} to {cosines[-1]:.2f}",
            ", ".join(f"{word.strip()} x {count}" for word, count in words),
        )
    return made
