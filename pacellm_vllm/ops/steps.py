"""advance_steps: one token each of many requests, every bank read where it lies.

The same arithmetic as ``update.advance`` with n = 1, batched over requests; only commits, one
token in ``segment_size``, go bank by bank.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from pacellm_vllm.ops.lookup import NORM_FLOOR, Reduce
from pacellm_vllm.ops.rules import MemoryRules, UpdateRule
from pacellm_vllm.ops.sums import TILE
from pacellm_vllm.ops.update import BankStore, Header, Progress, commit


class Banks(Protocol):
    """R banks of one layer. ``which`` [j] int64 names banks, ``slots``, ``rows`` count in each."""

    def bank(self, index: int) -> BankStore: ...

    def read_words(self) -> torch.Tensor:
        """Packed headers [R, words] int32, a copy."""

    def write_words(self, words: torch.Tensor) -> None: ...

    def products(self, a: torch.Tensor, counts: Sequence[int], out: torch.Tensor) -> None:
        """Write each bank's first ``counts`` keys times its row of ``a`` [R, D] to ``out`` [R, M].

        fp32; what lies behind ``counts`` is left as it is.
        """

    def read_values(self, which: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """[j, k, D] for ``slots`` [j, k]."""

    def write_slots(
        self, which: torch.Tensor, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None: ...

    def write_staged(
        self, which: torch.Tensor, rows: torch.Tensor, a: torch.Tensor, o: torch.Tensor
    ) -> None: ...

    def read_sums(self, which: torch.Tensor) -> torch.Tensor:
        """[j, 4, D] fp32."""

    def write_sums(self, which: torch.Tensor, sums: torch.Tensor) -> None: ...


def advance_steps(
    banks: Banks,
    a: torch.Tensor,
    positions: Sequence[int],
    rules: Sequence[MemoryRules],
    reduce: Reduce | None = None,
) -> tuple[torch.Tensor, list[Progress]]:
    """Run one token through each of R banks, committing where it ends a segment.

    ``a`` [R, D] and ``positions`` are the tokens', one a bank. ``rules`` [R] may differ in
    ``alpha``, ``noise`` and the thresholds only. Returns outputs [R, D] in the dtype of ``a``.
    """
    shared = rules[0]
    size = shared.bank_size
    words = banks.read_words()
    headers = [Header.unpack(row) for row in words]
    offsets = [position % shared.segment_size for position in positions]
    first = [position < shared.segment_size for position in positions]
    for header, offset, is_first in zip(headers, offsets, first, strict=True):
        if offset == 0:
            header.start_segment(is_first)
    counts = words[:, :3].tolist()
    valid = [count[0] for count in counts]

    mean_top = a.new_full((len(valid), 1), float("-inf"), dtype=torch.float32)
    top = torch.zeros(len(valid), 0, dtype=torch.int64, device=a.device)
    o = a
    if any(valid):
        squares = words[:, 3 + 3 * size :].view(torch.float32)
        sims = _similarities(banks, a, valid, squares, reduce)
        o, mean_top, top = _enhance(banks, a, sims, words[:, :1], rules)
    high = (mean_top > _column(rules, "theta_high", a)).flatten().tolist()
    low = (mean_top <= _column(rules, "theta_low", a)).flatten().tolist()
    mid = [not (h or lo) for h, lo in zip(high, low, strict=True)]

    _stage_low(banks, a, o, low, counts, shared)
    _gather_sums(banks, a, o, mid, offsets, first, shared)
    steps = []
    for i, header in enumerate(headers):
        if mid[i] and not first[i]:
            header.merge[top[i, : valid[i]]] = 1
        if high[i] and shared.update is UpdateRule.PAPER:
            header.confirm[top[i, : valid[i]]] += 1
        words[i, 1] += mid[i]
        words[i, 2] += low[i]
        committed = None
        if offsets[i] + 1 == shared.segment_size:
            committed = commit(banks.bank(i), header, valid[i], rules[i])
        steps.append(Progress(int(high[i]), int(mid[i]), int(low[i]), committed))
    banks.write_words(words)
    return o, steps


def _column(rules: Sequence[MemoryRules], name: str, like: torch.Tensor) -> torch.Tensor | float:
    """A setting as [R, 1] fp32, or as a number where all requests agree."""
    values = [getattr(row, name) for row in rules]
    if all(value == values[0] for value in values):
        return values[0]
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]


def _similarities(
    banks: Banks,
    a: torch.Tensor,
    valid: list[int],
    squares: torch.Tensor,
    reduce: Reduce | None,
) -> torch.Tensor:
    """Cosines [R, M] fp32; behind a bank's valid slots anything."""
    rows, size = squares.shape
    a32 = a.float()
    parts = torch.zeros(rows, 2 * size + 1, dtype=torch.float32, device=a.device)
    banks.products(a32, valid, parts[:, :size])
    parts[:, size:-1] = squares
    parts[:, -1] = torch.linalg.vecdot(a32, a32)
    if reduce is not None:
        # Sums over ranks, as in look_up; what no one may read is kept finite for it.
        parts = reduce(parts)
    norms = parts[:, size:].sqrt().clamp_min(NORM_FLOOR)
    return parts[:, :size] / (norms[:, -1:] * norms[:, :-1])


