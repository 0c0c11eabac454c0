"""Products of tokens with the keys of their banks, and squared norms, of keys once a segment."""

import torch
import triton
import triton.language as tl

from pacellm_vllm.ops.kernels.bank import (
    OPTIONS,
    VALID,
    DeviceBanks,
    cdiv,
    counter_at,
    is_bank,
    next_power_of_2,
    rows_at,
)
from pacellm_vllm.ops.kernels.batch import (
    BEGIN,
    COLUMNS,
    PAGES,
    POSITION,
    REQUEST,
    TILE,
    TILE_BEFORE,
    TILE_BEGIN,
    TILE_COLUMNS,
    TILE_LENGTH,
    TILE_PIECE,
    DeviceRound,
)
from pacellm_vllm.ops.lookup import Reduce
from pacellm_vllm.ops.rules import MemoryRules

# Columns of D that one sum runs over; sums of this many columns are then added in order. It must
# not depend on the batch, or a token's bits would.
SPLIT = 512
# Each split is a program of its own where a round's partial sums have up to this many bytes. Where
# they would have more, its tiles alone fill a device, and a program takes all splits of its tile.
MOST_BYTES = 1 << 26
# Columns and keys that a program multiplies at once.
BLOCK = 64
KEYS = 64


@triton.jit(do_not_specialize=["table_stride", "splits"])
def similarity_kernel(
    a,
    pieces,
    tiles,
    table,
    table_stride,
    cells,
    words,
    products,
    squares,
    splits,
    SLOTS_START: tl.constexpr,
    SIZE: tl.constexpr,
    SEGMENT: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    STRIDE: tl.constexpr,
    WORD_STRIDE: tl.constexpr,
    GRAIN: tl.constexpr,
    SPLIT: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (tile, group of splits, keys): sums over the group's splits, in order.

    Writes products [round's tokens, groups, SIZE + 1], whose last column is the token's squared
    norm, and for a tile that begins a segment the keys' squares [pieces, groups, SIZE], which
    ``bookkeeping`` keeps until the next one. Keys that are not valid are not read, and nothing is
    written for them: where none are, as in a first segment, the norms are all.
    """
    group, groups = tl.program_id(1), tl.num_programs(1)
    first_key = tl.program_id(2) * KEYS
    tile = tiles + tl.program_id(0) * TILE_COLUMNS
    piece = tl.load(tile + TILE_PIECE)
    begin, length = tl.load(tile + TILE_BEGIN), tl.load(tile + TILE_LENGTH)
    at = pieces + piece * COLUMNS
    piece_begin, position = tl.load(at + BEGIN), tl.load(at + POSITION)
    table += tl.load(at + REQUEST).to(tl.int64) * table_stride
    if not is_bank(table, tl.load(at + PAGES)):
        return
    counters = words + counter_at(table, WORD_STRIDE)
    valid = tl.load(counters + VALID, mask=position >= SEGMENT, other=0)
    has_keys = first_key < valid
    if (first_key > 0) & (not has_keys):
        return

    i = tl.arange(0, TILE)
    column = tl.arange(0, BLOCK)
    grain = tl.arange(0, BLOCK // GRAIN) * GRAIN
    key = first_key + tl.arange(0, KEYS)
    tokens = (begin + i).to(tl.int64)
    is_token, is_key = i < length, key < valid

    # In a loop of its own, so that every other step has its registers.
    if has_keys & (position % SEGMENT == 0) & (begin == piece_begin):
        key_square = tl.zeros([KEYS], tl.float32)
        for split in range(group * splits, group * splits + splits):
            key_dots = tl.zeros([KEYS], tl.float32)
            end = tl.minimum(split * SPLIT + SPLIT, WIDTH)
            for start in range(split * SPLIT, end, BLOCK):
                starts = (SLOTS_START + 2 * key) * WIDTH + start
                found = is_key[:, None] & (start + grain < end)[None, :]
                offsets = rows_at(table, starts, grain, found, PAGE, STRIDE, GRAIN)
                keys = tl.load(cells + offsets, mask=found[:, :, None], other=0.0)
                keys32 = tl.reshape(keys, (KEYS, BLOCK)).to(tl.float32)
                key_dots += tl.sum(keys32 * keys32, axis=1)
            key_square += key_dots
        tl.store(squares + (piece * groups + group) * SIZE + key, key_square, mask=is_key)

    total = tl.zeros([TILE, KEYS], tl.float32)
    token_square = tl.zeros([TILE], tl.float32)
    for split in range(group * splits, group * splits + splits):
        dots = tl.zeros([TILE, KEYS], tl.float32)
        token_dots = tl.zeros([TILE], tl.float32)
        end = tl.minimum(split * SPLIT + SPLIT, WIDTH)
        for start in range(split * SPLIT, end, BLOCK):
            inside = start + column < end
            x = tl.load(
                a + tokens[:, None] * WIDTH + (start + column)[None, :],
                mask=is_token[:, None] & inside[None, :],
                other=0.0,
            )
            x32 = x.to(tl.float32)
            if first_key == 0:
                token_dots += tl.sum(x32 * x32, axis=1)
            if has_keys:
                starts = (SLOTS_START + 2 * key) * WIDTH + start
                found = is_key[:, None] & (start + grain < end)[None, :]
                offsets = rows_at(table, starts, grain, found, PAGE, STRIDE, GRAIN)
                keys = tl.load(cells + offsets, mask=found[:, :, None], other=0.0)
                keys = tl.reshape(keys, (KEYS, BLOCK))
                if x.dtype == keys.dtype:
                    dots = tl.dot(x, tl.trans(keys), dots, input_precision="ieee")
                else:
                    dots = tl.dot(x32, tl.trans(keys.to(tl.float32)), dots, input_precision="ieee")
        total += dots
        token_square += token_dots

    row = products + ((tl.load(tile + TILE_BEFORE) + i).to(tl.int64) * groups + group) * (SIZE + 1)
    tl.store(row[:, None] + key[None, :], total, mask=is_token[:, None] & is_key[None, :])
    if first_key == 0:
        tl.store(row + SIZE, token_square, mask=is_token)


@triton.jit
def sum_squares(squares, piece, groups, slot, exists, SIZE: tl.constexpr):
    """Squared norms [n] of the keys ``slot`` [n] of a piece that begins a segment."""
    total = tl.zeros(slot.shape, tl.float32)
    for group in range(groups):
        row = squares + (piece * groups + group).to(tl.int64) * SIZE
        total += tl.load(row + slot, mask=exists, other=0.0)
    return total


@triton.jit(do_not_specialize=["count", "groups"])
def add_groups_kernel(parts, sums, count, groups, ROW: tl.constexpr, BLOCK: tl.constexpr):
    """sums [count, ROW] = parts [count, groups, ROW] added over groups in order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count * ROW
    begin = at // ROW * groups * ROW + at % ROW
    total = tl.zeros([BLOCK], tl.float32)
    for group in range(groups):
        total += tl.load(parts + begin + group * ROW, mask=mask, other=0.0)
    tl.store(sums + at, total, mask=mask)


class Products:
    """What ``similarity_kernel`` writes: one buffer, so that one all-reduce sums it over ranks.

    ``of_tokens`` [round's tokens, groups, M + 1] and ``of_keys`` [pieces, groups, M] fp32.
    """

    def __init__(
        self, tokens: int, pieces: int, groups: int, size: int, like: torch.Tensor
    ) -> None:
        self.shape = (tokens, pieces, groups, size)
        total = self._keys_begin() + pieces * groups * size
        self._use(torch.empty(total, dtype=torch.float32, device=like.device))

    def _keys_begin(self) -> int:
        """Of ``of_keys``: aligned, so that kernels are compiled alike for any batch."""
        tokens, _, groups, size = self.shape
        return -(-tokens * groups * (size + 1) // 4) * 4

    def _use(self, buffer: torch.Tensor) -> None:
        tokens, pieces, groups, size = self.shape
        self.buffer, self.groups = buffer, groups
        row = groups * (size + 1)
        self.of_tokens = buffer[: tokens * row].view(tokens, groups, size + 1)
        self.of_keys = buffer[self._keys_begin() :].view(pieces, groups, size)

    def reduced(self, reduce: Reduce) -> "Products":
        """Groups added, then summed over ranks by ``reduce``."""
        tokens, pieces, groups, size = self.shape
        done = self
        if groups > 1:
            done = Products(tokens, pieces, 1, size, self.buffer)
            for parts, sums in ((self.of_tokens, done.of_tokens), (self.of_keys, done.of_keys)):
                count, row = parts.shape[0], parts.shape[2]
                grid = (cdiv(count * row, 256),)
                add_groups_kernel[grid](parts, sums, count, groups, ROW=row, BLOCK=256, **OPTIONS)
        done._use(reduce(done.buffer))
        return done


def similarity(
    a: torch.Tensor, banks: DeviceBanks, now: DeviceRound, rules: MemoryRules
) -> Products:
    """The round's tokens against the valid keys of their banks; ``a`` [tokens, width]."""
    assert a.is_contiguous(), a.stride()
    assert a.shape[1] == banks.width, (a.shape, banks.width)
    splits = cdiv(banks.width, SPLIT)
    size = rules.bank_size
    groups = splits if now.tokens * splits * (size + 1) * 4 <= MOST_BYTES else 1
    found = Products(now.tokens, now.pieces.shape[0], groups, size, a)
    keys = min(KEYS, max(16, next_power_of_2(size)))
    grid = (now.tiles.shape[0], groups, cdiv(size, keys))
    similarity_kernel[grid](
        a,
        now.pieces,
        now.tiles,
        now.table,
        now.table.stride(0),
        banks.cells,
        banks.words,
        found.of_tokens,
        found.of_keys,
        splits // groups,
        SLOTS_START=banks.slots_start,
        **banks.constants(
            rules, "SIZE", "SEGMENT", "WIDTH", "PAGE", "STRIDE", "WORD_STRIDE", "GRAIN"
        ),
        SPLIT=SPLIT,
        KEYS=keys,
        BLOCK=BLOCK,
        num_warps=4,
        num_stages=1,
        **OPTIONS,
    )
    return found
