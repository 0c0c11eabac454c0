"""A step as the device sees it: rounds of pieces, their tiles, and each piece's own settings."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import triton.language as tl

from pacellm_vllm.ops.rules import MemoryRules
from pacellm_vllm.ops.sums import TILE as _TILE

TILE = tl.constexpr(_TILE)
# int32 columns of a piece: begin, length, position, row of the block table, pages, first tile,
# tiles, stamp, and the bits of fp32 alpha, noise, theta_high and theta_low.
COLUMNS = tl.constexpr(12)


@dataclass(frozen=True)
class PieceOfBatch:
    """Tokens ``begin`` .. ``begin + length - 1`` of a batch: one request's, in one segment.

    ``position`` is the first one's place in its request, ``row`` the request's in the block table,
    ``pages`` how many of its pages the piece can reach: 0 for padding, which passes through.
    """

    begin: int
    length: int
    position: int
    row: int
    pages: int
    rules: MemoryRules


@dataclass(frozen=True)
class DeviceRound:
    """Pieces that may run at once, no two of one request; all tensors int32.

    ``pieces`` [P, COLUMNS], ``tiles`` [N, 3] of (piece, begin, length), ``table`` [rows, pages]
    block ids. ``longest`` is the most tokens of a tile and ``several`` whether some piece has more
    than one tile.
    """

    pieces: torch.Tensor
    tiles: torch.Tensor
    table: torch.Tensor
    longest: int
    several: bool

    def __post_init__(self) -> None:
        for tensor, columns in ((self.pieces, COLUMNS.value), (self.tiles, 3)):
            assert tensor.dtype == torch.int32, tensor.dtype
            assert tensor.shape[1] == columns, tensor.shape
            assert tensor.is_contiguous(), tensor.stride()
        assert self.table.dtype == torch.int32, self.table.dtype
        assert self.table.stride(1) == 1, self.table.stride()


def rounds_of(pieces: Iterable[PieceOfBatch]) -> list[list[PieceOfBatch]]:
    """The j-th pieces of all requests, for each j: a segment's end comes before the next one."""
    seen: dict[int, int] = {}
    rounds: list[list[PieceOfBatch]] = []
    for piece in pieces:
        turn = seen.get(piece.row, 0)
        seen[piece.row] = turn + 1
        if turn == len(rounds):
            rounds.append([])
        rounds[turn].append(piece)
    return rounds


def tables_of(
    pieces: Sequence[PieceOfBatch], stamp: int
) -> tuple[torch.Tensor, torch.Tensor, int, bool]:
    """One round's ``pieces`` and ``tiles`` on the host, ``longest`` and ``several``.

    ``stamp`` counts rounds, so that counts can tell which came last.
    """
    size = _TILE
    rows, tiles = [], []
    longest, several = 1, False
    for index, piece in enumerate(pieces):
        offset = piece.position % piece.rules.segment_size
        first = len(tiles)
        begin, end = piece.begin, piece.begin + piece.length
        while begin < end:
            n = min(end - begin, size - offset % size)
            tiles.append((index, begin, n))
            longest = max(longest, n)
            begin, offset = begin + n, offset + n
        several |= len(tiles) - first > 1
        rows.append(
            (
                *(piece.begin, piece.length, piece.position, piece.row, piece.pages),
                *(first, len(tiles) - first, stamp),
            )
        )
    table = torch.empty(len(rows), COLUMNS.value, dtype=torch.int32)
    table[:, :8] = torch.tensor(rows, dtype=torch.int32)
    numbers = [(p.rules.alpha, p.rules.noise, p.rules.theta_high, p.rules.theta_low) for p in pieces]
    table[:, 8:] = torch.tensor(numbers, dtype=torch.float32).view(torch.int32)
    return table, torch.tensor(tiles, dtype=torch.int32), longest, several
