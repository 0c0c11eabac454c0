"""advance_steps: one token each of many requests, every bank read where it lies.

The same arithmetic as ``update.advance`` with n = 1. A step of one token meets cold caches, where
every PyTorch call costs tens of microseconds whatever it computes; so decisions, which are about
a hundred numbers a bank, are taken on plain Python numbers, and PyTorch sees rows of D only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nlargest, nsmallest

import torch

from pacellm_vllm.ops.lookup import MOST_SQUARE, NORM_FLOOR, Reduce, twins_of
from pacellm_vllm.ops.rules import MemoryRules, UpdateRule
from pacellm_vllm.ops.sums import TILE, add_one
from pacellm_vllm.ops.update import BankStore, Header, Progress, commit


def advance_steps(
    stores: Sequence[BankStore],
    a: torch.Tensor,
    positions: Sequence[int],
    rules: Sequence[MemoryRules],
    reduce: Reduce | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[Progress]]:
    """Run one token through each of R banks, committing where it ends a segment.

    ``a`` [R, D] and ``positions`` are the tokens', one a bank. ``rules`` [R] may differ in
    ``alpha``, ``noise`` and the thresholds only. Returns outputs [R, D] in the dtype of ``a``, in
    ``out`` if it is given.
    """
    if out is None:
        out = torch.empty_like(a)
    words = [store.read_words() for store in stores]
    for row, position in zip(words, positions, strict=True):
        segment, offset = divmod(position, rules[0].segment_size)
        if offset == 0:
            Header.unpack(row).start_segment(first=segment == 0)
    counts = [row[:3].tolist() for row in words]
    found = _find(stores, a, [valid for valid, _, _ in counts], words, rules, reduce)
    return out, [
        _advance(store, row, count, a_row, out_row, position, one, own)
        for store, row, count, a_row, out_row, position, one, own in zip(
            stores, words, counts, a, out, positions, found, rules, strict=True
        )
    ]


@dataclass
class _Found:
    """What a token found: ``row`` its similarities to the valid slots, ``top`` the best slots,
    ``norm`` its own and ``norms`` the slots' keys'.

    An unsound token finds nothing, and its ``mean_top`` is NaN, which makes it of no kind.
    """

    row: list[float]
    top: list[int]
    mean_top: float
    norm: float
    norms: list[float]


def _find(
    stores: Sequence[BankStore],
    a: torch.Tensor,
    valid: list[int],
    words: list[torch.Tensor],
    rules: Sequence[MemoryRules],
    reduce: Reduce | None,
) -> list[_Found]:
    size = rules[0].bank_size
    a32 = a.float()
    # A bank's products, its keys' squared norms, and its token's: what ranks sum up, as in look_up.
    parts = a32.new_zeros(len(valid), 2 * size + 1)
    for store, row, token, header, count in zip(stores, parts, a32, words, valid, strict=True):
        if count:
            store.products(token, row[:count])
            squares = Header.squares_of(header)[:count]
            row[size : size + count] = squares
            twins = twins_of(squares)
            if twins is not None:
                row[:count] = row[twins]
        torch.dot(token, token, out=row[-1])
    if reduce is not None:
        parts = reduce(parts)
    found = []
    sound = (parts[:, -1] <= MOST_SQUARE).tolist()
    parts[:, size:].sqrt_().clamp_min_(NORM_FLOOR)
    for numbers, count, own, kept in zip(parts.tolist(), valid, rules, sound, strict=True):
        if not kept:
            found.append(_Found([], [], float("nan"), 0.0, []))
            continue
        norm = numbers[-1]
        norms = numbers[size : size + count]
        row = [dot / (norm * key) for dot, key in zip(numbers[:count], norms, strict=True)]
        # Rare, and a call for each slot would take longer than all of the above.
        if row and not -1 <= min(row) <= max(row) <= 1:
            row = [min(max(cosine, -1.0), 1.0) for cosine in row]
        # Both keep the lower slot first among equals, as sorted() would.
        top = nlargest(own.top_k, range(count), key=row.__getitem__)
        mean = sum(row[slot] for slot in top) / len(top) if top else float("-inf")
        found.append(_Found(row, top, mean, norm, norms))
    return found


def _advance(
    store: BankStore,
    words: torch.Tensor,
    counts: list[int],
    a: torch.Tensor,
    out: torch.Tensor,
    position: int,
    found: _Found,
    rules: MemoryRules,
) -> Progress:
    """One token of one bank: ``a`` and ``out`` [D], ``words`` and ``counts`` its header."""
    valid, mids, lows = counts
    segment, offset = divmod(position, rules.segment_size)
    _enhance(store, a, out, found, rules)
    kind = rules.kind(found.mean_top)
    high, mid, low = kind == "high", kind == "mid", kind == "low"
    paper = rules.update is UpdateRule.PAPER

    if low:
        rank = lows - (rules.bank_size - valid)
        if rank < 0:
            store.write_slots([valid + lows], [a], [out])
        elif rank < min(rules.max_insertions, valid):
            store.write_staged([rank], [a], [out])
    if segment:
        adds = [a] if paper and kind else [a, out] if mid else []
        if adds or offset == 0 or (offset + 1) % TILE == 0:
            sums = a.new_zeros(4, len(a), dtype=torch.float32) if offset == 0 else store.read_sums()
            add_one(sums, adds, offset)
            store.write_sums(sums)
    if mid:
        words[1] = mids + 1
        if segment:
            Header.unpack(words).merge[found.top] = 1
    elif low:
        words[2] = lows + 1
    elif high and paper:
        Header.unpack(words).confirm[found.top] += 1
    committed = None
    if offset + 1 == rules.segment_size:
        committed = commit(store, Header.unpack(words), valid, rules)
    if paper or not high or offset == 0 or committed is not None:
        store.write_words(words)
    return Progress(int(high), int(mid), int(low), committed, [found.mean_top], [found.top])


def _enhance(
    store: BankStore, a: torch.Tensor, out: torch.Tensor, found: _Found, rules: MemoryRules
) -> None:
    """Write one token's output [D]."""
    kind = rules.kind(found.row[found.top[0]]) if found.top else "low"
    if kind == "low" or not rules.alpha:
        out.copy_(a)
        return
    high = kind == "high"
    own = (1 - rules.alpha) + rules.alpha * (0.0 if high else rules.mid_self_weight)
    share = rules.high_weight if high else rules.mid_weight
    weights = dict.fromkeys(found.top, rules.alpha / len(found.top) * share)
    if rules.noise:
        bottom = nsmallest(rules.negative_k, range(len(found.row)), key=found.row.__getitem__)
        for slot in bottom:
            weights[slot] = weights.get(slot, 0.0) + rules.alpha * rules.noise / len(bottom)
    total = torch.mul(a, own, out=out) if a.dtype is torch.float32 else a.float().mul_(own)
    for slot, weight in weights.items():
        limit = min(found.norm / found.norms[slot], 1.0) if rules.clip else 1.0
        store.add_value(slot, weight * limit, total)
    if total is not out:
        out.copy_(total)
