"""Decode steps of many banks at once, keys read in place, against one bank and one token a time."""

from dataclasses import replace

import pytest
import torch
from test_ops import activations, paged_store, rules, scattered_pool

from pacellm_vllm.memory.layout import BankLayout
from pacellm_vllm.memory.places import places
from pacellm_vllm.memory.store import PagedStore
from pacellm_vllm.ops.steps import advance_steps
from pacellm_vllm.ops.update import Header, advance

ROWS, TOKENS = 4, 150
START = [0, 1, 30, 100]


def two_sets(layout, dtype):
    """ROWS banks scattered over one poisoned pool, twice, and the two pools' units and pages."""
    _, units, pages = scattered_pool(layout, dtype, ROWS)
    pools = units, units.clone()
    return *([PagedStore(pool, row, layout) for row in pages] for pool in pools), pools, pages


def is_clear(store, a, position, rules, margin=1e-5):
    """Whether no decision about the token ``a`` [D] lies within ``margin`` of another one."""
    valid = int(store.read_words()[0]) if position >= rules.segment_size else 0
    if not valid:
        return True
    keys = store.read_keys(valid).double()
    sims = torch.cosine_similarity(keys, a.double()[None]).sort(descending=True).values
    k, last = min(rules.top_k, valid), min(rules.negative_k, valid)
    decisive = torch.stack([sims[0], sims[:k].mean()])
    thresholds = torch.tensor([[rules.theta_high], [rules.theta_low]]).double()
    gaps = [(decisive - thresholds).abs().min()]
    gaps += [sims[n - 1] - sims[n] for n in (k, valid - last) if 0 < n < valid]
    return min(gaps) > margin


def assert_same_state(got, want, rules):
    mine, theirs = (Header.unpack(store.read_words()) for store in (got, want))
    for name in ("valid", "mids", "lows", "usage", "merge", "confirm"):
        assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
    torch.testing.assert_close(mine.squares, theirs.squares, equal_nan=True)
    for x, y in (
        (got.read_keys(rules.bank_size), want.read_keys(rules.bank_size)),
        (got.read_values(rules.bank_size), want.read_values(rules.bank_size)),
        *zip(*(store.read_staged(rules.max_insertions) for store in (got, want)), strict=True),
    ):
        torch.testing.assert_close(x, y, equal_nan=True)
    # Sums of outputs, which may differ in the last place of the stored dtype.
    loose = {} if x.dtype is torch.float32 else {"rtol": 0.01, "atol": 0.01}
    torch.testing.assert_close(got.read_sums(), want.read_sums(), equal_nan=True, **loose)


# Rows wider than a page, rows that straddle pages, several rows a page.
@pytest.mark.parametrize("page_bytes", [512, 1500])
@pytest.mark.parametrize(
    ("width", "dtype", "preset"),
    [
        (62, torch.float32, "official"),
        (62, torch.float32, "paper"),
        (344, torch.float32, "official"),
        (62, torch.bfloat16, "official"),
        (8, torch.float16, "official"),
        (62, torch.float32, "gentle"),
    ],
)
def test_batched_steps_equal_single_ones(width, dtype, preset, page_bytes):
    r = rules(preset=preset, bank_size=23, max_insertions=5)
    mine = [r, replace(r, alpha=0.7), replace(r, noise=0.0), replace(r, theta_high=0.9, alpha=0.0)]
    layout = BankLayout.plan(r, width, dtype, page_bytes)
    banks, truth, (units, truth_units), pages = two_sets(layout, dtype)
    a = [activations(start + TOKENS, width, i).to(dtype) for i, start in enumerate(START)]
    for store in (truth, banks):
        for i, start in enumerate(START):
            for begin in range(0, start, r.segment_size):
                end = min(start, begin + r.segment_size)
                advance(store[i], a[i][begin:end], begin, mine[i])
    kinds = torch.zeros(3, dtype=torch.int64)
    unclear = 0
    for t in range(TOKENS):
        # From one state, so that a tie which rounding decides is a tie of this token only.
        units.copy_(truth_units)
        rows = torch.stack([a[i][START[i] + t] for i in range(ROWS)])
        positions = [start + t for start in START]
        clear = [is_clear(truth[i], rows[i], positions[i], mine[i]) for i in range(ROWS)]
        got, progress = advance_steps(banks, rows, positions, mine)
        for i in range(ROWS):
            want, step = advance(truth[i], rows[i : i + 1], positions[i], mine[i])
            if not clear[i]:
                unclear += 1
                continue
            torch.testing.assert_close(got[i : i + 1], want)
            assert progress[i] == step
            assert_same_state(banks[i], truth[i], r)
            kinds += torch.tensor([step.high, step.mid, step.low])
    assert kinds.min() > 20
    assert unclear < ROWS * TOKENS / 4
    untouched = torch.ones(len(units), dtype=torch.bool)
    untouched[torch.tensor(pages)] = False
    assert torch.equal(units[untouched].view(torch.uint8), truth_units[untouched].view(torch.uint8))


