"""Decode steps of many banks at once, keys read in place, against one bank and one token a time."""

from dataclasses import replace

import pytest
import torch
from test_ops import activations, paged_store, rules

from pacellm_vllm.memory.layout import BankLayout
from pacellm_vllm.memory.store import PagedBanks, key_runs
from pacellm_vllm.ops.steps import advance_steps
from pacellm_vllm.ops.update import advance

# With these the two never meet a near tie, where rounding may choose either of two twin slots.
ROWS, TOKENS = 4, 230
START = [0, 1, 30, 100]


def pools(layout, dtype):
    """ROWS banks scattered over one poisoned pool: the units, and each bank's pages."""
    _, store = paged_store(replace_pages(layout, ROWS), dtype)
    pages = store._pages.view(ROWS, layout.num_pages)
    return store._units, pages


def replace_pages(layout, banks):
    """The layout, claiming to need pages for several banks."""

    class Many(BankLayout):
        num_pages = property(lambda self: banks * layout.num_pages)

    return Many(**{name: getattr(layout, name) for name in BankLayout.__dataclass_fields__})


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
    ],
)
def test_batched_steps_equal_single_ones(width, dtype, preset, page_bytes):
    r = rules(preset=preset, bank_size=23, max_insertions=5)
    mine = [r, replace(r, alpha=0.7), replace(r, noise=0.0), replace(r, theta_high=0.9, alpha=0.0)]
    layout = BankLayout.plan(r, width, dtype, page_bytes)
    units, pages = pools(layout, dtype)
    truth_units = units.clone()
    a = [activations(start + TOKENS, width, i).to(dtype) for i, start in enumerate(START)]
    truth, banks = (PagedBanks(u, pages, layout) for u in (truth_units, units))
    for store in (truth, banks):
        for i, start in enumerate(START):
            for begin in range(0, start, r.segment_size):
                end = min(start, begin + r.segment_size)
                advance(store.bank(i), a[i][begin:end], begin, mine[i])
    kinds = torch.zeros(3, dtype=torch.int64)
    for t in range(TOKENS):
        rows = torch.stack([a[i][START[i] + t] for i in range(ROWS)])
        positions = [start + t for start in START]
        got, progress = advance_steps(banks, rows, positions, mine)
        for i in range(ROWS):
            want, step = advance(truth.bank(i), rows[i : i + 1], positions[i], mine[i])
            torch.testing.assert_close(got[i : i + 1], want)
            assert progress[i] == step
            kinds += torch.tensor([step.high, step.mid, step.low])
    assert kinds.min() > 20
    for i in range(ROWS):
        got, want = (store.bank(i).read_header() for store in (banks, truth))
        for name in ("valid", "mids", "lows", "usage", "merge", "confirm"):
            assert torch.equal(getattr(got, name), getattr(want, name)), name
        torch.testing.assert_close(got.squares[: got.valid], want.squares[: want.valid])
        count = int(got.valid)
        for x, y in zip(
            banks.bank(i).read_slots(count), truth.bank(i).read_slots(count), strict=True
        ):
            torch.testing.assert_close(x, y)
    untouched = torch.ones(len(units), dtype=torch.bool)
    untouched[pages.flatten()] = False
    assert torch.equal(units[untouched].view(torch.uint8), truth_units[untouched].view(torch.uint8))


@pytest.mark.parametrize("page_bytes", [256, 1500, 8192])
def test_key_runs_cover_every_key_once(page_bytes):
    layout = BankLayout.plan(rules(bank_size=23), 62, torch.float32, page_bytes)
    elements = dict.fromkeys(range(23), 0)
    for run in key_runs(layout):
        if run.keys:
            for slot in range(run.slot, run.slot + run.keys):
                elements[slot] += layout.width
        else:
            elements[run.slot] += run.end - run.begin
    assert set(elements.values()) == {layout.width}


def test_committed_squares_are_those_of_the_keys():
    r = rules(bank_size=23, max_insertions=5)
    layout = BankLayout.plan(r, 62, torch.bfloat16, 2048)
    _, store = paged_store(layout, torch.bfloat16)
    a = activations(480, 62).to(torch.bfloat16)
    for begin in range(0, 480, 48):
        advance(store, a[begin : begin + 48], begin, r)
        header = store.read_header()
        keys = store.read_slots(int(header.valid))[0].float()
        assert torch.equal(header.squares[: header.valid], torch.linalg.vecdot(keys, keys))


def test_banks_with_fewer_slots_than_are_looked_up():
    """What lies behind the valid slots is poison here, and must not be blended in with weight 0."""
    thresholds = {"theta_low": -1.0, "theta_high": 0.9}
    r = rules(bank_size=23, segment_size=3, max_insertions=5, top_k=7, negative_k=4, **thresholds)
    layout = BankLayout.plan(r, 62, torch.float32, 1500)
    units, pages = pools(layout, torch.float32)
    truth = PagedBanks(units.clone(), pages, layout)
    banks = PagedBanks(units, pages, layout)
    a = [activations(9, 62, seed) for seed in range(ROWS)]
    for t in range(9):
        rows = torch.stack([row[t] for row in a])
        got, _ = advance_steps(banks, rows, [t] * ROWS, [r] * ROWS)
        want = [advance(truth.bank(i), rows[i : i + 1], t, r)[0] for i in range(ROWS)]
        torch.testing.assert_close(got, torch.cat(want))
        if t >= 3:
            assert not torch.equal(got, rows)


def test_sums_have_the_bits_of_any_other_cut():
    r = rules(preset="paper", bank_size=23, segment_size=100)
    layout = BankLayout.plan(r, 62, torch.float32, 1500)
    units, pages = pools(layout, torch.float32)
    truth = PagedBanks(units.clone(), pages, layout)
    banks = PagedBanks(units, pages, layout)
    a = [activations(199, 62, seed) for seed in range(ROWS)]
    for i, row in enumerate(a):
        for store in (truth, banks):
            advance(store.bank(i), row[:100], 0, r)
        advance(truth.bank(i), row[100:], 100, r)
    for t in range(100, 199):
        advance_steps(banks, torch.stack([row[t] for row in a]), [t] * ROWS, [r] * ROWS)
    for i in range(ROWS):
        # The sums of a, which `paper` takes over every token whatever was decided.
        got, want = banks.bank(i).read_sums(), truth.bank(i).read_sums()
        assert torch.equal(got[::2], want[::2])
