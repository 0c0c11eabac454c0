"""Sums over the tokens of a segment whose bits do not depend on how a scheduler cut them."""

import torch

TILE = 32


def running_sum(
    total: torch.Tensor, tile: torch.Tensor, rows: torch.Tensor | None, offset: int, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add ``count`` tokens, the first of them ``offset`` tokens into its segment.

    Tokens are added one by one within tiles of ``TILE`` positions counted from the segment's
    start, and finished tiles one by one to the total, so any cut gives the same bits. ``total``
    and ``tile`` (the unfinished tile) are [D] fp32; ``rows`` [count, D] fp32, or None for rows
    of zeros. Returns the new ``(total, tile)``; the sum is their sum.
    """
    if rows is None:
        if (offset + count) // TILE > offset // TILE:
            return total + tile, torch.zeros_like(tile)
        return total, tile

    done = 0
    while done < count:
        room = TILE - (offset + done) % TILE
        if room == TILE and count - done >= TILE:
            tiles = (count - done) // TILE
            blocks = rows[done : done + tiles * TILE].unflatten(0, (tiles, TILE))
            sums = blocks[:, 0]
            for i in range(1, TILE):
                sums = sums + blocks[:, i]
            for block in sums:
                total = total + block
            done += tiles * TILE
            continue
        for row in rows[done : done + room]:
            tile = tile + row
        done += min(room, count - done)
        if (offset + done) % TILE == 0:
            total, tile = total + tile, torch.zeros_like(tile)
    return total, tile
