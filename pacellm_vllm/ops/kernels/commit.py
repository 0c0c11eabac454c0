"""The end of a piece: running sums kept, or their means and the commit of keys and values."""

import torch
import triton
import triton.language as tl

from pacellm_vllm.ops.kernels.bank import OPTIONS, DeviceBanks, cdiv, is_bank, row_at
from pacellm_vllm.ops.kernels.batch import (
    COLUMNS,
    FIRST_TILE,
    LENGTH,
    PAGES,
    POSITION,
    REQUEST,
    SUMMING,
    TILE,
    TILES,
    DeviceRound,
)
from pacellm_vllm.ops.kernels.bookkeeping import KEEP, MERGE, Plans
from pacellm_vllm.ops.rules import MemoryRules, UpdateRule

# Columns of D that a program takes.
BLOCK = 512
# The running sums, of a and of o each: of finished tiles, then of the unfinished one.
TOTAL, UNFINISHED = tl.constexpr(0), tl.constexpr(2)


@triton.jit
def load_sums(
    words,
    table,
    which,
    grain,
    SUMS_WORD: tl.constexpr,
    PAPER: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    STRIDE: tl.constexpr,
    GRAIN: tl.constexpr,
):
    """Columns from ``grain`` [n] on of a's running sum and of o's, fp32 [n, GRAIN] each.

    In the `paper` rule only a's exists, and o's is 0.
    """
    inside = grain < WIDTH
    start = SUMS_WORD + which * WIDTH
    at = words + row_at(table, start, grain, inside, PAGE, STRIDE, GRAIN)
    sum_a = tl.load(at, mask=inside[:, None], other=0).to(tl.float32, bitcast=True)
    sum_o = tl.zeros(sum_a.shape, tl.float32)
    if not PAPER:
        at = words + row_at(table, start + WIDTH, grain, inside, PAGE, STRIDE, GRAIN)
        sum_o = tl.load(at, mask=inside[:, None], other=0).to(tl.float32, bitcast=True)
    return sum_a, sum_o


@triton.jit
def store_sums(
    words,
    table,
    which,
    sum_a,
    sum_o,
    grain,
    SUMS_WORD: tl.constexpr,
    PAPER: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    STRIDE: tl.constexpr,
    GRAIN: tl.constexpr,
):
    inside = grain < WIDTH
    start = SUMS_WORD + which * WIDTH
    at = words + row_at(table, start, grain, inside, PAGE, STRIDE, GRAIN)
    tl.store(at, sum_a.to(tl.int32, bitcast=True), mask=inside[:, None])
    if not PAPER:
        at = words + row_at(table, start + WIDTH, grain, inside, PAGE, STRIDE, GRAIN)
        tl.store(at, sum_o.to(tl.int32, bitcast=True), mask=inside[:, None])


@triton.jit
def means_of(sum_a, sum_o, sizes, SEGMENT: tl.constexpr, PAPER: tl.constexpr):
    """What a commit merges into slots, of the segment's sums [n]. In `paper` only a's exists."""
    if PAPER:
        mean_a = tl.div_rn(sum_a, tl.full(sum_a.shape, SEGMENT, tl.float32))
        mean_o = mean_a
    else:
        mids = tl.maximum(tl.load(sizes + 1), 1).to(tl.float32)
        mean_a = tl.div_rn(sum_a, tl.broadcast_to(mids, sum_a.shape))
        mean_o = tl.div_rn(sum_o, tl.broadcast_to(mids, sum_o.shape))
    return mean_a, mean_o


