"""DenseStore: one bank in ordinary tensors, for tests and for looking at a bank."""

import torch

from pacellm_vllm.ops.rules import MemoryRules
from pacellm_vllm.ops.update import Header


class DenseStore:
    """Keys and values [M, D], staging rows [max_insertions, D] in ``dtype``; see ``BankStore``."""

    def __init__(self, rules: MemoryRules, width: int, dtype: torch.dtype = torch.float32) -> None:
        size, staged = rules.bank_size, rules.max_insertions
        self.words = torch.zeros(Header.num_words(size), dtype=torch.int32)
        self.slots = torch.full((2, size, width), float("nan"), dtype=dtype)
        self.staged = torch.full((2, staged, width), float("nan"), dtype=dtype)
        self.sums = torch.full((4, width), float("nan"))

    def read_words(self) -> torch.Tensor:
        return self.words.clone()

    def write_words(self, words: torch.Tensor) -> None:
        self.words = words

    def read_keys(self, count: int) -> torch.Tensor:
        return self.slots[0, :count]

    def read_values(self, count: int) -> torch.Tensor:
        return self.slots[1, :count]

    def write_slots(self, slots, keys, values) -> None:
        for slot, key, value in zip(slots, keys, values, strict=True):
            self.slots[0, slot], self.slots[1, slot] = key, value

    def read_staged(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.staged[0, :count], self.staged[1, :count]

    def write_staged(self, rows, a, o) -> None:
        for row, one, other in zip(rows, a, o, strict=True):
            self.staged[0, row], self.staged[1, row] = one, other

    def read_sums(self) -> torch.Tensor:
        return self.sums.clone()

    def write_sums(self, sums: torch.Tensor) -> None:
        self.sums = sums
