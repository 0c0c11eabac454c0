"""DeviceBanks: where a bank's rows and header words lie, for the kernels."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton
import triton.language as tl

from pacellm_vllm.ops.rules import MemoryRules

# The first words of a bank's header, see ``memory/layout.py``; SIZE words each of usage, merges and
# confirmations follow, and the keys' squared norms.
VALID, MIDS, LOWS, PER_SLOT = (tl.constexpr(i) for i in range(4))

# Of every launch. Left to Triton, whether products and sums fuse depends on its version.
OPTIONS = {"enable_fp_fusion": True}


def cdiv(n: int, block: int) -> int:
    """How many blocks hold ``n``. Triton's own, for kernels too, takes the host 5 us a call."""
    return -(-n // block)


def next_power_of_2(n: int) -> int:
    """The least power of 2 from ``n`` on, see ``cdiv``."""
    return 1 << (n - 1).bit_length()


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

    @cached_property
    def sums_word(self) -> int:
        """Where the fp32 sums begin, counted in words from a bank's first."""
        return self.sums_start * self.width * self.cells.element_size() // 4

    @cached_property
    def grain(self) -> int:
        """Columns, of cells and of sums, that never straddle pages: at most 16 bytes of cells."""
        divided = (self.width, self.cells.shape[1], self.words.shape[1], self.sums_word)
        return math.gcd(16 // self.cells.element_size(), *divided)

    def constants(self, rules: MemoryRules, *names: str) -> dict[str, Any]:
        """What kernels that touch pages are compiled for: ``names`` of it, or all."""
        constants = {
            "SIZE": rules.bank_size,
            "SEGMENT": rules.segment_size,
            "WIDTH": self.width,
            "PAGE": self.cells.shape[1],
            "STRIDE": self.cells.stride(0),
            "WORD_PAGE": self.words.shape[1],
            "WORD_STRIDE": self.words.stride(0),
            "GRAIN": self.grain,
        }
        return {name: constants[name] for name in names} if names else constants


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
def squares_at(table, slot, mask, SIZE: tl.constexpr, PAGE: tl.constexpr, STRIDE: tl.constexpr):
    """Offsets [n] of the squared norms that the header keeps of keys ``slot`` [n]."""
    return word_at(table, PER_SLOT + 3 * SIZE + slot, mask, PAGE, STRIDE)


@triton.jit
def counter_at(table, STRIDE: tl.constexpr):
    """Offset of the header's first word, among all words; its counters lie in one page."""
    return tl.load(table).to(tl.int64) * STRIDE


@triton.jit
def row_at(
    table, start, grains, inside, PAGE: tl.constexpr, STRIDE: tl.constexpr, GRAIN: tl.constexpr
):
    """Offsets [n, GRAIN] of ``GRAIN`` cells each from ``start + grains`` [n] on.

    ``start`` counts a bank's cells from its first page on. Grains never straddle pages, and saying
    so lets the compiler read each at once. Only those ``inside`` [n] are looked up. Words alike.
    """
    cell = start + grains
    page = cell // PAGE
    block = tl.load(table + page, mask=inside, other=0).to(tl.int64)
    return (block * STRIDE + (cell - page * PAGE))[:, None] + tl.arange(0, GRAIN)[None, :]


@triton.jit
def rows_at(
    table, starts, grains, inside, PAGE: tl.constexpr, STRIDE: tl.constexpr, GRAIN: tl.constexpr
):
    """``row_at`` for many rows: offsets [m, n, GRAIN], ``starts`` [m], ``inside`` [m, n]."""
    cell = starts[:, None] + grains[None, :]
    page = cell // PAGE
    block = tl.load(table + page, mask=inside, other=0).to(tl.int64)
    base = block * STRIDE + (cell - page * PAGE)
    return base[:, :, None] + tl.arange(0, GRAIN)[None, None, :]
