"""The end of a piece, for a block of D: running sums kept, or the commit of keys and values."""

import torch
import triton
import triton.language as tl

from pacellm_vllm.ops.kernels.bank import DeviceBanks, is_bank, span_at
from pacellm_vllm.ops.kernels.batch import COLUMNS, TILE, DeviceRound
from pacellm_vllm.ops.kernels.book import KEEP, MERGE, Plans
from pacellm_vllm.ops.rules import MemoryRules, UpdateRule



@triton.jit
def row_at(table, row, first, column, WIDTH, PAGE: tl.constexpr, STRIDE: tl.constexpr):
    """Offsets of cells ``first + column`` of a bank's ``row``."""
    return span_at(table, row * WIDTH + first, column, row * WIDTH + WIDTH, PAGE, STRIDE)


@triton.jit
def load_sum(
    words, table, start, first, column, WIDTH, PAGE: tl.constexpr, STRIDE: tl.constexpr
):
    """fp32 [n]: columns ``first + column`` of the running sum at word ``start``."""
    at = words + span_at(table, start + first, column, start + WIDTH, PAGE, STRIDE)
    return tl.load(at, mask=first + column < WIDTH, other=0).to(tl.float32, bitcast=True)


@triton.jit
def store_sum(
    words, table, start, first, column, total, WIDTH, PAGE: tl.constexpr, STRIDE: tl.constexpr
):
    at = words + span_at(table, start + first, column, start + WIDTH, PAGE, STRIDE)
    tl.store(at, total.to(tl.int32, bitcast=True), mask=first + column < WIDTH)


