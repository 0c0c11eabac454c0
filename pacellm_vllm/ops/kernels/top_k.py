"""What each token finds in its bank: the slots it reads, with what weight, and its kind."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from pacellm_vllm.ops.kernels.bank import (
    OPTIONS,
    VALID,
    DeviceBanks,
    counter_at,
    is_bank,
    next_power_of_2,
    squares_at,
)
from pacellm_vllm.ops.kernels.batch import (
    ALPHA,
    COLUMNS,
    NOISE,
    PAGES,
    POSITION,
    REQUEST,
    THETA_HIGH,
    THETA_LOW,
    TILE_BEFORE,
    TILE_BEGIN,
    TILE_COLUMNS,
    TILE_LENGTH,
    TILE_PIECE,
    DeviceRound,
)
from pacellm_vllm.ops.kernels.similarity import Products, sum_squares
from pacellm_vllm.ops.lookup import MOST_SQUARE, NORM_FLOOR
from pacellm_vllm.ops.rules import MemoryRules

FLOOR, MOST = tl.constexpr(NORM_FLOOR), tl.constexpr(MOST_SQUARE)
HIGH_WEIGHT = tl.constexpr(MemoryRules.high_weight)
MID_WEIGHT = tl.constexpr(MemoryRules.mid_weight)

LOW, MID, HIGH = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# What an unsound token is instead.
NO_KIND = tl.constexpr(-1)
# int32 columns of a token's facts: its kind, how many slots of its list are read from the top and
# from the bottom, and where a low token is stored (see ``bookkeeping``).
KIND, NUM_TOP, NUM_BOTTOM, TARGET = (tl.constexpr(i) for i in range(4))
FACTS = tl.constexpr(4)
# fp32 columns of its shares: of its own activation, and of each slot that is read.
OWN, EACH_TOP, EACH_BOTTOM = (tl.constexpr(i) for i in range(3))
SHARES = tl.constexpr(3)

# Parts of a token's products that are on their way at once.
AHEAD = tl.constexpr(8)

# int64 columns of a row of counts, which is a piece's: tokens by kind, commits, most slots valid
# after a commit, slots valid after the last one, and that one's round. In the first row also a
# clock, which counts rounds: kept on the device, as graphs replay without the host.
HIGHS, ALL_MIDS, ALL_LOWS, COMMITS = (tl.constexpr(i) for i in range(4))
MOST_VALID, LAST_VALID, LAST_ROUND, CLOCK = (tl.constexpr(i) for i in range(4, 8))
TALLY = tl.constexpr(8)


@dataclass(frozen=True)
class Findings:
    """Of each token: ``facts`` [tokens, FACTS] int32, ``shares`` [tokens, SHARES] fp32,
    ``slots`` [tokens, k + k'] int32, its most similar slots first, then its least similar ones,
    ``limits`` likewise fp32, what is left of each slot's length where slots are clipped, and
    ``members`` [tokens, M] int8, 1 for its most similar slots. What is not listed is undefined.
    """

    facts: torch.Tensor
    shares: torch.Tensor
    slots: torch.Tensor
    limits: torch.Tensor
    members: torch.Tensor


@triton.jit
def in_order(bits):
    """Bits of fp32 numbers as integers that compare alike, and back."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def limit_of(token_norm, key_norms, is_picked):
    """What is left of the length of the one slot of ``key_norms`` [n] that is picked."""
    key_norm = tl.sum(tl.where(is_picked, key_norms, 0.0), axis=0)
    return tl.minimum(tl.div_rn(token_norm, key_norm), 1.0)


@triton.jit(do_not_specialize=["table_stride", "groups"])
def top_k_kernel(
    pieces,
    tiles,
    table,
    table_stride,
    words,
    products,
    squares,
    groups,
    facts,
    shares,
    slots,
    limits,
    members,
    tally,
    SIZE: tl.constexpr,
    SLOTS_AT_ONCE: tl.constexpr,
    SEGMENT: tl.constexpr,
    WORD_PAGE: tl.constexpr,
    WORD_STRIDE: tl.constexpr,
    TOP: tl.constexpr,
    BOTTOM: tl.constexpr,
    MID_SELF: tl.constexpr,
    CLIP: tl.constexpr,
):
    """Program (tile, i): token i of the tile. Ties go to the lower slot. The first ticks."""
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(tally + CLOCK, tl.load(tally + CLOCK) + 1)
    tile = tiles + tl.program_id(0) * TILE_COLUMNS
    piece = tl.load(tile + TILE_PIECE)
    begin, length = tl.load(tile + TILE_BEGIN), tl.load(tile + TILE_LENGTH)
    if tl.program_id(1) >= length:
        return
    at = pieces + piece * COLUMNS
    table += tl.load(at + REQUEST).to(tl.int64) * table_stride
    if not is_bank(table, tl.load(at + PAGES)):
        return
    token = (begin + tl.program_id(1)).to(tl.int64)
    found = (tl.load(tile + TILE_BEFORE) + tl.program_id(1)).to(tl.int64) * groups
    facts += token * FACTS
    shares += token * SHARES
    slots += token * (TOP + BOTTOM)
    limits += token * (TOP + BOTTOM)
    position = tl.load(at + POSITION)
    valid = 0
    if position >= SEGMENT:
        valid = tl.load(words + counter_at(table, WORD_STRIDE) + VALID)
    slot = tl.arange(0, SLOTS_AT_ONCE)
    exists = slot < valid
    dots = tl.zeros([SLOTS_AT_ONCE], tl.float32)
    token_square = 0.0
    for group in range(0, groups, AHEAD):
        row = products + (found + group) * (SIZE + 1)
        for j in tl.static_range(AHEAD):
            is_group = group + j < groups
            is_there = slot < tl.where(is_group, valid, 0)
            dots += tl.load(row + slot, mask=is_there, other=0.0)
            token_square += tl.load(row + SIZE, mask=is_group, other=0.0)
            row += SIZE + 1
    sound = token_square <= MOST
    if (valid == 0) | (not sound):
        tl.store(facts + KIND, tl.where(sound, LOW, NO_KIND))
        tl.store(facts + NUM_TOP, 0)
        tl.store(facts + NUM_BOTTOM, 0)
        tl.store(shares + OWN, 1.0)
        tl.store(shares + EACH_TOP, 0.0)
        tl.store(shares + EACH_BOTTOM, 0.0)
        return
    alpha = tl.load(at + ALPHA).to(tl.float32, bitcast=True)
    noise = tl.load(at + NOISE).to(tl.float32, bitcast=True)
    theta_high = tl.load(at + THETA_HIGH).to(tl.float32, bitcast=True)
    theta_low = tl.load(at + THETA_LOW).to(tl.float32, bitcast=True)

    if position % SEGMENT == 0:
        key_squares = sum_squares(squares, piece, groups, slot, exists, SIZE)
    else:
        kept = words + squares_at(table, slot, exists, SIZE, WORD_PAGE, WORD_STRIDE)
        key_squares = tl.load(kept, mask=exists, other=0).to(tl.float32, bitcast=True)
    token_norm = tl.maximum(tl.sqrt_rn(token_square), FLOOR)
    key_norms = tl.maximum(tl.sqrt_rn(key_squares), FLOOR)
    norms = key_norms * token_norm
    cosines = tl.minimum(tl.maximum(tl.div_rn(dots, norms), -1.0), 1.0)
    # As integers, of which a warp finds the largest with one instruction. Adding 0 turns -0 into 0.
    order = in_order((cosines + 0.0).to(tl.int32, bitcast=True))

    count = tl.minimum(valid, TOP)
    best, total = float("-inf"), 0.0
    left = exists
    for j in range(count):
        nearest = tl.max(tl.where(left, order, -0x80000000), axis=0)
        pick = tl.min(tl.where(left & (order == nearest), slot, SLOTS_AT_ONCE), axis=0)
        tl.store(slots + j, pick)
        if CLIP:
            tl.store(limits + j, limit_of(token_norm, key_norms, slot == pick))
        cosine = in_order(nearest).to(tl.float32, bitcast=True)
        best = tl.maximum(best, cosine)
        total += cosine
        left = left & (slot != pick)
    tl.store(members + token * SIZE + slot, (exists & (left == 0)).to(tl.int8), mask=slot < SIZE)
    mean = tl.div_rn(total, count.to(tl.float32))
    kind = tl.where(mean > theta_high, HIGH, tl.where(mean <= theta_low, LOW, MID))

    is_high = best > theta_high
    reads = best > theta_low
    num_bottom = tl.minimum(valid, BOTTOM)
    if (noise == 0.0) | (alpha == 0.0):
        num_bottom = num_bottom * 0
    left = exists
    for j in range(num_bottom):
        furthest = tl.min(tl.where(left, order, 0x7FFFFFFF), axis=0)
        pick = tl.min(tl.where(left & (order == furthest), slot, SLOTS_AT_ONCE), axis=0)
        tl.store(slots + TOP + j, pick)
        if CLIP:
            tl.store(limits + TOP + j, limit_of(token_norm, key_norms, slot == pick))
        left = left & (slot != pick)

    tl.store(facts + KIND, kind)
    tl.store(facts + NUM_TOP, tl.where(reads & (alpha != 0.0), count, 0))
    tl.store(facts + NUM_BOTTOM, tl.where(reads, num_bottom, 0))
    own = (1.0 - alpha) + alpha * tl.where(is_high, 0.0, MID_SELF)
    share = tl.div_rn(alpha, count.to(tl.float32)) * tl.where(is_high, HIGH_WEIGHT, MID_WEIGHT)
    each_bottom = tl.div_rn(alpha * noise, tl.maximum(num_bottom, 1).to(tl.float32))
    tl.store(shares + OWN, tl.where(reads, own, 1.0))
    tl.store(shares + EACH_TOP, share)
    tl.store(shares + EACH_BOTTOM, each_bottom)


def top_k(
    tokens: int,
    found: Products,
    banks: DeviceBanks,
    now: DeviceRound,
    rules: MemoryRules,
    tally: torch.Tensor,
) -> Findings:
    """What the round's of a batch of ``tokens`` find, ``facts`` but for its last column; the round
    is counted.
    """
    assert tally.dtype == torch.int64, tally.dtype
    assert tally.is_contiguous(), tally.stride()
    assert tally.shape[0] >= now.pieces.shape[0], (tally.shape, now.pieces.shape[0])
    size = rules.bank_size
    top, bottom = min(rules.top_k, size), min(rules.negative_k, size)
    device = found.of_tokens.device
    findings = Findings(
        torch.empty(tokens, FACTS.value, dtype=torch.int32, device=device),
        torch.empty(tokens, SHARES.value, dtype=torch.float32, device=device),
        torch.empty(tokens, top + bottom, dtype=torch.int32, device=device),
        torch.empty(tokens if rules.clip else 0, top + bottom, dtype=torch.float32, device=device),
        torch.empty(tokens, size, dtype=torch.int8, device=device),
    )
    top_k_kernel[(now.tiles.shape[0], now.longest)](
        now.pieces,
        now.tiles,
        now.table,
        now.table.stride(0),
        banks.words,
        found.of_tokens,
        found.of_keys,
        found.groups,
        findings.facts,
        findings.shares,
        findings.slots,
        findings.limits,
        findings.members,
        tally,
        **banks.constants(rules, "SIZE", "SEGMENT", "WORD_PAGE", "WORD_STRIDE"),
        SLOTS_AT_ONCE=next_power_of_2(size),
        TOP=top,
        BOTTOM=bottom,
        MID_SELF=rules.mid_self_weight,
        CLIP=rules.clip,
        num_warps=1,
        **OPTIONS,
    )
    return findings
