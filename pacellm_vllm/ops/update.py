"""Update: what a running segment gathers, and the commit at its end (paper Sec. 3.2.1)."""

from dataclasses import dataclass, fields
from typing import Protocol

import torch

from pacellm_vllm.ops.lookup import LookUp, Reduce, look_up
from pacellm_vllm.ops.rules import MemoryRules, UpdateRule
from pacellm_vllm.ops.sums import running_sum


@dataclass
class Header:
    """The small state of a bank; int32, the counters 0-d, the rest one entry per slot [M].

    ``valid`` committed slots, always the first ones; ``usage`` of each, and fp32 ``squares``, their
    keys' squared norms (over this rank's share of D). Of the running segment:
    ``mids`` and ``lows`` its tokens so far by kind; ``merge`` the slots (0/1) its mid tokens
    touch; ``confirm`` how often its high tokens found each slot.
    """

    valid: torch.Tensor
    mids: torch.Tensor
    lows: torch.Tensor
    usage: torch.Tensor
    merge: torch.Tensor
    confirm: torch.Tensor
    squares: torch.Tensor

    @staticmethod
    def num_words(bank_size: int) -> int:
        """int32 words of a packed header."""
        return 3 + 4 * bank_size

    @classmethod
    def unpack(cls, words: torch.Tensor) -> "Header":
        """Views of ``words`` [num_words] int32."""
        size = (words.numel() - 3) // 4
        usage, merge, confirm, squares = words[3:].view(4, size)
        return cls(words[0], words[1], words[2], usage, merge, confirm, squares.view(torch.float32))

    def pack(self) -> torch.Tensor:
        """[num_words] int32, a copy."""
        return torch.cat(
            [getattr(self, f.name).reshape(-1).view(torch.int32) for f in fields(self)]
        )

    def start_segment(self, first: bool) -> None:
        """Forget the running segment's part; in the first segment everything."""
        for state in (self.mids, self.lows, self.merge, self.confirm):
            state.zero_()
        if first:
            self.valid.zero_()
            self.usage.zero_()