@triton.jit
def commit_block(
    cells,
    table,
    plan,
    valid,
    mean_a,
    mean_o,
    first,
    column,
    SLOTS: tl.constexpr,
    STAGED: tl.constexpr,
    MOMENTUM: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """Merge and replace slots by ``plan`` [valid], see ``book``."""
    inside = first + column < WIDTH
    stored = cells.dtype.element_ty
    for slot in range(valid):
        todo = tl.load(plan + slot)
        if todo != KEEP:
            row = SLOTS + 2 * slot
            source = tl.where(todo == MERGE, row, STAGED + 2 * todo)
            at = cells + row_at(table, source, first, column, WIDTH, PAGE, STRIDE)
            key = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            at = cells + row_at(table, source + 1, first, column, WIDTH, PAGE, STRIDE)
            value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            if todo == MERGE:
                key = tl.fma(mean_a, 1.0 - MOMENTUM, key * MOMENTUM)
                value = tl.fma(mean_o, 1.0 - MOMENTUM, value * MOMENTUM)
            at = cells + row_at(table, row, first, column, WIDTH, PAGE, STRIDE)
            tl.store(at, key.to(stored), mask=inside)
            at = cells + row_at(table, row + 1, first, column, WIDTH, PAGE, STRIDE)
            tl.store(at, value.to(stored), mask=inside)


@triton.jit
def close_block(
    cells,
    words,
    table,
    plan,
    sizes,
    total_a,
    total_o,
    tile_a,
    tile_o,
    keeps_total,
    keeps_tile,
    commits,
    first,
    column,
    SEGMENT: tl.constexpr,
    SLOTS: tl.constexpr,
    SUMS: tl.constexpr,
    STAGED: tl.constexpr,
    PAPER: tl.constexpr,
    MOMENTUM: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    STRIDE: tl.constexpr,
    WORD_PAGE: tl.constexpr,
    WORD_STRIDE: tl.constexpr,
):
    """Commit if the piece ends its segment, else keep what the segment's next token needs.

    ``total_*`` [n] are sums of finished tiles, ``tile_*`` of the unfinished one. In the `paper`
    rule only sums of a exist.
    """
    if commits:
        sum_a, sum_o = total_a + tile_a, total_o + tile_o
        if PAPER:
            mean_a = tl.div_rn(sum_a, tl.full(sum_a.shape, SEGMENT, tl.float32))
            mean_o = mean_a
        else:
            mids = tl.maximum(tl.load(sizes + 1), 1).to(tl.float32)
            mean_a = tl.div_rn(sum_a, tl.broadcast_to(mids, sum_a.shape))
            mean_o = tl.div_rn(sum_o, tl.broadcast_to(mids, sum_o.shape))
        valid = tl.load(sizes)
        commit_block(
            cells, table, plan, valid, mean_a, mean_o, first, column,
            SLOTS, STAGED, MOMENTUM, WIDTH, PAGE, STRIDE,
        )  # fmt: skip
    else:
        if keeps_total:
            store_sum(words, table, SUMS, first, column, total_a, WIDTH, WORD_PAGE, WORD_STRIDE)
            if not PAPER:
                start = SUMS + WIDTH
                store_sum(
                    words, table, start, first, column, total_o, WIDTH, WORD_PAGE, WORD_STRIDE
                )
        if keeps_tile:
            start = SUMS + 2 * WIDTH
            store_sum(words, table, start, first, column, tile_a, WIDTH, WORD_PAGE, WORD_STRIDE)
            if not PAPER:
                start = SUMS + 3 * WIDTH
                store_sum(
                    words, table, start, first, column, tile_o, WIDTH, WORD_PAGE, WORD_STRIDE
                )


@triton.jit(do_not_specialize=["table_stride"])
def close_kernel(
    pieces,
    tiles,
    table,
    table_stride,
    cells,
    words,
    plan_slots,
    plan_sizes,
    tile_sums,
    SIZE: tl.constexpr,
    SEGMENT: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    STRIDE: tl.constexpr,
    WORD_PAGE: tl.constexpr,
    WORD_STRIDE: tl.constexpr,
    SLOTS: tl.constexpr,
    SUMS: tl.constexpr,
    STAGED: tl.constexpr,
    PAPER: tl.constexpr,
    MOMENTUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (piece, block of D): the end of a piece of several tiles, from ``tile_sums``."""
    piece = tl.program_id(0)
    at = pieces + piece * COLUMNS
    length, position, first_tile, num_tiles = (
        tl.load(at + 1),
        tl.load(at + 2),
        tl.load(at + 5),
        tl.load(at + 6),
    )
    table += tl.load(at + 3).to(tl.int64) * table_stride
    if (num_tiles == 1) | (position < SEGMENT) | (not is_bank(table, tl.load(at + 4))):
        return
    first = tl.program_id(1) * BLOCK
    column = tl.arange(0, BLOCK)
    inside = first + column < WIDTH
    offset = position % SEGMENT
    end = offset + length

    total_a = tl.zeros([BLOCK], tl.float32)
    total_o = tl.zeros([BLOCK], tl.float32)
    if offset >= TILE:
        total_a = load_sum(words, table, SUMS, first, column, WIDTH, WORD_PAGE, WORD_STRIDE)
        if not PAPER:
            total_o = load_sum(
                words, table, SUMS + WIDTH, first, column, WIDTH, WORD_PAGE, WORD_STRIDE
            )
    sums = tile_sums + first_tile.to(tl.int64) * 2 * WIDTH + first + column
    finished = num_tiles
    if end % TILE != 0:
        finished = num_tiles - 1
    for j in range(finished):
        total_a += tl.load(sums, mask=inside, other=0.0)
        total_o += tl.load(sums + WIDTH, mask=inside, other=0.0)
        sums += 2 * WIDTH
    is_part = first + column < tl.where(end % TILE != 0, WIDTH, 0)
    tile_a = tl.load(sums, mask=is_part, other=0.0)
    tile_o = tl.load(sums + WIDTH, mask=is_part, other=0.0)
    close_block(
        cells, words, table, plan_slots + piece * SIZE, plan_sizes + piece * 2,
        total_a, total_o, tile_a, tile_o, True, end % TILE != 0, end == SEGMENT, first, column,
        SEGMENT, SLOTS, SUMS, STAGED, PAPER, MOMENTUM,
        WIDTH, PAGE, STRIDE, WORD_PAGE, WORD_STRIDE,
    )  # fmt: skip


def constants_of(banks: DeviceBanks, rules: MemoryRules, block: int) -> dict[str, object]:
    """What ``apply_kernel`` and ``close_kernel`` are compiled for."""
    return {
        **banks.constants(rules),
        "SLOTS": banks.slots_start,
        "SUMS": banks.sums_start * banks.width * banks.cells.element_size() // 4,
        "STAGED": banks.staged_start,
        "PAPER": rules.update is UpdateRule.PAPER,
        "MOMENTUM": rules.momentum,
        "BLOCK": block,
    }


def close(
    banks: DeviceBanks,
    now: DeviceRound,
    rules: MemoryRules,
    plans: Plans,
    tile_sums: torch.Tensor,
    block: int,
) -> None:
    """End the round's pieces of several tiles; ``tile_sums`` [tiles, 2, width] fp32."""
    assert tile_sums.is_contiguous(), tile_sums.stride()
    close_kernel[(len(now.pieces), triton.cdiv(banks.width, block))](
        now.pieces,
        now.tiles,
        now.table,
        now.table.stride(0),
        banks.cells,
        banks.words,
        plans.slots,
        plans.sizes,
        tile_sums,
        **constants_of(banks, rules, block),
        num_warps=4,
    )
