"""A step as the device sees it: rounds of pieces, their tiles, and each piece's own settings."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
import triton.language as tl

from pacellm_vllm.ops.rules import MemoryRules
from pacellm_vllm.ops.sums import TILE as _TILE

TILE = tl.constexpr(_TILE)
# int32 columns of a piece: begin, length, position, row of the block table, pages, first tile,
# tiles, an idle one, and the bits of fp32 alpha, noise, theta_high and theta_low. Idle columns keep
# rows at multiples of 16 bytes, so that kernels are compiled once for any round.
COLUMNS = tl.constexpr(12)
# int32 columns of a tile: piece, begin, length, and an idle one.
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
    block ids. ``longest`` is the most tokens of a tile and ``several`` whether some piece has more
    than one tile. Before the round, blocks ``copies`` [2, n] int64 are copied, the first row's into
    the second's, if there are any.
    """

    pieces: torch.Tensor
    tiles: torch.Tensor
    table: torch.Tensor
    longest: int
    several: bool
    copies: torch.Tensor | None = None

    def __post_init__(self) -> None:
        for tensor, columns in ((self.pieces, COLUMNS.value), (self.tiles, TILE_COLUMNS.value)):
            assert tensor.dtype == torch.int32, tensor.dtype
            assert tensor.shape[1] == columns, tensor.shape
            assert tensor.is_contiguous(), tensor.stride()
        assert self.table.dtype == torch.int32, self.table.dtype
        assert self.table.stride(1) == 1, self.table.stride()


Tables = tuple[np.ndarray, np.ndarray]
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
    """``pieces`` and ``tiles`` of one round, int32, on the host."""
    rows = np.empty((len(pieces), COLUMNS.value), dtype=np.int32)
    tiles: list[tuple[int, int, int, int]] = []
    numbers: dict[MemoryRules, np.ndarray] = {}
    for index, piece in enumerate(pieces):
        offset = piece.position % piece.rules.segment_size
        first, begin = len(tiles), piece.begin
        while begin < piece.end:
            n = min(piece.end - begin, _TILE - offset % _TILE)
            tiles.append((index, begin, n, 0))
            begin, offset = begin + n, offset + n
        length = piece.end - piece.begin
        rows[index, :5] = (piece.begin, length, piece.position, piece.request, piece.pages)
        rows[index, 5:8] = (first, len(tiles) - first, 0)
        if piece.rules not in numbers:
            numbers[piece.rules] = numbers_of(piece.rules)
        rows[index, 8:] = numbers[piece.rules]
    return rows, np.array(tiles, dtype=np.int32).reshape(-1, TILE_COLUMNS.value)


def single_tables(positions: np.ndarray, pages: np.ndarray, numbers: np.ndarray) -> Tables:
    """``tables_of`` for a decode step: token i is request i's only one.

    ``positions`` and ``pages`` [R], ``numbers`` [4] or [R, 4] as of ``numbers_of``.
    """
    count = len(positions)
    index = np.arange(count, dtype=np.int32)
    rows = np.empty((count, COLUMNS.value), dtype=np.int32)
    rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3], rows[:, 4] = index, 1, positions, index, pages
    rows[:, 5], rows[:, 6], rows[:, 7], rows[:, 8:] = index, 1, 0, numbers
    return rows, np.stack([index, index, np.ones_like(index), np.zeros_like(index)], axis=1)
