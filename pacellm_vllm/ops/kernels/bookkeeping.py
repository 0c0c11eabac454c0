"""The bookkeeping of a piece: who is stored where, and what a commit will do."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from pacellm_vllm.ops.kernels.bank import (
    LOWS,
    MIDS,
    OPTIONS,
    PER_SLOT,
    VALID,
    DeviceBanks,
    counter_at,
    is_bank,
    next_power_of_2,
    squares_at,
    word_at,
)
from pacellm_vllm.ops.kernels.batch import (
    BEGIN,
    COLUMNS,
    LENGTH,
    PAGES,
    POSITION,
    REQUEST,
    DeviceRound,
)
from pacellm_vllm.ops.kernels.similarity import Products, sum_squares
from pacellm_vllm.ops.kernels.top_k import (
    ALL_LOWS,
    ALL_MIDS,
    CLOCK,
    COMMITS,
    FACTS,
    HIGH,
    HIGHS,
    KIND,
    LAST_ROUND,
    LAST_VALID,
    LOW,
    MID,
    MOST_VALID,
    TALLY,
    TARGET,
    Findings,
)
from pacellm_vllm.ops.rules import MemoryRules, UpdateRule

# A low token's target is a slot, or SIZE + a staging row, or NOWHERE.
NOWHERE = tl.constexpr(-1)
# What a commit does to a slot, unless it takes a staging row (0 or more).
KEEP, MERGE = tl.constexpr(-2), tl.constexpr(-1)


@dataclass(frozen=True)
class Plans:
    """Of each piece, for its commit: ``slots`` [pieces, M] int32, KEEP, MERGE or a staging row, of
    the slots valid before it, and ``sizes`` [pieces, 2] int32, how many those are and the mid
    tokens of its segment so far. Pieces that commit nothing leave ``slots`` undefined.
    """

    slots: torch.Tensor
    sizes: torch.Tensor


@triton.jit(do_not_specialize=["table_stride", "groups"])
def bookkeeping_kernel(
    pieces,
    table,
    table_stride,
    words,
    squares,
    groups,
    facts,
    members,
    plan_slots,
    plan_sizes,
    tally,
    SIZE: tl.constexpr,
    SLOTS_AT_ONCE: tl.constexpr,
    SEGMENT: tl.constexpr,
    WORD_PAGE: tl.constexpr,
    WORD_STRIDE: tl.constexpr,
    INSERTIONS: tl.constexpr,
    PAPER: tl.constexpr,
    TOKENS_AT_ONCE: tl.constexpr,
):
    """Program (piece): its tokens in order, then the header."""
    piece = tl.program_id(0)
    at = pieces + piece * COLUMNS
    begin, length = tl.load(at + BEGIN), tl.load(at + LENGTH)
    position = tl.load(at + POSITION)
    table += tl.load(at + REQUEST).to(tl.int64) * table_stride
    if not is_bank(table, tl.load(at + PAGES)):
        return

    slot = tl.arange(0, SLOTS_AT_ONCE)
    in_size = slot < SIZE
    counters = words + counter_at(table, WORD_STRIDE)
    word = PER_SLOT + slot
    usage_at = words + word_at(table, word, in_size, WORD_PAGE, WORD_STRIDE)
    merge_at = words + word_at(table, word + SIZE, in_size, WORD_PAGE, WORD_STRIDE)
    confirm_at = words + word_at(table, word + 2 * SIZE, in_size, WORD_PAGE, WORD_STRIDE)

    # What a segment's, or a request's, first token finds in the header is somebody else's.
    offset = position % SEGMENT
    running = offset > 0
    valid = tl.load(counters + VALID, mask=position >= SEGMENT, other=0)
    mids = tl.load(counters + MIDS, mask=running, other=0)
    lows = tl.load(counters + LOWS, mask=running, other=0)
    usage = tl.load(usage_at, mask=slot < tl.where(position > 0, SIZE, 0), other=0)
    is_running = slot < tl.where(running, SIZE, 0)
    merge = tl.load(merge_at, mask=is_running, other=0)
    confirm = tl.load(confirm_at, mask=is_running, other=0)

    if (offset == 0) & (valid > 0):
        exists = slot < valid
        kept = words + squares_at(table, slot, exists, SIZE, WORD_PAGE, WORD_STRIDE)
        numbers = sum_squares(squares, piece, groups, slot, exists, SIZE)
        tl.store(kept, numbers.to(tl.int32, bitcast=True), mask=exists)

    free = SIZE - valid
    room = free + tl.minimum(valid, INSERTIONS)
    highs, mids_before, lows_before = 0, mids, lows
    for start in range(0, length, TOKENS_AT_ONCE):
        i = start + tl.arange(0, TOKENS_AT_ONCE)
        token = (begin + i).to(tl.int64)
        kind = tl.load(facts + token * FACTS + KIND, mask=i < length, other=-1)
        is_low = (kind == LOW).to(tl.int32)
        place = lows + tl.cumsum(is_low, axis=0) - is_low
        target = tl.where(place < free, valid + place, SIZE + place - free)
        target = tl.where((is_low == 1) & (place < room), target, NOWHERE)
        tl.store(facts + token * FACTS + TARGET, target, mask=i < length)
        found = tl.load(
            members + token[:, None] * SIZE + slot[None, :],
            mask=(kind > LOW)[:, None] & in_size[None, :],
            other=0,
        ).to(tl.int32)
        merge = tl.maximum(merge, tl.max(tl.where((kind == MID)[:, None], found, 0), axis=0))
        if PAPER:
            confirm += tl.sum(tl.where((kind == HIGH)[:, None], found, 0), axis=0)
        highs += tl.sum((kind == HIGH).to(tl.int32), axis=0)
        mids += tl.sum((kind == MID).to(tl.int32), axis=0)
        lows += tl.sum(is_low, axis=0)

    tl.store(plan_sizes + piece * 2, valid)
    tl.store(plan_sizes + piece * 2 + 1, mids)
    counts = tally + piece * TALLY
    tl.store(counts + HIGHS, tl.load(counts + HIGHS) + highs)
    tl.store(counts + ALL_MIDS, tl.load(counts + ALL_MIDS) + mids - mids_before)
    tl.store(counts + ALL_LOWS, tl.load(counts + ALL_LOWS) + lows - lows_before)

    if offset + length == SEGMENT:
        exists = slot < valid
        usage += tl.where(exists, confirm + merge, 0)
        plan = tl.where(merge > 0, MERGE, KEEP)
        taken = tl.minimum(lows, free)
        replaced = tl.minimum(tl.minimum(lows - taken, INSERTIONS), valid)
        left = exists
        used = usage
        for row in range(replaced):
            least = tl.min(tl.where(left, used, 0x7FFFFFFF), axis=0)
            pick = tl.min(tl.where(left & (used == least), slot, SLOTS_AT_ONCE), axis=0)
            plan = tl.where(slot == pick, row, plan)
            usage = tl.where(slot == pick, 1, usage)
            left = left & (slot != pick)
        usage = tl.where((slot >= valid) & (slot < valid + taken), 1, usage)
        valid += taken
        tl.store(plan_slots + piece * SIZE + slot, plan, mask=in_size)
        tl.store(counts + COMMITS, tl.load(counts + COMMITS) + 1)
        tl.store(counts + MOST_VALID, tl.maximum(tl.load(counts + MOST_VALID), valid.to(tl.int64)))
        tl.store(counts + LAST_VALID, valid.to(tl.int64))
        tl.store(counts + LAST_ROUND, tl.load(tally + CLOCK))

    tl.store(counters + VALID, valid)
    tl.store(counters + MIDS, mids)
    tl.store(counters + LOWS, lows)
    tl.store(usage_at, usage, mask=in_size)
    tl.store(merge_at, merge, mask=in_size)
    tl.store(confirm_at, confirm, mask=in_size)


def bookkeeping(
    found: Products,
    findings: Findings,
    banks: DeviceBanks,
    now: DeviceRound,
    rules: MemoryRules,
    tally: torch.Tensor,
) -> Plans:
    """Headers brought up to date, low tokens told their targets, commits planned.

    ``tally`` [at least pieces, TALLY] int64 counts on, one row a piece, without atomics.
    """
    size = rules.bank_size
    device = tally.device
    plans = Plans(
        torch.empty(now.pieces.shape[0], size, dtype=torch.int32, device=device),
        torch.empty(now.pieces.shape[0], 2, dtype=torch.int32, device=device),
    )
    at_once = next_power_of_2(size)
    num_warps = 16 if now.longest > 1 else 4
    bookkeeping_kernel[(now.pieces.shape[0],)](
        now.pieces,
        now.table,
        now.table.stride(0),
        banks.words,
        found.of_keys,
        found.groups,
        findings.facts,
        findings.members,
        plans.slots,
        plans.sizes,
        tally,
        **banks.constants(rules, "SIZE", "SEGMENT", "WORD_PAGE", "WORD_STRIDE"),
        SLOTS_AT_ONCE=at_once,
        INSERTIONS=rules.max_insertions,
        PAPER=rules.update is UpdateRule.PAPER,
        # All are integers, so that this changes no bit.
        TOKENS_AT_ONCE=max(4, min(64, 4096 // at_once)) * (num_warps // 4),
        num_warps=num_warps,
        **OPTIONS,
    )
    return plans