@triton.jit
def commit_slot(
    cells,
    table,
    slot,
    todo,
    mean_a,
    mean_o,
    grain,
    SLOTS_START: tl.constexpr,
    STAGED_START: tl.constexpr,
    MOMENTUM: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    STRIDE: tl.constexpr,
    GRAIN: tl.constexpr,
):
    """Merge or replace ``slot``: ``todo`` is its entry in ``Plans``, not KEEP."""
    inside = grain < WIDTH
    stored = cells.dtype.element_ty
    row = SLOTS_START + 2 * slot
    source = tl.where(todo == MERGE, row, STAGED_START + 2 * todo)
    at = cells + row_at(table, source * WIDTH, grain, inside, PAGE, STRIDE, GRAIN)
    key = tl.load(at, mask=inside[:, None], other=0.0).to(tl.float32)
    at = cells + row_at(table, source * WIDTH + WIDTH, grain, inside, PAGE, STRIDE, GRAIN)
    value = tl.load(at, mask=inside[:, None], other=0.0).to(tl.float32)
    if todo == MERGE:
        key = tl.fma(mean_a, tl.full(key.shape, 1.0 - MOMENTUM, tl.float32), key * MOMENTUM)
        value = tl.fma(mean_o, tl.full(key.shape, 1.0 - MOMENTUM, tl.float32), value * MOMENTUM)
    at = cells + row_at(table, row * WIDTH, grain, inside, PAGE, STRIDE, GRAIN)
    tl.store(at, key.to(stored), mask=inside[:, None])
    at = cells + row_at(table, row * WIDTH + WIDTH, grain, inside, PAGE, STRIDE, GRAIN)
    tl.store(at, value.to(stored), mask=inside[:, None])


@triton.jit
def keep_sums(
    words,
    table,
    total_a,
    total_o,
    tile_a,
    tile_o,
    keeps_total,
    keeps_tile,
    grain,
    SUMS_WORD: tl.constexpr,
    PAPER: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    STRIDE: tl.constexpr,
    GRAIN: tl.constexpr,
):
    """What the segment's next token needs: ``total_*`` [n] of finished tiles, ``tile_*`` of the
    unfinished one.
    """
    if keeps_total:
        store_sums(
            words, table, TOTAL, total_a, total_o, grain,
            SUMS_WORD, PAPER, WIDTH, PAGE, STRIDE, GRAIN,
        )  # fmt: skip
    if keeps_tile:
        store_sums(
            words, table, UNFINISHED, tile_a, tile_o, grain,
            SUMS_WORD, PAPER, WIDTH, PAGE, STRIDE, GRAIN,
        )  # fmt: skip


