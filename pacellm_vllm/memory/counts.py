"""What one layer's memory, and what the pool that holds banks, did since the engine started."""

from bisect import bisect_left
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from pacellm_vllm.ops.update import Progress

# Upper ends of the buckets that tokens are counted in by similarity; the last one is 1 and above.
SIMILARITY_ENDS = (-0.5, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass
class MemoryCounts:
    """Tokens by what their look-up asked of the memory, commits, and slots in use.

    ``high`` tokens confirmed slots, ``mid`` merged into slots, ``low`` asked for a slot of their
    own (paper Sec. 3.2.1). ``slots_last`` and ``slots_peak`` are valid slots after a commit.
    ``plain`` is more of the same that only the plain PyTorch ops tell; None where kernels run.
    """

    high: int = 0
    mid: int = 0
    low: int = 0
    commits: int = 0
    slots_last: int = 0
    slots_peak: int = 0
    plain: "PlainCounts | None" = None

    def add(self, progress: Progress) -> None:
        self.high += progress.high
        self.mid += progress.mid
        self.low += progress.low
        committed = progress.committed
        if committed is not None:
            self.commits += 1
            self.slots_last = committed.valid
            self.slots_peak = max(self.slots_peak, committed.valid)
        if self.plain is not None:
            self.plain.add(progress)

    def as_dict(self) -> dict[str, Any]:
        found = asdict(self)
        plain = found.pop("plain")
        return {**found, **(plain or {})}


@dataclass
class PlainCounts:
    """Slots ``merged``, ``filled`` and ``replaced`` by commits, low tokens that were ``dropped``.

    ``similarity`` counts tokens that met a bank by the mean of their top similarities, which
    decides the kind: one bucket for each of ``SIMILARITY_ENDS`` and one above.
    """

    merged: int = 0
    filled: int = 0
    replaced: int = 0
    dropped: int = 0
    similarity: list[int] = field(default_factory=lambda: [0] * (len(SIMILARITY_ENDS) + 1))

    def add(self, progress: Progress) -> None:
        committed = progress.committed
        if committed is not None:
            self.merged += len(committed.merged)
            self.filled += committed.filled
            self.replaced += len(committed.replaced)
            self.dropped += committed.dropped
        found = progress.mean_top
        if isinstance(found, list):
            for one in found:
                # Not of an empty bank, and not of an unsound token.
                if one > float("-inf"):
                    self.similarity[bisect_left(SIMILARITY_ENDS, one)] += 1
            return
        if not progress.top.shape[-1]:  # type: ignore[union-attr]
            return
        sound = found[~found.isnan()]
        buckets = torch.bucketize(sound, torch.tensor(SIMILARITY_ENDS))
        for i, count in enumerate(buckets.bincount(minlength=len(self.similarity)).tolist()):
            self.similarity[i] += count


@dataclass
class PoolCounts:
    """What one engine's scheduler did with banks.

    Snapshots of committed banks ``published`` to the prefix cache, ``hit`` (restored from it, or
    taken over) with the ``hit_tokens`` they stand for, and ``evicted`` (a snapshot's first page
    was). Now: ``blocks_held`` by requests' banks, ``requests`` that are running or waiting with
    pages, and ``streams`` of input among all that were placed.
    """

    published: int = 0
    hit: int = 0
    hit_tokens: int = 0
    evicted: int = 0
    blocks_held: int = 0
    requests: int = 0
    streams: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)
