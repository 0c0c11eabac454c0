"""What needs D, token by token: outputs, low tokens' rows, and the running sums."""

import torch
import triton
import triton.language as tl

from pacellm_vllm.ops.kernels.bank import OPTIONS, DeviceBanks, cdiv, is_bank, row_at
from pacellm_vllm.ops.kernels.batch import (
    BEGIN,
    COLUMNS,
    PAGES,
    POSITION,
    REQUEST,
    TILE,
    TILE_BEGIN,
    TILE_COLUMNS,
    TILE_LENGTH,
    TILE_PIECE,
    TILES,
    DeviceRound,
)
from pacellm_vllm.ops.kernels.bookkeeping import KEEP, Plans
from pacellm_vllm.ops.kernels.commit import (
    BLOCK,
    TOTAL,
    UNFINISHED,
    commit_slot,
    keep_sums,
    load_sums,
    means_of,
    sum_and_commit,
)
from pacellm_vllm.ops.kernels.top_k import (
    EACH_BOTTOM,
    EACH_TOP,
    FACTS,
    KIND,
    MID,
    NO_KIND,
    NUM_BOTTOM,
    NUM_TOP,
    OWN,
    SHARES,
    TARGET,
    Findings,
)
from pacellm_vllm.ops.rules import MemoryRules, UpdateRule

# Longer lists of slots are walked in a loop instead of being unrolled.
UNROLLED = 16


@triton.jit
def add_value(
    acc,
    cells,
    table,
    at,
    limit,
    is_read,
    share,
    grain,
    SLOTS_START: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    STRIDE: tl.constexpr,
    GRAIN: tl.constexpr,
    CLIP: tl.constexpr,
):
    """``acc`` + ``share`` x the value of the slot named at ``at``, if ``is_read``.

    With CLIP of ``share`` as much as is written at ``limit``.
    """
    if CLIP:
        share *= tl.load(limit, mask=is_read, other=0.0)
    row = SLOTS_START + 2 * tl.load(at, mask=is_read, other=0) + 1
    inside = grain < tl.where(is_read, WIDTH, 0)
    where = cells + row_at(table, row * WIDTH, grain, inside, PAGE, STRIDE, GRAIN)
    value = tl.load(where, mask=inside[:, None], other=0.0).to(tl.float32)
    return tl.where(is_read, tl.fma(value, tl.broadcast_to(share, value.shape), acc), acc)


@triton.jit
def add_values(
    acc,
    cells,
    table,
    at,
    limit,
    count,
    share,
    grain,
    MOST: tl.constexpr,
    UNROLL: tl.constexpr,
    SLOTS_START: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    STRIDE: tl.constexpr,
    GRAIN: tl.constexpr,
    CLIP: tl.constexpr,
):
    """``add_value`` of the first ``count`` of MOST slots from ``at`` on, in order."""
    if UNROLL:
        for j in tl.static_range(MOST):
            acc = add_value(
                acc, cells, table, at + j, limit + j, count > j, share, grain,
                SLOTS_START, WIDTH, PAGE, STRIDE, GRAIN, CLIP,
            )  # fmt: skip
    else:
        for j in range(count):
            acc = add_value(
                acc, cells, table, at + j, limit + j, count > j, share, grain,
                SLOTS_START, WIDTH, PAGE, STRIDE, GRAIN, CLIP,
            )  # fmt: skip
    return acc


