"""A step as the device sees it: rounds of pieces, their tiles, and each piece's own settings."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import triton.language as tl

from pacellm_vllm.ops.rules import MemoryRules
from pacellm_vllm.ops.sums import TILE as _TILE

TILE = tl.constexpr(_TILE)
# int32 columns of a piece; REQUEST is its row of the block table, and SUMMING of row i the i-th
# piece of ``DeviceRound.summing``, if there is one. Rows stay at multiples of 16 bytes, so that
# kernels are compiled once for any round.
BEGIN, LENGTH, POSITION, REQUEST = (tl.constexpr(i) for i in range(4))
PAGES, FIRST_TILE, TILES, SUMMING = (tl.constexpr(i) for i in range(4, 8))
# The bits of fp32 numbers.
ALPHA, NOISE, THETA_HIGH, THETA_LOW = (tl.constexpr(i) for i in range(8, 12))
COLUMNS = tl.constexpr(12)
# int32 columns of a tile; TILE_BEFORE is how many tokens of the round come before it.
TILE_PIECE, TILE_BEGIN, TILE_LENGTH, TILE_BEFORE = (tl.constexpr(i) for i in range(4))
TILE_COLUMNS = tl.constexpr(4)


@dataclass(frozen=True)
class DeviceRound:
    """Pieces that may run at once, no two of one request; tensors are int32.

    ``pieces`` [P, COLUMNS], ``tiles`` [N, TILE_COLUMNS], ``table`` [rows, pages]
    block ids. ``tokens`` counts all of the round, ``longest`` is the most of a tile. Of the pieces
    of several tiles ``summing`` have sums to keep or merge, the first ``committing`` of those end
    their segment. Before the round, blocks ``copies`` [2, n] int64 are copied, the first row's into
    the second's, if there are any.
    """

    pieces: torch.Tensor
    tiles: torch.Tensor
    table: torch.Tensor
    tokens: int
    longest: int
    summing: int
    committing: int
    copies: torch.Tensor | None = None

    def __post_init__(self) -> None:
        for tensor, columns in ((self.pieces, COLUMNS.value), (self.tiles, TILE_COLUMNS.value)):
            assert tensor.dtype == torch.int32, tensor.dtype
            assert tensor.shape[1] == columns, tensor.shape
            assert tensor.is_contiguous(), tensor.stride()
        assert self.table.dtype == torch.int32, self.table.dtype
        assert self.table.stride(1) == 1, self.table.stride()


class Tables(NamedTuple):
    """``pieces`` and ``tiles`` of one round on the host, int32, and its numbers."""

    pieces: np.ndarray
    tiles: np.ndarray
    summing: int = 0
    committing: int = 0

    def on(self, pieces: torch.Tensor, tiles: torch.Tensor, table: torch.Tensor) -> DeviceRound:
        """The round whose tables' copies on a device are ``pieces`` and ``tiles``."""
        lengths = self.tiles[:, TILE_LENGTH]
        return DeviceRound(
            pieces,
            tiles,
            table,
            tokens=int(lengths.sum()),
            longest=int(lengths.max()),
            summing=self.summing,
            committing=self.committing,
        )


def numbers_of(rules: Iterable[MemoryRules]) -> np.ndarray:
    """The last columns of pieces under each of ``rules``: int32, the bits of fp32 numbers."""
    numbers = [(one.alpha, one.noise, one.theta_high, one.theta_low) for one in rules]
    return np.array(numbers, dtype=np.float32).view(np.int32)


def piece_rows(
    begin: np.ndarray,
    length: np.ndarray | int,
    position: np.ndarray,
    request: np.ndarray,
    pages: np.ndarray,
    numbers: np.ndarray,
) -> np.ndarray:
    """A table of pieces [P, COLUMNS], without what ``tables_of`` fills in; ``numbers`` [P, 4].

    A piece is tokens of one request, in one segment: ``length`` of the batch's from ``begin`` on,
    the first at ``position`` of its request. ``request`` is a row of the block table, ``pages`` how
    many of its pages the piece can reach: with 0 it passes through.
    """
    rows = np.zeros((len(begin), COLUMNS.value), dtype=np.int32)
    rows[:, BEGIN], rows[:, LENGTH], rows[:, POSITION] = begin, length, position
    rows[:, REQUEST], rows[:, PAGES] = request, pages
    rows[:, ALPHA:] = numbers
    return rows


def tables_of(rows: np.ndarray, size: int) -> Tables:
    """The tables of one round, of pieces ``rows`` (see ``piece_rows``) and segments of ``size``."""
    begin, length, position = rows[:, BEGIN], rows[:, LENGTH], rows[:, POSITION]
    offset = position % size
    end = offset + length
    num_tiles = (end - 1) // _TILE - offset // _TILE + 1
    first_tile = num_tiles.cumsum() - num_tiles
    rows[:, FIRST_TILE], rows[:, TILES] = first_tile, num_tiles
    sums = (position >= size) & (num_tiles > 1)
    commits = sums & (end == size)
    summing = np.concatenate([np.flatnonzero(commits), np.flatnonzero(sums & ~commits)])
    rows[: len(summing), SUMMING] = summing

    piece = np.repeat(np.arange(len(rows)), num_tiles)
    start = (offset // _TILE - first_tile)[piece] * _TILE + np.arange(len(piece)) * _TILE
    stop = np.minimum(start + _TILE, end[piece])
    start = np.maximum(start, offset[piece])
    tiles = np.empty((len(piece), TILE_COLUMNS.value), dtype=np.int32)
    length = stop - start
    tiles[:, TILE_PIECE], tiles[:, TILE_BEGIN] = piece, (begin - offset)[piece] + start
    tiles[:, TILE_LENGTH], tiles[:, TILE_BEFORE] = length, length.cumsum() - length
    return Tables(rows, tiles, len(summing), int(commits.sum()))


def single_tables(positions: np.ndarray, pages: np.ndarray, numbers: np.ndarray) -> Tables:
    """``tables_of`` for a decode step: token i is request i's only one; see ``piece_rows``."""
    index = np.arange(len(positions), dtype=np.int32)
    rows = piece_rows(index, 1, positions, index, pages, numbers)
    rows[:, FIRST_TILE], rows[:, TILES] = index, 1
    tiles = np.stack([index, index, np.ones_like(index), index], axis=1)
    return Tables(rows, tiles)