def _enhance(
    banks: Banks,
    a: torch.Tensor,
    sims: torch.Tensor,
    valid: torch.Tensor,
    rules: Sequence[MemoryRules],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Outputs [R, D], the mean of the top-k similarities [R, 1], and the top-k slots [R, k].

    Of the slots only as many count as are valid; empty banks have a mean of minus infinity.
    """
    shared = rules[0]
    size = sims.shape[1]
    places = torch.arange(size, device=a.device)
    beyond = places >= valid
    ranked, order = sims.masked_fill(beyond, float("-inf")).sort(
        dim=1, descending=True, stable=True
    )
    k = min(shared.top_k, size)
    top, top_sims = order[:, :k], ranked[:, :k]
    used = places[:k] < valid
    found = valid.clamp(max=k)
    total = top_sims.masked_fill(~used, 0.0).sum(dim=1, keepdim=True)
    mean_top = torch.where(found > 0, total / found, float("-inf"))

    best = ranked[:, :1]
    high = best > _column(rules, "theta_high", a)
    reads = best > _column(rules, "theta_low", a)
    reading = reads.flatten().nonzero().flatten()
    if not len(reading):
        return a, mean_top, top

    alpha, noise = _column(rules, "alpha", a), _column(rules, "noise", a)
    share = torch.where(high, shared.high_weight, shared.mid_weight)
    weights = used * (alpha / found * share)
    slots = top
    k_low = min(shared.negative_k, size)
    if k_low:
        bottom = sims.masked_fill(beyond, float("inf")).argsort(dim=1, stable=True)[:, :k_low]
        low_weights = (places[:k_low] < valid) * (alpha * noise / valid.clamp(max=k_low))
        weights, slots = torch.cat([weights, low_weights], 1), torch.cat([slots, bottom], 1)
    own = (1 - alpha) + alpha * torch.where(high, 0.0, shared.mid_self_weight)
    # A weight of 0 would not silence what a slot that was never written may hold.
    slots = torch.where(weights > 0, slots, top[:, :1])

    values = banks.read_values(reading, slots[reading]).float()
    blend = torch.bmm(weights[reading, None], values).squeeze(1)
    o = a.clone()
    o[reading] = torch.addcmul(blend, own.expand_as(best)[reading], a[reading].float()).to(a.dtype)
    return o, mean_top, top


def _stage_low(
    banks: Banks,
    a: torch.Tensor,
    o: torch.Tensor,
    low: list[bool],
    counts: list[list[int]],
    shared: MemoryRules,
) -> None:
    """Put low tokens into free slots, out of sight until the commit, or into staging rows."""
    free: list[tuple[int, int]] = []
    staged: list[tuple[int, int]] = []
    for i, (valid, _, lows) in enumerate(counts):
        if not low[i]:
            continue
        rank = lows - (shared.bank_size - valid)
        if rank < 0:
            free.append((i, valid + lows))
        elif rank < min(shared.max_insertions, valid):
            staged.append((i, rank))
    for rows, write in ((free, banks.write_slots), (staged, banks.write_staged)):
        if rows:
            which, target = torch.tensor(rows, device=a.device).unbind(1)
            write(which, target, a[which], o[which])


def _gather_sums(
    banks: Banks,
    a: torch.Tensor,
    o: torch.Tensor,
    mid: list[bool],
    offsets: list[int],
    first: list[bool],
    shared: MemoryRules,
) -> None:
    """Add to the sums a merge will need, as ``update`` does with ``sums.running_sum``."""
    paper = shared.update is UpdateRule.PAPER
    adds = [not is_first and (paper or m) for is_first, m in zip(first, mid, strict=True)]
    touched = [
        i
        for i, offset in enumerate(offsets)
        if not first[i] and (adds[i] or offset == 0 or (offset + 1) % TILE == 0)
    ]
    if not touched:
        return
    which = torch.tensor(touched, device=a.device)
    sums = banks.read_sums(which)
    for row, i in zip(sums, touched, strict=True):
        if offsets[i] == 0:
            row.zero_()
        if adds[i]:
            row[2] += a[i]
            if not paper:
                row[3] += o[i]
        if (offsets[i] + 1) % TILE == 0:
            row[:2] += row[2:]
            row[2:] = 0
    banks.write_sums(which, sums)
