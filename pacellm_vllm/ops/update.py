"""Update: what a running segment gathers, and the commit at its end (paper Sec. 3.2.1)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from pacellm_vllm.ops.lookup import Reduce, key_squares, look_up
from pacellm_vllm.ops.rules import MemoryRules, UpdateRule
from pacellm_vllm.ops.sums import TILE, running_sum, tile_turns


@dataclass
class Header:
    """The small state of a bank; int32, the counters 0-d, the rest one entry per slot [M].

    ``valid`` committed slots, always the first ones; ``usage`` of each, and fp32 ``squares``, the
    ``key_squares`` of their keys (over this rank's share of D). Of the running segment:
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
        usage, merge, confirm, _ = words[3:].view(4, -1)
        squares = cls.squares_of(words)
        return cls(words[0], words[1], words[2], usage, merge, confirm, squares)

    @staticmethod
    def squares_of(words: torch.Tensor) -> torch.Tensor:
        return words[3 + 3 * (len(words) // 4) :].view(torch.float32)

    def start_segment(self, first: bool) -> None:
        """Forget the running segment's part; in the first segment everything."""
        for state in (self.mids, self.lows, self.merge, self.confirm):
            state.zero_()
        if first:
            self.valid.zero_()
            self.usage.zero_()


class BankStore(Protocol):
    """Where one bank lives. Rows have the store's dtype; what was never written is undefined."""

    def read_words(self) -> torch.Tensor:
        """The packed header, a copy."""

    def write_words(self, words: torch.Tensor) -> None: ...

    def read_keys(self, count: int) -> torch.Tensor:
        """Keys [count, D] of the first slots."""

    def read_values(self, count: int) -> torch.Tensor:
        """Values [count, D] of the first slots."""

    def products(self, a: torch.Tensor, out: torch.Tensor) -> None:
        """Write the first slots' keys times ``a`` [D] to ``out`` [count]; both fp32."""

    def add_value(self, slot: int, weight: float, out: torch.Tensor) -> None:
        """Add ``weight`` times one value to ``out`` [D] fp32."""

    def write_slots(
        self, slots: Sequence[int], keys: Iterable[torch.Tensor], values: Iterable[torch.Tensor]
    ) -> None:
        """Store one key and one value [D] in each of ``slots``."""

    def read_staged(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first rows [count, D] set aside for used slots, as (a, o)."""

    def write_staged(
        self, rows: Sequence[int], a: Iterable[torch.Tensor], o: Iterable[torch.Tensor]
    ) -> None:
        """Set one a and one o [D] aside in each of the staging ``rows``."""

    def read_sums(self) -> torch.Tensor:
        """[4, D] fp32, a copy: totals of a and o, then their unfinished tiles."""

    def write_sums(self, sums: torch.Tensor) -> None: ...


@dataclass(frozen=True)
class Committed:
    """What a commit did to a bank.

    ``valid`` slots after it, the last ``filled`` of them by it; ``merged`` and ``replaced`` the
    slots that were used before; ``usage`` of each after it. The segment's low tokens, in position
    order, went into the filled slots, then into ``replaced`` in that order; ``dropped`` of them
    found none open.
    """

    valid: int
    filled: int
    merged: list[int]
    replaced: list[int]
    dropped: int
    usage: list[int]


@dataclass
class Progress:
    """What a piece of a segment did: tokens of each kind, and its commit if it ended the segment.

    ``mean_top`` [n] fp32 or n numbers and ``top``, n rows of slots, are those of ``LookUp``.
    """

    high: int
    mid: int
    low: int
    committed: Committed | None
    mean_top: torch.Tensor | list[float] = field(compare=False)
    top: torch.Tensor | list[list[int]] = field(compare=False)


def advance(
    store: BankStore,
    a: torch.Tensor,
    position: int,
    rules: MemoryRules,
    reduce: Reduce | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Progress]:
    """Run tokens of one segment through one bank, committing if they end it.

    ``a`` [n, D] are the activations of the tokens at ``position`` .. ``position + n - 1``, which
    must lie in one segment. Returns their outputs [n, D] in the dtype of ``a``, in ``out`` if it
    is given. Whether stored state counts is decided by position alone, so stale content is never
    read.
    """
    n = a.shape[0]
    segment, offset = divmod(position, rules.segment_size)
    assert 0 < n <= rules.segment_size - offset, "a piece must not cross a segment end"

    words, header = _header_at(store, position, rules)
    valid = int(header.valid)
    keys, values = store.read_keys(valid), store.read_values(valid)
    found = look_up(a, keys, values, rules, reduce, header.squares[:valid], out)
    o = found.output

    high, mid, low = found.high(rules), found.mid(rules), found.low(rules)
    num_high, num_mid, num_low = int(high.sum()), int(mid.sum()), int(low.sum())
    paper = rules.update is UpdateRule.PAPER
    _stage_low(store, header, a, o, low, num_low, valid, rules)
    if segment:
        if paper:
            _gather_sums(store, [a], found.sound(), offset)
        else:
            _gather_sums(store, [a, o], mid, offset)
        if num_mid:
            header.merge[found.top[mid].flatten()] = 1
        if paper:
            hits = found.top[high].flatten()
            header.confirm.index_add_(0, hits, torch.ones_like(hits, dtype=torch.int32))
    header.mids += num_mid
    header.lows += num_low

    committed = None
    if offset + n == rules.segment_size:
        # Else they would be in memory together with what the commit reads.
        del keys, values
        committed = commit(store, header, valid, rules)
    store.write_words(words)
    return o, Progress(num_high, num_mid, num_low, committed, found.mean_top, found.top)


def peek(
    store: BankStore,
    a: torch.Tensor,
    position: int,
    rules: MemoryRules,
    reduce: Reduce | None,
    out: torch.Tensor,
) -> None:
    """Put into ``out`` what :func:`advance`, which see, would; the bank stays as it is."""
    _, header = _header_at(store, position, rules)
    valid = int(header.valid)
    keys, values = store.read_keys(valid), store.read_values(valid)
    look_up(a, keys, values, rules, reduce, header.squares[:valid], out)


def _header_at(store: BankStore, position: int, rules: MemoryRules) -> tuple[torch.Tensor, Header]:
    """The header as the token at ``position`` finds it, packed and in views of that."""
    words = store.read_words()
    header = Header.unpack(words)
    if position % rules.segment_size == 0:
        header.start_segment(first=position == 0)
    return words, header


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
    tokens = low.nonzero().flatten()[: last - before].tolist()
    in_free = max(0, min(free, last) - before)
    for chosen, target, write in (
        (tokens[:in_free], valid + before, store.write_slots),
        (tokens[in_free:], before + in_free - free, store.write_staged),
    ):
        if chosen:
            rows = range(target, target + len(chosen))
            write(rows, (a[t] for t in chosen), (o[t] for t in chosen))


def _gather_sums(
    store: BankStore, rows: Sequence[torch.Tensor], chosen: torch.Tensor, offset: int
) -> None:
    """Add the tokens ``chosen`` [n] bool to the sums a merge will need: of each of ``rows`` [n, D].

    Merged are mid tokens' a and o, or in `paper` every sound token's a.
    """
    n, width = rows[0].shape
    tokens = chosen.nonzero().flatten()
    if offset and not len(tokens) and (offset + n) // TILE == offset // TILE:
        return
    sums = store.read_sums() if offset else torch.zeros(4, width, device=chosen.device)
    turns = tile_turns(tokens, offset)
    for i, part in enumerate(rows):
        running_sum(sums[i], sums[i + 2], part, turns, offset)
    store.write_sums(sums)


def commit(store: BankStore, header: Header, valid: int, rules: MemoryRules) -> Committed:
    """Update(B_s), of ``valid`` slots, in place, the header too."""
    mids, lows = int(header.mids), int(header.lows)
    usage = header.usage[:valid]
    usage += header.confirm[:valid]
    slots = header.merge[:valid].nonzero().flatten()
    victims: list[int] = []
    if mids:
        sums = store.read_sums()
        if rules.update is UpdateRule.PAPER:
            mean_key = mean_value = (sums[0] + sums[2]) / rules.segment_size
        else:
            mean_key, mean_value = (sums[:2] + sums[2:]) / mids
        keys = store.read_keys(valid)[slots].float()
        values = store.read_values(valid)[slots].float()
        m = rules.momentum
        keys = m * keys + (1 - m) * mean_key
        values = m * values + (1 - m) * mean_value
        store.write_slots(slots.tolist(), keys, values)
        usage += header.merge[:valid]

    taken = min(lows, rules.bank_size - valid)
    replaced = min(lows - taken, rules.max_insertions, valid)
    if replaced:
        victims = usage.argsort(stable=True)[:replaced].tolist()
        store.write_slots(victims, *store.read_staged(replaced))
        usage[victims] = 1
    header.usage[valid : valid + taken] = 1
    header.valid.fill_(valid + taken)
    keys = store.read_keys(valid + taken).float()
    header.squares[: valid + taken] = key_squares(keys)
    merged = slots.tolist() if mids else []
    used = header.usage[: valid + taken].tolist()
    return Committed(valid + taken, taken, merged, victims, lows - taken - replaced, used)
