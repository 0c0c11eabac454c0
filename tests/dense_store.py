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

    def read_header(self) -> Header:
        return Header.unpack(self.words.clone())

    def write_header(self, header: Header) -> None:
        self.words = header.pack()

    def read_slots(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.slots[0, :count], self.slots[1, :count]

    def write_slots(self, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.slots[:, slots] = torch.stack([keys, values]).to(self.slots.dtype)

    def read_staged(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.staged[0, :count], self.staged[1, :count]

    def write_staged(self, rows: torch.Tensor, a: torch.Tensor, o: torch.Tensor) -> None:
        self.staged[:, rows] = torch.stack([a, o]).to(self.staged.dtype)

    def read_sums(self) -> torch.Tensor:
        return self.sums.clone()

    def write_sums(self, sums: torch.Tensor) -> None:
        self.sums = sums
