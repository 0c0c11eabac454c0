"""What one layer's memory did since the engine started."""

from dataclasses import asdict, dataclass

from pacellm_vllm.ops.update import Progress


@dataclass
class MemoryCounts:
    """Tokens by what their look-up asked of the memory, commits, and slots in use.

    ``high`` tokens confirmed slots, ``mid`` merged into slots, ``low`` asked for a slot of their
    own (paper Sec. 3.2.1). ``slots_last`` and ``slots_peak`` are valid slots after a commit.
    """

    high: int = 0
    mid: int = 0
    low: int = 0
    commits: int = 0
    slots_last: int = 0
    slots_peak: int = 0

    def add(self, progress: Progress) -> None:
        self.high += progress.high
        self.mid += progress.mid
        self.low += progress.low
        if progress.committed_slots is not None:
            self.commits += 1
            self.slots_last = progress.committed_slots
            self.slots_peak = max(self.slots_peak, progress.committed_slots)

    def as_dict(self) -> dict[str, int]:
        return asdict(self)
