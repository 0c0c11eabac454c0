"""Sums over the tokens of a segment whose bits do not depend on how a scheduler cut them."""

from collections.abc import Sequence

import torch

TILE = 32

Turns = list[tuple[torch.Tensor, torch.Tensor]]


def tile_turns(chosen: torch.Tensor, offset: int) -> Turns:
    """The order in which ``running_sum`` adds the tokens ``chosen`` [j] int64, ascending.

    Token 0 lies ``offset`` tokens into its segment. Turn i is the i-th chosen token of every tile:
    the tiles' numbers, counted from the first token's, and the tokens. As a turn has no tile
    twice, adding all of it at once has one result.
    """
    tiles = (offset + chosen) // TILE - offset // TILE
    rank = torch.arange(len(chosen), device=chosen.device)
    rank -= torch.searchsorted(tiles, tiles)
    turns = []
    for turn in range(int(rank.max()) + 1 if len(chosen) else 0):
        now = rank == turn
        turns.append((tiles[now], chosen[now]))
    return turns


def running_sum(
    total: torch.Tensor,
    tile: torch.Tensor,
    rows: torch.Tensor,
    turns: Turns,
    offset: int,
) -> None:
    """Add some of ``rows`` [count, D] in place, the first row ``offset`` tokens into its segment.

    ``turns`` (see :func:`tile_turns`) say which. Tokens are added one by one within tiles of
    ``TILE`` positions counted from the segment's start, and finished tiles one by one to the
    total, so any cut gives the same bits. ``total`` and ``tile`` (the unfinished tile) are [D]
    fp32; the sum is their sum.
    """
    finished = (offset + len(rows)) // TILE - offset // TILE
    sums = torch.zeros(finished + 1, rows.shape[1], device=rows.device)
    sums[0] = tile
    for tiles, tokens in turns:
        sums.index_add_(0, tiles, rows.index_select(0, tokens).float())
    for done in sums[:finished]:
        total += done
    tile.copy_(sums[finished])


def add_one(sums: torch.Tensor, rows: Sequence[torch.Tensor], offset: int) -> None:
    """The same for one token: add ``rows`` [D] to the first of ``sums`` [4, D] in place.

    ``sums`` are two totals, then their tiles; ``rows`` may be fewer than two.
    """
    for tile, row in zip(sums[2:], rows, strict=False):
        tile += row
    if (offset + 1) % TILE == 0:
        sums[:2] += sums[2:]
        sums[2:] = 0