@triton.jit(do_not_specialize=["table_stride"])
def piece_sums_kernel(
    pieces,
    table,
    table_stride,
    words,
    plan_sizes,
    tile_sums,
    SEGMENT: tl.constexpr,
    WIDTH: tl.constexpr,
    WORD_PAGE: tl.constexpr,
    WORD_STRIDE: tl.constexpr,
    GRAIN: tl.constexpr,
    SUMS_WORD: tl.constexpr,
    PAPER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (i, block of D): the sums of the i-th piece of several tiles.

    Where the piece commits, the means take the place of its first tile's in ``tile_sums``.
    """
    piece = tl.load(pieces + tl.program_id(0) * COLUMNS + SUMMING)
    at = pieces + piece * COLUMNS
    length, position = tl.load(at + LENGTH), tl.load(at + POSITION)
    first_tile, num_tiles = tl.load(at + FIRST_TILE), tl.load(at + TILES)
    table += tl.load(at + REQUEST).to(tl.int64) * table_stride
    if not is_bank(table, tl.load(at + PAGES)):
        return
    grain = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK // GRAIN) * GRAIN
    inside = (grain < WIDTH)[:, None]
    offset = position % SEGMENT
    end = offset + length

    total_a = tl.zeros([BLOCK // GRAIN, GRAIN], tl.float32)
    total_o = tl.zeros([BLOCK // GRAIN, GRAIN], tl.float32)
    if offset >= TILE:
        total_a, total_o = load_sums(
            words, table, TOTAL, grain, SUMS_WORD, PAPER, WIDTH, WORD_PAGE, WORD_STRIDE, GRAIN
        )
    first = tile_sums + first_tile.to(tl.int64) * 2 * WIDTH
    first = first + grain[:, None] + tl.arange(0, GRAIN)[None, :]
    sums = first
    finished = num_tiles
    if end % TILE != 0:
        finished = num_tiles - 1
    for _j in range(finished):
        total_a += tl.load(sums, mask=inside, other=0.0)
        total_o += tl.load(sums + WIDTH, mask=inside, other=0.0)
        sums += 2 * WIDTH
    is_part = (grain < tl.where(end % TILE != 0, WIDTH, 0))[:, None]
    tile_a = tl.load(sums, mask=is_part, other=0.0)
    tile_o = tl.load(sums + WIDTH, mask=is_part, other=0.0)
    if end == SEGMENT:
        sizes = plan_sizes + piece * 2
        mean_a, mean_o = means_of(total_a + tile_a, total_o + tile_o, sizes, SEGMENT, PAPER)
        tl.store(first, mean_a, mask=inside)
        tl.store(first + WIDTH, mean_o, mask=inside)
    else:
        keep_sums(
            words, table, total_a, total_o, tile_a, tile_o, True, end % TILE != 0, grain,
            SUMS_WORD, PAPER, WIDTH, WORD_PAGE, WORD_STRIDE, GRAIN,
        )  # fmt: skip


@triton.jit(do_not_specialize=["table_stride"])
def slot_update_kernel(
    pieces,
    table,
    table_stride,
    cells,
    plan_slots,
    plan_sizes,
    tile_sums,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    STRIDE: tl.constexpr,
    GRAIN: tl.constexpr,
    SLOTS_START: tl.constexpr,
    STAGED_START: tl.constexpr,
    MOMENTUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (i, block of D, slot): what the commit of the i-th such piece does to a slot."""
    piece = tl.load(pieces + tl.program_id(0) * COLUMNS + SUMMING)
    slot = tl.program_id(2)
    at = pieces + piece * COLUMNS
    table += tl.load(at + REQUEST).to(tl.int64) * table_stride
    if not is_bank(table, tl.load(at + PAGES)):
        return
    todo = tl.load(plan_slots + piece * SIZE + slot)
    if (slot >= tl.load(plan_sizes + piece * 2)) | (todo == KEEP):
        return
    grain = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK // GRAIN) * GRAIN
    inside = (grain < tl.where(todo == MERGE, WIDTH, 0))[:, None]
    means = tile_sums + tl.load(at + FIRST_TILE).to(tl.int64) * 2 * WIDTH
    means = means + grain[:, None] + tl.arange(0, GRAIN)[None, :]
    commit_slot(
        cells, table, slot, todo,
        tl.load(means, mask=inside, other=0.0), tl.load(means + WIDTH, mask=inside, other=0.0),
        grain, SLOTS_START, STAGED_START, MOMENTUM, WIDTH, PAGE, STRIDE, GRAIN,
    )  # fmt: skip


def sum_and_commit(
    banks: DeviceBanks,
    now: DeviceRound,
    rules: MemoryRules,
    plans: Plans,
    tile_sums: torch.Tensor,
) -> None:
    """End the round's pieces of several tiles; ``tile_sums`` [tiles, 2, width] fp32."""
    assert tile_sums.is_contiguous(), tile_sums.stride()
    blocks = cdiv(banks.width, BLOCK)
    piece_sums_kernel[(now.summing, blocks)](
        now.pieces,
        now.table,
        now.table.stride(0),
        banks.words,
        plans.sizes,
        tile_sums,
        **banks.constants(rules, "SEGMENT", "WIDTH", "WORD_PAGE", "WORD_STRIDE", "GRAIN"),
        SUMS_WORD=banks.sums_word,
        PAPER=rules.update is UpdateRule.PAPER,
        BLOCK=BLOCK,
        num_warps=4,
        **OPTIONS,
    )
    if not now.committing:
        return
    slot_update_kernel[(now.committing, blocks, rules.bank_size)](
        now.pieces,
        now.table,
        now.table.stride(0),
        banks.cells,
        plans.slots,
        plans.sizes,
        tile_sums,
        **banks.constants(rules, "SIZE", "WIDTH", "PAGE", "STRIDE", "GRAIN"),
        SLOTS_START=banks.slots_start,
        STAGED_START=banks.staged_start,
        MOMENTUM=rules.momentum,
        BLOCK=BLOCK,
        num_warps=4,
        **OPTIONS,
    )
