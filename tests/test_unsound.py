"""Activations that are not finite, or too large to square: passed by, wherever they come."""

import copy

import pytest
import torch
from dense_store import DenseStore
from test_ops import drive, paged_store, rules
from unsound import PACE, PLACES, POISONS, assert_bank_is, near, streams, told

from pacellm_vllm.memory.drafts import look_up_drafts, write_accepted
from pacellm_vllm.memory.layout import BankLayout
from pacellm_vllm.ops.steps import advance_steps
from pacellm_vllm.ops.update import advance

PRESETS = ["official", "paper"]


def decode(stores, streams, r):
    """``streams`` through their banks together, a token of each at a time."""
    outputs, progress = [], []
    for t in range(len(streams[0])):
        o, steps = advance_steps(stores, torch.stack([s[t] for s in streams]), [t] * len(stores), r)
        outputs.append(o)
        progress += steps
    return list(torch.stack(outputs, dim=1)), progress


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("width", "dtype"), [(62, torch.float32), (33, torch.bfloat16)])
def test_prefill_and_decode_are_the_oracles(width, dtype, preset, poison):
    r = rules(**PACE, preset=preset)
    stream = streams(width, dtype)[1][poison]
    want, bank = told(stream, **PACE, preset=preset)
    layout = BankLayout.plan(r, width, dtype, 2048)
    for cuts in ([], [1, 5, 20, 23, 24, 30, 55], range(1, 60), None):
        store = DenseStore(r, width, dtype) if cuts is not None else paged_store(layout, dtype)
        if cuts is not None:
            got, steps = drive(store, stream, r, cuts)
        else:
            (got,), steps = decode([store], [stream], [r])
        torch.testing.assert_close(got, want, equal_nan=True, **near(dtype))
        torch.testing.assert_close(got[PLACES], stream[PLACES], equal_nan=True, rtol=0, atol=0)
        assert_bank_is(store, bank)
        assert sum(s.high + s.mid + s.low for s in steps) == 60 - len(PLACES)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_bank_stays_empty_while_nothing_can_be_kept(preset):
    """And its first slots then come from the second segment."""
    r = rules(**PACE, preset=preset)
    layout = BankLayout.plan(r, 62, torch.float32, 2048)
    for poison, stream in streams(62, torch.float32, range(13))[1].items():
        want, bank = told(stream, **PACE, preset=preset)
        whole, one_by_one = DenseStore(r, 62), paged_store(layout, torch.float32)
        outputs = drive(whole, stream, r)[0], decode([one_by_one], [stream], [r])[0][0]
        for store, got in zip((whole, one_by_one), outputs, strict=True):
            torch.testing.assert_close(got, want, equal_nan=True, msg=poison)
            assert_bank_is(store, bank)


@pytest.mark.parametrize("preset", PRESETS)
def test_what_the_poison_was_makes_no_difference_to_any_other_bit(preset):
    """Of its own request's tokens, and of the requests decoded beside it."""
    r = rules(**PACE, preset=preset)
    sound, poisoned = streams(62, torch.float32)
    layout = BankLayout.plan(r, 62, torch.float32, 2048)
    others = [t for t in range(60) if t not in PLACES]
    seen = []
    for stream in poisoned.values():
        store = DenseStore(r, 62)
        o, _ = drive(store, stream, r, [1, 20, 30])
        beside = [paged_store(layout, torch.float32) for _ in range(3)]
        rows, _ = decode(beside, [sound, stream, sound.flip(0)], [r] * 3)
        banks = [s.read_keys(5) for s in (store, *beside)]
        seen.append([o[others], rows[0], rows[1][others], rows[2], *banks])
    for bits in seen[1:]:
        assert all(map(torch.equal, bits, seen[0]))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("poison", ["nan", "inf", "huge"])
def test_ranks_that_hold_only_sound_shares_of_a_token_pass_it_by_too(poison, preset):
    r = rules(**PACE, preset=preset)
    stream = streams(62, torch.float32)[1][poison]
    want, bank = told(stream, **PACE, preset=preset)
    layout = BankLayout.plan(r, 31, torch.float32, 2048)
    shares = [stream[:, :31].contiguous(), stream[:, 31:].contiguous()]
    for step in (12, 1):
        ranks = [paged_store(layout, torch.float32) for _ in shares]
        halves = [[], []]
        for position in range(0, 60, step):
            parts = [share[position : position + step] for share in shares]
            total = sum(
                sent(copy.deepcopy(store), a, position, r)
                for store, a in zip(ranks, parts, strict=True)
            )
            for half, store, a in zip(halves, ranks, parts, strict=True):
                half.append(run(store, a, position, r, lambda _, total=total: total.clone()))
        got = torch.cat([torch.cat(half) for half in halves], dim=1)
        torch.testing.assert_close(got, want, equal_nan=True)
        for store, columns in zip(ranks, (slice(31), slice(31, 62)), strict=True):
            part = copy.copy(bank)
            part.keys, part.values = bank.keys[:, columns], bank.values[:, columns]
            assert_bank_is(store, part)


def sent(store, a, position, r):
    """What a rank gives to the one sum over ranks."""
    buffers = []
    run(store, a, position, r, lambda buffer: buffers.append(buffer.clone()) or buffer)
    (buffer,) = buffers
    return buffer


def run(store, a, position, r, reduce):
    if len(a) == 1:
        return advance_steps([store], a, [position], [r], reduce)[0]
    return advance(store, a, position, r, reduce)[0]


@pytest.mark.parametrize("poison", POISONS)
def test_drafts_that_cannot_be_kept(poison):
    """Each step but every third is a token and three drafts, the last of which is taken back."""
    r = rules(**PACE, preset="official")
    stream = streams(62, torch.float32)[1][poison]
    want, bank = told(stream, **PACE, preset="official")
    layout = BankLayout.plan(r, 62, torch.float32, 2048, drafts=3)
    store = paged_store(layout, torch.float32)
    outputs, position = [], 0
    while position < 60:
        list(write_accepted(store, position, r))
        outputs.append(advance(store, stream[position, None], position, r)[0])
        position += 1
        right = min(2, 60 - position) if position % 3 else 0
        if right:
            drafts = torch.cat([stream[position : position + right], stream[:1] * -1])
            outputs.append(look_up_drafts(store, drafts, position, r)[:right])
        position += right
    list(write_accepted(store, 60, r))
    torch.testing.assert_close(torch.cat(outputs), want, equal_nan=True)
    assert_bank_is(store, bank)