class BankStore(Protocol):
    """Where one bank lives. Rows have the store's dtype; what was never written is undefined."""

    def read_header(self) -> Header: ...

    def write_header(self, header: Header) -> None: ...

    def read_slots(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [count, D] of the first slots."""

    def write_slots(self, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store keys and values [j, D] in the slots [j] int64."""

    def read_staged(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first rows [count, D] set aside for used slots, as (a, o)."""

    def write_staged(self, rows: torch.Tensor, a: torch.Tensor, o: torch.Tensor) -> None:
        """Set (a, o) [j, D] aside in the staging rows [j] int64."""

    def read_sums(self) -> torch.Tensor:
        """[4, D] fp32: totals of a and o, then their unfinished tiles."""

    def write_sums(self, sums: torch.Tensor) -> None: ...


@dataclass
class Progress:
    """What a piece of a segment did: tokens of each kind, and slots valid if it committed."""

    high: int
    mid: int
    low: int
    committed_slots: int | None


def advance(
    store: BankStore,
    a: torch.Tensor,
    position: int,
    rules: MemoryRules,
    reduce: Reduce | None = None,
) -> tuple[torch.Tensor, Progress]:
    """Run tokens of one segment through one bank, committing if they end it.

    ``a`` [n, D] are the activations of the tokens at ``position`` .. ``position + n - 1``, which
    must lie in one segment. Returns their outputs [n, D] in the dtype of ``a``. Whether stored
    state counts is decided by position alone, so stale content is never read.
    """
    n = a.shape[0]
    segment, offset = divmod(position, rules.segment_size)
    assert 0 < n <= rules.segment_size - offset, "a piece must not cross a segment end"

    header, valid, found = _look_up(store, a, position, rules, reduce)
    o = found.output

    high, low = found.high(rules), found.low(rules)
    mid = ~(high | low)
    num_mid, num_low = int(mid.sum()), int(low.sum())
    _stage_low(store, header, a, o, low, num_low, valid, rules)
    if segment:
        _gather_sums(store, a, o, mid, num_mid, offset, rules)
        if num_mid:
            header.merge[found.top[mid].flatten()] = 1
        if rules.update is UpdateRule.PAPER:
            hits = found.top[high].flatten()
            header.confirm.index_add_(0, hits, torch.ones_like(hits, dtype=torch.int32))
    header.mids += num_mid
    header.lows += num_low

    committed = None
    if offset + n == rules.segment_size:
        committed = commit(store, header, valid, rules)
    store.write_header(header)
    return o, Progress(n - num_mid - num_low, num_mid, num_low, committed)


def peek(
    store: BankStore,
    a: torch.Tensor,
    position: int,
    rules: MemoryRules,
    reduce: Reduce | None = None,
) -> torch.Tensor:
    """The outputs that :func:`advance` would return; the bank stays as it is."""
    return _look_up(store, a, position, rules, reduce)[2].output


def _look_up(
    store: BankStore,
    a: torch.Tensor,
    position: int,
    rules: MemoryRules,
    reduce: Reduce | None,
) -> tuple[Header, int, LookUp]:
    header = store.read_header()
    if position % rules.segment_size == 0:
        header.start_segment(first=position == 0)
    valid = int(header.valid)
    found = look_up(a, *store.read_slots(valid), rules, reduce, header.squares[:valid])
    return header, valid, found


def _stage_low(
    store: BankStore,
    header: Header,
    a: torch.Tensor,
    o: torch.Tensor,
    low: torch.Tensor,
    num_low: int,
    valid: int,
    rules: MemoryRules,
) -> None:
    """Put low tokens into free slots, out of sight until the commit, then into staging rows."""
    free = rules.bank_size - valid
    before = int(header.lows)
    last = min(before + num_low, free + min(rules.max_insertions, valid))
    if last <= before:
        return
    tokens = low.nonzero().flatten()[: last - before]
    ranks = torch.arange(before, last, device=a.device)
    a, o = a[tokens], o[tokens]
    in_free = max(0, min(free, last) - before)
    if in_free:
        store.write_slots(valid + ranks[:in_free], a[:in_free], o[:in_free])
    if in_free < len(tokens):
        store.write_staged(ranks[in_free:] - free, a[in_free:], o[in_free:])


def _gather_sums(
    store: BankStore,
    a: torch.Tensor,
    o: torch.Tensor,
    mid: torch.Tensor,
    num_mid: int,
    offset: int,
    rules: MemoryRules,
) -> None:
    """Add the piece to the sums a merge will need: mid tokens, or in `paper` every token's a."""
    n = a.shape[0]
    paper = rules.update is UpdateRule.PAPER
    sums = store.read_sums() if offset else a.new_zeros(4, a.shape[1], dtype=torch.float32)
    addends: list[torch.Tensor | None]
    if paper:
        addends = [a.float()]
    elif num_mid:
        addends = [torch.where(mid[:, None], rows.float(), 0.0) for rows in (a, o)]
    else:
        addends = [None, None]
    for i, rows in enumerate(addends):
        sums[i], sums[i + 2] = running_sum(sums[i], sums[i + 2], rows, offset, n)
    store.write_sums(sums)


def commit(store: BankStore, header: Header, valid: int, rules: MemoryRules) -> int:
    """Update(B_s) in place, the header too; returns the number of valid slots of B_(s+1)."""
    mids, lows = int(header.mids), int(header.lows)
    usage = header.usage[:valid]
    usage += header.confirm[:valid]
    slots = header.merge[:valid].nonzero().flatten()
    if mids:
        sums = store.read_sums()
        if rules.update is UpdateRule.PAPER:
            mean_key = mean_value = (sums[0] + sums[2]) / rules.segment_size
        else:
            mean_key, mean_value = (sums[:2] + sums[2:]) / mids
        keys, values = (rows[slots].float() for rows in store.read_slots(valid))
        m = rules.momentum
        store.write_slots(slots, m * keys + (1 - m) * mean_key, m * values + (1 - m) * mean_value)
        usage += header.merge[:valid]

    taken = min(lows, rules.bank_size - valid)
    replaced = min(lows - taken, rules.max_insertions, valid)
    if replaced:
        victims = usage.argsort(stable=True)[:replaced]
        store.write_slots(victims, *store.read_staged(replaced))
        usage[victims] = 1
    header.usage[valid : valid + taken] = 1
    header.valid.fill_(valid + taken)
    keys = store.read_slots(valid + taken)[0].float()
    header.squares[: valid + taken] = torch.linalg.vecdot(keys, keys)
    return valid + taken
