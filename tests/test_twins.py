"""Slots whose keys are equal rank by slot, whatever else is in the product they come from."""

import pytest
import torch
from dense_store import DenseStore
from test_ops import activations, drive, paged_store, rules

from pacellm_vllm.memory.layout import BankLayout
from pacellm_vllm.ops.lookup import key_squares, look_up
from pacellm_vllm.ops.steps import advance_steps
from pacellm_vllm.ops.update import Header


@pytest.mark.parametrize("width", [62, 344, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [3, 7, 23, 100])
def test_twins_rank_by_slot_in_products_of_any_shape(m, dtype, width):
    """The truth: cosines of few different rows in fp64, which twins then share."""
    r = rules(top_k=5, negative_k=3, theta_low=-1.0, theta_high=-0.99, noise=1.0)
    g = torch.Generator().manual_seed(m)
    rows = torch.randn(max(2, m // 3), width, generator=g).to(dtype)
    which = torch.randint(len(rows), (m,), generator=g)
    values = torch.randn(m, width, generator=g)
    for n in (1, 2, 3, 8, 33):
        a = torch.randn(n, width, generator=g).to(dtype)
        cosines = torch.cosine_similarity(a[:, None].double(), rows.double()[None], dim=2)
        sims = cosines[:, which]
        top = sims.sort(dim=1, descending=True, stable=True).indices[:, :5]
        bottom = sims.sort(dim=1, stable=True).indices[:, :3]
        recalled = values[top].mean(dim=1) + values[bottom].mean(dim=1)
        found = look_up(a, rows[which], values, r)
        assert torch.equal(found.top, top)
        want = 0.8 * a.float() + 0.2 * recalled
        torch.testing.assert_close(found.output, want.to(dtype), rtol=0.01, atol=0.01)


# Merged once they are equal; and merged again and again they become so.
@pytest.mark.parametrize(
    ("dtype", "momentum", "segments"), [(torch.float32, 0.0, 6), (torch.bfloat16, 0.5, 30)]
)
@pytest.mark.parametrize("preset", ["official", "paper"])
def test_merged_slots_that_are_equal_leave_nothing_to_the_cuts(preset, dtype, momentum, segments):
    width, tokens = 62, 24 * segments
    settings = {"momentum": momentum, "segment_size": 24, "bank_size": 7, "max_insertions": 1}
    r = rules(preset=preset, noise=0.3, **settings)
    layout = BankLayout.plan(r, width, dtype, 1500)
    twins = 0
    for seed in range(6):
        a = activations(tokens, width, seed).to(dtype)
        whole, odd = (DenseStore(r, width, dtype) for _ in range(2))
        steps = paged_store(layout, dtype)
        drive(whole, a, r)
        drive(odd, a, r, cuts=range(5, tokens, 7))
        for t in range(tokens):
            advance_steps([steps], a[t : t + 1], [t], [r])
        words = 3 + 3 * r.bank_size
        for store in (odd, steps):
            assert torch.equal(store.read_words()[:words], whole.read_words()[:words])
        twins += 7 - len(whole.read_keys(7).unique(dim=0))
    assert twins


def test_squares_are_equal_exactly_where_keys_are():
    row = torch.arange(1.0, 63.0)
    keys = torch.stack([row, row.flip(0), row, -row, row.flip(0), 2 * row, row.roll(1)])
    squares = key_squares(keys)
    torch.testing.assert_close(squares, keys.square().sum(dim=1))
    assert squares[0] == squares[2]
    assert squares[1] == squares[4]
    assert len(squares.unique()) == 5


def test_a_commit_keeps_such_squares():
    r = rules(segment_size=8, momentum=0.0)
    store = DenseStore(r, 62)
    drive(store, activations(40, 62), r)
    keys, squares = store.read_keys(7), Header.unpack(store.read_words()).squares
    equal = (keys[:, None] == keys[None]).all(dim=2)
    assert equal.sum() > 7
    assert torch.equal(squares[:, None] == squares[None], equal)