@triton.jit(do_not_specialize=["table_stride"])
def blend_kernel(
    a,
    out,
    pieces,
    tiles,
    table,
    table_stride,
    cells,
    words,
    facts,
    shares,
    lists,
    limits,
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
    GRAIN: tl.constexpr,
    SLOTS_START: tl.constexpr,
    SUMS_WORD: tl.constexpr,
    STAGED_START: tl.constexpr,
    PAPER: tl.constexpr,
    MOMENTUM: tl.constexpr,
    BLOCK: tl.constexpr,
    TOP: tl.constexpr,
    BOTTOM: tl.constexpr,
    UNROLL: tl.constexpr,
    CLIP: tl.constexpr,
):
    """Program (tile, block of D): the tile's tokens in order, and the piece's end if it is all.

    A piece of several tiles leaves its sums in ``tile_sums``, see ``sum_and_commit``.
    """
    tile = tiles + tl.program_id(0) * TILE_COLUMNS
    piece = tl.load(tile + TILE_PIECE)
    begin, length = tl.load(tile + TILE_BEGIN), tl.load(tile + TILE_LENGTH)
    at = pieces + piece * COLUMNS
    piece_begin, position = tl.load(at + BEGIN), tl.load(at + POSITION)
    num_tiles = tl.load(at + TILES)
    table += tl.load(at + REQUEST).to(tl.int64) * table_stride
    grain = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK // GRAIN) * GRAIN
    is_column = grain < WIDTH
    column = grain[:, None] + tl.arange(0, GRAIN)[None, :]
    inside = is_column[:, None]
    if not is_bank(table, tl.load(at + PAGES)):
        for i in range(length):
            row = (begin + i).to(tl.int64) * WIDTH + column
            tl.store(out + row, tl.load(a + row, mask=inside), mask=inside)
        return

    later = position >= SEGMENT
    offset = position % SEGMENT + begin - piece_begin
    ends_tile = (offset + length) % TILE == 0
    commits = offset + length == SEGMENT
    lane = tl.arange(0, TILE)
    its_kind = facts + (begin + lane).to(tl.int64) * FACTS + KIND
    kinds = tl.load(its_kind, mask=lane < length, other=-1)
    adds = later
    if not PAPER:
        adds = later & (tl.sum((kinds == MID).to(tl.int32), axis=0) > 0)

    sum_a = tl.zeros([BLOCK // GRAIN, GRAIN], tl.float32)
    sum_o = tl.zeros([BLOCK // GRAIN, GRAIN], tl.float32)
    if later & (offset % TILE > 0) & (adds | ends_tile | commits):
        sum_a, sum_o = load_sums(
            words, table, UNFINISHED, grain, SUMS_WORD, PAPER, WIDTH, WORD_PAGE, WORD_STRIDE, GRAIN
        )

    for i in range(length):
        token = (begin + i).to(tl.int64)
        row = token * WIDTH + column
        own = tl.load(a + row, mask=inside, other=0.0)
        fact = facts + token * FACTS
        kind, target = tl.load(fact + KIND), tl.load(fact + TARGET)
        num_top, num_bottom = tl.load(fact + NUM_TOP), tl.load(fact + NUM_BOTTOM)
        share = shares + token * SHARES
        top_share, bottom_share = tl.load(share + EACH_TOP), tl.load(share + EACH_BOTTOM)
        slots = lists + token * (TOP + BOTTOM)
        limit = limits + token * (TOP + BOTTOM)
        acc = own.to(tl.float32) * tl.load(share + OWN)
        acc = add_values(
            acc, cells, table, slots, limit, num_top, top_share, grain,
            TOP, UNROLL, SLOTS_START, WIDTH, PAGE, STRIDE, GRAIN, CLIP,
        )  # fmt: skip
        acc = add_values(
            acc, cells, table, slots + TOP, limit + TOP, num_bottom, bottom_share, grain,
            BOTTOM, UNROLL, SLOTS_START, WIDTH, PAGE, STRIDE, GRAIN, CLIP,
        )  # fmt: skip
        o = acc.to(out.dtype.element_ty)
        tl.store(out + row, o, mask=inside)
        if target >= 0:
            into = tl.where(
                target < SIZE, SLOTS_START + 2 * target, STAGED_START + 2 * (target - SIZE)
            )
            where = cells + row_at(table, into * WIDTH, grain, is_column, PAGE, STRIDE, GRAIN)
            tl.store(where, own.to(cells.dtype.element_ty), mask=inside)
            start = into * WIDTH + WIDTH
            where = cells + row_at(table, start, grain, is_column, PAGE, STRIDE, GRAIN)
            tl.store(where, o.to(cells.dtype.element_ty), mask=inside)
        if PAPER:
            if kind != NO_KIND:
                sum_a += own.to(tl.float32)
        else:
            if kind == MID:
                sum_a += own.to(tl.float32)
                sum_o += o.to(tl.float32)

    if not later:
        return
    if num_tiles > 1:
        sums = tile_sums + tl.program_id(0).to(tl.int64) * 2 * WIDTH + column
        tl.store(sums, sum_a, mask=inside)
        tl.store(sums + WIDTH, sum_o, mask=inside)
        return

    # Other threads' loads of values and stores of staging rows must come before the commit's.
    tl.debug_barrier()
    total_a = tl.zeros([BLOCK // GRAIN, GRAIN], tl.float32)
    total_o = tl.zeros([BLOCK // GRAIN, GRAIN], tl.float32)
    if (offset >= TILE) & (ends_tile | commits):
        total_a, total_o = load_sums(
            words, table, TOTAL, grain, SUMS_WORD, PAPER, WIDTH, WORD_PAGE, WORD_STRIDE, GRAIN
        )
    if ends_tile:
        total_a += sum_a
        total_o += sum_o
        sum_a = tl.zeros([BLOCK // GRAIN, GRAIN], tl.float32)
        sum_o = tl.zeros([BLOCK // GRAIN, GRAIN], tl.float32)
    keeps_tile = (not ends_tile) & (adds | (offset % TILE == 0))
    if commits:
        sizes = plan_sizes + piece * 2
        mean_a, mean_o = means_of(total_a + sum_a, total_o + sum_o, sizes, SEGMENT, PAPER)
        for slot in range(tl.load(sizes)):
            todo = tl.load(plan_slots + piece * SIZE + slot)
            if todo != KEEP:
                commit_slot(
                    cells, table, slot, todo, mean_a, mean_o, grain,
                    SLOTS_START, STAGED_START, MOMENTUM, WIDTH, PAGE, STRIDE, GRAIN,
                )  # fmt: skip
    else:
        keep_sums(
            words, table, total_a, total_o, sum_a, sum_o, ends_tile, keeps_tile, grain,
            SUMS_WORD, PAPER, WIDTH, WORD_PAGE, WORD_STRIDE, GRAIN,
        )  # fmt: skip


def blend(
    a: torch.Tensor,
    out: torch.Tensor,
    banks: DeviceBanks,
    now: DeviceRound,
    rules: MemoryRules,
    findings: Findings,
    plans: Plans,
) -> None:
    """The round's outputs into ``out``, both like ``a`` [tokens, width], and their banks' rows.

    Tokens without a bank pass through.
    """
    for tensor in (a, out):
        assert tensor.is_contiguous(), tensor.stride()
        assert tensor.shape[1] == banks.width, (tensor.shape, banks.width)
    assert a.shape == out.shape, (a.shape, out.shape)
    assert a.dtype == out.dtype, (a.dtype, out.dtype)
    size = rules.bank_size
    top, bottom = min(rules.top_k, size), min(rules.negative_k, size)
    tile_sums = torch.empty(
        (now.tiles.shape[0], 2, banks.width) if now.summing else (1, 2, 1),
        dtype=torch.float32,
        device=a.device,
    )
    blend_kernel[(now.tiles.shape[0], cdiv(banks.width, BLOCK))](
        a,
        out,
        now.pieces,
        now.tiles,
        now.table,
        now.table.stride(0),
        banks.cells,
        banks.words,
        findings.facts,
        findings.shares,
        findings.slots,
        findings.limits,
        plans.slots,
        plans.sizes,
        tile_sums,
        **banks.constants(rules),
        SLOTS_START=banks.slots_start,
        SUMS_WORD=banks.sums_word,
        STAGED_START=banks.staged_start,
        PAPER=rules.update is UpdateRule.PAPER,
        MOMENTUM=rules.momentum,
        BLOCK=BLOCK,
        TOP=top,
        BOTTOM=bottom,
        UNROLL=top + bottom <= UNROLLED,
        CLIP=rules.clip,
        num_warps=4,
        **OPTIONS,
    )
    if now.summing:
        sum_and_commit(banks, now, rules, plans, tile_sums)
