"""A step as the device sees it: rounds of pieces, their tiles, and each piece's own settings."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
import triton.language as tl

from pacellm_vllm.ops.rules import MemoryRules
from pacellm_vllm.ops.sums import TILE as _TILE

TILE = tl.constexpr(_TILE)
# int32 columns of a piece: begin, length, position, row of the block table, pages, first tile,
# tiles, and the bits of fp32 alpha, noise, theta_high and theta_low. Before those four, row i names
# the i-th piece to close, if there is one. Rows stay at multiples of 16 bytes, for which idle
# columns are kept, so that kernels are compiled once for any round.
COLUMNS = tl.constexpr(12)
# int32 columns of a tile: piece, begin, length, and the tokens of the round before it.
TILE_COLUMNS = tl.constexpr(4)


class PieceLike(Protocol):
    """Tokens ``begin`` .. ``end - 1`` of a batch: one request's, in one segment.

    ``position`` is the first one's place in its request, ``request`` the row of the block table,
    ``pages`` how many of its pages the piece can reach: with 0 it passes through.
    """

    @property
    def request(self) -> int: ...
    @property
    def begin(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def position(self) -> int: ...
    @property
    def pages(self) -> int: ...
    @property
    def rules(self) -> MemoryRules: ...


@dataclass(frozen=True)
class DeviceRound:
    """Pieces that may run at once, no two of one request; tensors are int32.

    ``pieces`` [P, COLUMNS], ``tiles`` [N, TILE_COLUMNS], ``table`` [rows, pages]
    block ids. ``tokens`` counts all of the round, ``longest`` is the most of a tile. Of the pieces
    of several tiles ``closing`` have sums to keep or merge, the first ``committing`` of those end
    their segment. Before the round, blocks ``copies`` [2, n] int64 are copied, the first row's into
    the second's, if there are any.
    """

    pieces: torch.Tensor
    tiles: torch.Tensor
    table: torch.Tensor
    tokens: int
    longest: int
    closing: int
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
    closing: int = 0
    committing: int = 0

    def on(self, pieces: torch.Tensor, tiles: torch.Tensor, table: torch.Tensor) -> DeviceRound:
        """The round whose tables' copies on a device are ``pieces`` and ``tiles``."""
        lengths = self.tiles[:, 2]
        return DeviceRound(
            pieces,
            tiles,
            table,
            tokens=int(lengths.sum()),
            longest=int(lengths.max()),
            closing=self.closing,
            committing=self.committing,
        )


AnyPiece = TypeVar("AnyPiece", bound=PieceLike)


def rounds_of(pieces: Iterable[AnyPiece]) -> list[list[AnyPiece]]:
    """The j-th pieces of all requests, for each j: a segment ends before the next one begins."""
    seen: dict[int, int] = {}
    rounds: list[list[AnyPiece]] = []
    for piece in pieces:
        turn = seen.get(piece.request, 0)
        seen[piece.request] = turn + 1
        if turn == len(rounds):
            rounds.append([])
        rounds[turn].append(piece)
    return rounds


def numbers_of(rules: MemoryRules) -> np.ndarray:
    """The last columns of a piece under ``rules``: int32, the bits of fp32 numbers."""
    numbers = (rules.alpha, rules.noise, rules.theta_high, rules.theta_low)
    return np.array(numbers, dtype=np.float32).view(np.int32)


def tables_of(pieces: Sequence[PieceLike]) -> Tables:
    """The tables of a round of at least one piece, of one segment size."""
    count, size = len(pieces), pieces[0].rules.segment_size
    rows = np.zeros((count, COLUMNS.value), dtype=np.int32)
    rows[:, :5] = [(p.begin, p.end - p.begin, p.position, p.request, p.pages) for p in pieces]
    numbers = {rules: numbers_of(rules) for rules in {piece.rules for piece in pieces}}
    rows[:, 8:] = [numbers[piece.rules] for piece in pieces]

    begin, length, position = rows[:, :3].T
    offset = position % size
    end = offset + length
    num_tiles = (end - 1) // _TILE - offset // _TILE + 1
    first_tile = num_tiles.cumsum() - num_tiles
    rows[:, 5], rows[:, 6] = first_tile, num_tiles
    closes = (position >= size) & (num_tiles > 1)
    commits = closes & (end == size)
    closing = np.concatenate([np.flatnonzero(commits), np.flatnonzero(closes & ~commits)])
    rows[: len(closing), 7] = closing

    piece = np.repeat(np.arange(count), num_tiles)
    start = (offset // _TILE - first_tile)[piece] * _TILE + np.arange(len(piece)) * _TILE
    stop = np.minimum(start + _TILE, end[piece])
    start = np.maximum(start, offset[piece])
    tiles = np.empty((len(piece), TILE_COLUMNS.value), dtype=np.int32)
    tiles[:, 0], tiles[:, 1], tiles[:, 2] = piece, (begin - offset)[piece] + start, stop - start
    tiles[:, 3] = tiles[:, 2].cumsum() - tiles[:, 2]
    return Tables(rows, tiles, len(closing), int(commits.sum()))


def single_tables(positions: np.ndarray, pages: np.ndarray, numbers: np.ndarray) -> Tables:
    """``tables_of`` for a decode step: token i is request i's only one.

    ``positions`` and ``pages`` [R], ``numbers`` [4] or [R, 4] as of ``numbers_of``.
    """
    count = len(positions)
    index = np.arange(count, dtype=np.int32)
    rows = np.empty((count, COLUMNS.value), dtype=np.int32)
    rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3], rows[:, 4] = index, 1, positions, index, pages
    rows[:, 5], rows[:, 6], rows[:, 7], rows[:, 8:] = index, 1, 0, numbers
    tiles = np.stack([index, index, np.ones_like(index), index], axis=1)
    return Tables(rows, tiles)
