"""The ops on plain tensors: independence of cuts, and agreement with a paged bank."""

import pytest
import torch
from dense_store import DenseStore

from pacellm_vllm.config import PaceConfig
from pacellm_vllm.memory.layout import BankLayout
from pacellm_vllm.memory.store import PagedStore, unit_view
from pacellm_vllm.ops import lookup
from pacellm_vllm.ops.lookup import largest, look_up
from pacellm_vllm.ops.sums import TILE, running_sum, tile_turns
from pacellm_vllm.ops.update import advance

WIDTHS = [8, 62, 344]


def rules(**settings):
    return PaceConfig.from_sources(
        {"segment_size": 48, "bank_size": 7, "top_k": 2, "preset": "official", **settings}
    ).rules()


def activations(tokens, width, seed=0):
    """Clustered rows, so that high, mid and low tokens all occur."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, width, generator=g)
    noise = 3 * torch.rand(tokens, 1, generator=g) ** 4
    pick = torch.randint(5, (tokens,), generator=g)
    return centres[pick] + noise * torch.randn(tokens, width, generator=g)


def drive(store, a, rules, cuts=()):
    """Run ``a`` through ``store`` in pieces that end at ``cuts`` and at segment ends."""
    size = rules.segment_size
    ends = sorted({*cuts, *range(size, len(a), size), len(a)})
    outputs, progress, start = [], [], 0
    for end in ends:
        o, step = advance(store, a[start:end], start, rules)
        outputs.append(o)
        progress.append(step)
        start = end
    return torch.cat(outputs), progress


def scattered_pool(layout, dtype, banks=1, seed=0):
    """A packed pool whose every byte is poison (NaN), its units, and pages for some banks."""
    g = torch.Generator().manual_seed(seed)
    needed = banks * layout.num_pages
    blocks, stride = 3 * needed + 1, layout.page_bytes + 512
    pool = torch.full((blocks * stride,), 0xFF, dtype=torch.uint8)
    view = pool.view(blocks, 1, 1, stride)[..., 256 : 256 + layout.page_bytes]
    pages = 1 + torch.randperm(blocks - 1, generator=g)[:needed]
    return pool, unit_view(view, layout, dtype), pages.view(banks, -1).tolist()


def paged_store(layout, dtype):
    """A bank in scattered pages of a packed pool."""
    _, units, (pages,) = scattered_pool(layout, dtype)
    return PagedStore(units, pages, layout)


def test_no_slot_is_longer_than_the_token_that_reads_it():
    """Three parallel slots and one across, with numbers that can be added up by hand."""
    along, across = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    keys = torch.stack([8 * along, 2 * along, along / 2, 6 * across])
    values = torch.stack([8 * along, 3 * along, along / 4, 6 * across])
    settings = {"alpha": 0.5, "noise": 1.0, "negative_k": 1, "top_k": 3}
    # Of length 2: a quarter of the first slot is left, all of the next two, a third of the last.
    recalled = (2 + 3 + 0.25) / 3 * along + 2 * across
    for clip, found in ((True, recalled), (False, 11.25 / 3 * along + 6 * across)):
        a = (2 * along)[None]
        output = look_up(a, keys, values, rules(**settings, clip=clip)).output[0]
        torch.testing.assert_close(output, 0.5 * 2 * along + 0.5 * found)
    # What is not compared reads nothing, however long.
    for bad in (float("inf"), float("nan"), 1e20):
        a = torch.tensor([[bad, 1.0]])
        output = look_up(a, keys, values, rules(**settings, clip=True)).output
        assert torch.equal(output.view(torch.int32), a.view(torch.int32))


@pytest.mark.parametrize("preset", ["official", "paper"])
def test_all_regimes_occur_and_slots_are_replaced(preset):
    r = rules(preset=preset)
    store = DenseStore(r, 62)
    _, steps = drive(store, activations(600, 62), r)
    assert min(sum(s.high for s in steps), sum(s.mid for s in steps)) > 20
    assert sum(s.low for s in steps) > r.bank_size + 20
    assert steps[-2].committed.valid == r.bank_size


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("preset", ["official", "paper"])
def test_a_paged_bank_equals_a_dense_one(width, dtype, preset):
    r = rules(preset=preset, bank_size=23, max_insertions=5)
    a = activations(500, width).to(dtype)
    layout = BankLayout.plan(r, width, dtype, page_bytes=2048)
    paged = paged_store(layout, dtype)
    dense = DenseStore(r, width, dtype)
    got, _ = drive(paged, a, r)
    want, _ = drive(dense, a, r)
    assert torch.equal(got, want)
    assert torch.equal(paged.read_words(), dense.read_words())
    assert torch.equal(paged.read_keys(23), dense.read_keys(23))
    assert torch.equal(paged.read_values(23), dense.read_values(23))
    assert not got.isnan().any()


def test_a_paged_bank_writes_only_its_own_pages():
    r = rules(bank_size=23)
    layout = BankLayout.plan(r, 62, torch.float32, page_bytes=2048)
    pool, units, (pages,) = scattered_pool(layout, torch.float32)
    drive(PagedStore(units, pages, layout), activations(500, 62), r)
    touched = (pool.view(-1, layout.page_bytes + 512) != 0xFF).any(dim=1).nonzero().flatten()
    assert set(touched.tolist()) <= set(pages)


def test_pages_claimed_for_the_tokens_so_far_are_enough():
    r = rules(bank_size=23, segment_size=40)
    layout = BankLayout.plan(r, 62, torch.float32, page_bytes=1024)
    a = activations(90, 62)
    want, _ = drive(DenseStore(r, 62), a, r, cuts=range(1, 90))
    _, units, (pages,) = scattered_pool(layout, torch.float32)
    for t in range(90):
        held = layout.pages_for(t + 1)
        store = PagedStore(units, pages[:held], layout)
        o, _ = advance(store, a[t : t + 1], t, r)
        torch.testing.assert_close(o, want[t : t + 1])
    assert layout.pages_for(1) < layout.pages_for(12) < layout.pages_for(41) == layout.num_pages


@pytest.mark.parametrize("preset", ["official", "paper"])
def test_the_bank_does_not_depend_on_the_cuts(preset):
    r = rules(preset=preset)
    a = activations(300, 344)
    whole, one_by_one, odd = (DenseStore(r, 344) for _ in range(3))
    outputs = [
        drive(whole, a, r)[0],
        drive(one_by_one, a, r, cuts=range(1, 300))[0],
        drive(odd, a, r, cuts=[1, 31, 33, 50, 79, 80, 81, 200])[0],
    ]
    for o in outputs[1:]:
        torch.testing.assert_close(o, outputs[0], rtol=1e-5, atol=1e-5)
    for store in (one_by_one, odd):
        assert torch.equal(store.words, whole.words)
        torch.testing.assert_close(store.slots, whole.slots, rtol=1e-5, atol=1e-5)


def test_a_stale_bank_does_not_show():
    r = rules()
    store = DenseStore(r, 62)
    drive(store, activations(400, 62, seed=1), r)
    a = activations(300, 62, seed=2)
    again, _ = drive(store, a, r)
    fresh, _ = drive(DenseStore(r, 62), a, r)
    assert torch.equal(again, fresh)


@pytest.mark.parametrize("cuts", [range(1, 100), [31, 32, 33], [5, 70], []])
def test_running_sums_have_the_same_bits_for_any_cut(cuts):
    rows = torch.randn(100, 33) * torch.logspace(-3, 3, 100)[:, None]
    rows[40:70] = 0

    def add_up(ends):
        total, tile, start = torch.zeros(33), torch.zeros(33), 0
        for end in ends:
            piece = rows[start:end]
            chosen = piece.any(dim=1).nonzero().flatten()
            running_sum(total, tile, piece, tile_turns(chosen, start), start)
            start = end
        return total + tile

    want = torch.zeros(33)
    for begin in range(0, 100, TILE):
        tile = torch.zeros(33)
        for row in rows[begin : begin + TILE]:
            tile = tile + row
        want = want + tile
    assert torch.equal(add_up([*cuts, 100]), want)


def test_ties_go_to_the_lower_slot_and_unlike_tokens_pass_through():
    r = rules(top_k=1, negative_k=1)
    keys = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    values = torch.arange(8.0).view(4, 2)
    a = torch.tensor([[2.0, 0.0], [-1.0, -1.0]])
    found = look_up(a, keys, values, r)
    assert found.top.tolist()[0] == [1]
    want = 0.8 * a[0] + 0.2 * (values[1] + 0.1 * values[0])
    torch.testing.assert_close(found.output[0], want)
    assert torch.equal(found.output[1], a[1])


@pytest.mark.parametrize("k", [1, 4, 30])
def test_largest_ranks_as_a_stable_sort_does(k):
    rows = torch.randint(-3, 4, (50, 23), generator=torch.Generator().manual_seed(0)) / 3
    rows[:, ::2] *= -1  # zeros of both signs
    want = rows.sort(dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(largest(rows, k), want)
    assert torch.equal(largest(-rows, k), rows.sort(dim=1, stable=True).indices[:, :k])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_widening_a_few_tokens_at_a_time_is_widening_all(dtype, monkeypatch):
    r = rules(theta_low=-1.0, theta_high=0.5)
    a, keys, values = (activations(n, 62, n).to(dtype) for n in (50, 7, 8))
    whole = look_up(a, keys, values[:7], r)
    monkeypatch.setattr(lookup, "_WIDENED_ELEMENTS", 62 * 3)
    some = look_up(a, keys, values[:7], r)
    assert torch.equal(some.top, whole.top)
    torch.testing.assert_close(some.output, whole.output)
    torch.testing.assert_close(some.mean_top, whole.mean_top)


@pytest.mark.parametrize(("width", "page_bytes"), [(2730, 8192), (1366, 8192), (4098, 16384)])
def test_rows_that_are_whole_words_are_not_split_into_half_words(width, page_bytes):
    """Kernels read the header as words; none of these has a split into multiples of 16 bytes."""
    layout = BankLayout.plan(rules(bank_size=100), width, torch.bfloat16, page_bytes)
    assert layout.unit_bytes % 4 == 0


def test_layouts_split_rows_that_a_page_cannot_hold():
    r = rules(bank_size=100)
    wide = BankLayout.plan(r, 18944, torch.bfloat16, page_bytes=32768)
    assert wide.parts > 1
    assert wide.unit_elements * 2 <= 32768
    packed = BankLayout.plan(r, 18944, torch.bfloat16, page_bytes=458752)
    assert packed.num_pages * packed.page_bytes <= 1.3 * packed.committed_bytes
    with pytest.raises(ValueError, match="too small for rows of 18944"):
        BankLayout.plan(r, 18944, torch.float32, page_bytes=256)
