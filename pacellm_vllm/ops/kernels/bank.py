"""DeviceBanks: where a bank's rows and header words lie, for the kernels."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from pacellm_vllm.ops.rules import MemoryRules


@dataclass(frozen=True)
class DeviceBanks:
    """All banks of one layer.

    ``cells`` [blocks, page cells] of the stored dtype and ``words`` [blocks, page words] int32 are
    two views of the same pages, with any block stride. A row of a bank is ``width`` cells;
    ``slots_start``, ``sums_start`` and ``staged_start`` are rows, as in ``memory/layout.py``.
    """

    cells: torch.Tensor
    words: torch.Tensor
    width: int
    slots_start: int
    sums_start: int
    staged_start: int

    def __post_init__(self) -> None:
        cells, words = self.cells, self.words
        itemsize = cells.element_size()
        assert cells.dim() == words.dim() == 2, (cells.shape, words.shape)
        assert cells.stride(1) == words.stride(1) == 1, "pages must be contiguous"
        assert words.dtype == torch.int32, words.dtype
        assert cells.data_ptr() == words.data_ptr(), "two views of the same pages"
        assert cells.stride(0) * itemsize == words.stride(0) * 4, (cells.stride(), words.stride())
        assert cells.shape[1] * itemsize == words.shape[1] * 4, (cells.shape, words.shape)
        assert self.width * itemsize % 4 == 0, "rows must be whole words"

    def columns_at_once(self, most: int) -> int:
        """Columns for a kernel to take at a time: a power of two that no more than two pages hold."""
        room = min(self.cells.shape[1], self.words.shape[1])
        return min(most, 1 << (room.bit_length() - 1))

    def constants(self, rules: MemoryRules) -> dict[str, Any]:
        """What every kernel that touches pages is compiled for."""
        return {
            "SIZE": rules.bank_size,
            "SEGMENT": rules.segment_size,
            "WIDTH": self.width,
            "PAGE": self.cells.shape[1],
            "STRIDE": self.cells.stride(0),
            "WORD_PAGE": self.words.shape[1],
            "WORD_STRIDE": self.words.stride(0),
        }


@triton.jit
def is_bank(table, pages):
    """Whether a piece that reaches ``pages`` pages of the block table row ``table`` has a bank.

    Warm-up, padding and requests without memory hold vLLM's null block, nobody's bank.
    """
    last = tl.load(table + tl.maximum(pages, 1) - 1)
    return (pages > 0) & (last != 0)


@triton.jit
def word_at(table, word, mask, PAGE: tl.constexpr, STRIDE: tl.constexpr):
    """Offsets [n] of a bank's ``word`` [n] among all words."""
    block = tl.load(table + word // PAGE, mask=mask, other=0).to(tl.int64)
    return block * STRIDE + word % PAGE


@triton.jit
def counter_at(table, STRIDE: tl.constexpr):
    """Offset of the header's first word, among all words; its counters lie in one page."""
    return tl.load(table).to(tl.int64) * STRIDE


@triton.jit
def span_at(table, start, columns, end, PAGE: tl.constexpr, STRIDE: tl.constexpr):
    """Offsets [n] of a bank's cells ``start + columns``, which lie in two pages at most.

    ``start`` and ``end`` are numbers that count cells from the bank's first; ``columns`` [n] count
    up from 0, and no cell from ``end`` on may be read or written. The same for words.
    """
    page = start // PAGE
    edge = (page + 1) * PAGE
    near = tl.load(table + page).to(tl.int64) * STRIDE - page * PAGE
    far = tl.load(table + page + 1, mask=edge < end, other=0).to(tl.int64) * STRIDE - edge
    cell = start + columns
    return cell + tl.where(cell < edge, near, far)


@triton.jit
def spans_at(table, starts, columns, left, mask, PAGE: tl.constexpr, STRIDE: tl.constexpr):
    """``span_at`` for many rows: offsets [m, n] of cells ``starts`` [m] + ``columns`` [n].

    ``left`` is how many cells a row has from its start on; only rows in ``mask`` [m] are looked up.
    """
    page = starts // PAGE
    edge = (page + 1) * PAGE
    near = tl.load(table + page, mask=mask, other=0).to(tl.int64) * STRIDE - page * PAGE
    straddles = mask & (edge < starts + left)
    far = tl.load(table + page + 1, mask=straddles, other=0).to(tl.int64) * STRIDE - edge
    cell = starts[:, None] + columns[None, :]
    return cell + tl.where(cell < edge[:, None], near[:, None], far[:, None])