@pytest.mark.parametrize("page_bytes", [256, 1500, 8192])
def test_key_runs_cover_every_key_once(page_bytes):
    layout = BankLayout.plan(rules(bank_size=23), 62, torch.float32, page_bytes)
    elements = dict.fromkeys(range(23), 0)
    for run in places(layout).keys:
        for slot in range(run.slot, run.slot + max(run.rows, 1)):
            elements[slot] += run.span.size
    assert set(elements.values()) == {layout.width}


def test_committed_squares_are_those_of_the_keys():
    r = rules(bank_size=23, max_insertions=5)
    layout = BankLayout.plan(r, 62, torch.bfloat16, 2048)
    store = paged_store(layout, torch.bfloat16)
    a = activations(480, 62).to(torch.bfloat16)
    for begin in range(0, 480, 48):
        advance(store, a[begin : begin + 48], begin, r)
        header = Header.unpack(store.read_words())
        keys = store.read_keys(int(header.valid)).float()
        assert torch.equal(header.squares[: header.valid], torch.linalg.vecdot(keys, keys))


def test_banks_with_fewer_slots_than_are_looked_up():
    """What lies behind the valid slots is poison here, and must not be blended in with weight 0."""
    thresholds = {"theta_low": -1.0, "theta_high": 0.9}
    r = rules(bank_size=23, segment_size=3, max_insertions=5, top_k=7, negative_k=4, **thresholds)
    layout = BankLayout.plan(r, 62, torch.float32, 1500)
    banks, truth, _, _ = two_sets(layout, torch.float32)
    a = [activations(9, 62, seed) for seed in range(ROWS)]
    for t in range(9):
        rows = torch.stack([row[t] for row in a])
        got, _ = advance_steps(banks, rows, [t] * ROWS, [r] * ROWS)
        want = [advance(truth[i], rows[i : i + 1], t, r)[0] for i in range(ROWS)]
        torch.testing.assert_close(got, torch.cat(want))
        if t >= 3:
            assert not torch.equal(got, rows)


def test_sums_have_the_bits_of_any_other_cut():
    r = rules(preset="paper", bank_size=23, segment_size=100)
    layout = BankLayout.plan(r, 62, torch.float32, 1500)
    banks, truth, _, _ = two_sets(layout, torch.float32)
    a = [activations(199, 62, seed) for seed in range(ROWS)]
    for i, row in enumerate(a):
        for store in (truth, banks):
            advance(store[i], row[:100], 0, r)
        advance(truth[i], row[100:], 100, r)
    for t in range(100, 199):
        advance_steps(banks, torch.stack([row[t] for row in a]), [t] * ROWS, [r] * ROWS)
    for i in range(ROWS):
        # The sums of a, which `paper` takes over every token whatever was decided.
        got, want = banks[i].read_sums(), truth[i].read_sums()
        assert torch.equal(got[::2], want[::2])


@pytest.mark.parametrize("width", [4864, 18944])
@pytest.mark.parametrize("preset", ["official", "paper"])
def test_a_threshold_of_one_is_above_every_similarity(width, preset):
    """Tokens that equal a slot bit for bit, whose cosine comes out above 1 by rounding."""
    r = rules(preset=preset, segment_size=4, bank_size=4, theta_low=1.0, theta_high=1.0, alpha=1.0)
    layout = BankLayout.plan(r, width, torch.bfloat16, 1 << 16)
    a = torch.randn(4, width, generator=torch.Generator().manual_seed(width)).bfloat16()
    pieces, single = paged_store(layout, torch.bfloat16), paged_store(layout, torch.bfloat16)
    for begin in range(0, 40, 4):
        out, progress = advance(pieces, a, begin, r)
        assert torch.equal(out, a)
        assert (progress.high, progress.mid, progress.low) == (0, 0, 4)
        for i in range(4):
            out, [progress] = advance_steps([single], a[i : i + 1], [begin + i], [r])
            assert torch.equal(out[0], a[i])
            assert (progress.high, progress.mid, progress.low) == (0, 0, 1)
