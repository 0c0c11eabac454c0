"""The kernels against the plain ops, in Triton's interpreter, over poisoned pages and outputs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from banks import Pool
from dense_store import DenseStore
from test_ops import activations, drive, rules

from pacellm_vllm.memory.device import DeviceTables, counts_of
from pacellm_vllm.memory.pieces import cut_pieces
from pacellm_vllm.memory.plain import PlainStep
from pacellm_vllm.memory.snapshots import SnapshotGrid
from pacellm_vllm.memory.store import PagedStore
from pacellm_vllm.ops.kernels import similarity
from pacellm_vllm.ops.kernels.step import advance_batch
from pacellm_vllm.ops.kernels.top_k import CLOCK
from pacellm_vllm.ops.update import Header

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
LONG_LISTS = {"top_k": 8, "negative_k": 40, "theta_high": 0.5, "theta_low": 0.3}
# Prefill over segment ends, chunks that end within tiles of sums, decode steps, both in one batch.
# In these streams no decision lies within 9e-6 of a tie, where rounding would choose either way.
STEPS = [[75, 7], [20, 1], [1, 40], [2, 4]]


@pytest.mark.parametrize(
    ("width", "dtype", "bank_dtype", "preset", "page_bytes", "settings"),
    [
        (62, torch.float32, None, "official", 2048, {}),
        (62, torch.float32, None, "official", 2048, {"momentum": 0.0}),
        (604, torch.bfloat16, torch.float32, "paper", 1812, {}),
        (344, torch.bfloat16, None, "official", 512, {"negative_k": 0}),
        (72, torch.float16, None, "paper", 1500, LONG_LISTS),
        (62, torch.float32, None, "gentle", 2048, {"noise": 0.5, "alpha": 0.1}),
        (72, torch.bfloat16, None, "gentle", 1500, LONG_LISTS | {"alpha": 0.7}),
    ],
)
def test_kernels_equal_the_plain_ops(width, dtype, bank_dtype, preset, page_bytes, settings):
    r = rules(**{"preset": preset, "bank_size": 23, "max_insertions": 5, **settings})
    mine = [r, replace(r, alpha=0.7, noise=0.0, theta_high=0.6)]
    pool = Pool(r, width, dtype, 2, page_bytes, bank_dtype)
    streams = [
        activations(sum(n), width, i).to(dtype) for i, n in enumerate(zip(*STEPS, strict=True))
    ]
    before = pool.bytes.clone()
    outputs = pool.drive(streams, STEPS, mine)
    kinds = torch.zeros(3)
    for i, (stream, got) in enumerate(zip(streams, outputs, strict=True)):
        truth = DenseStore(r, width, bank_dtype or dtype)
        want, steps = drive(truth, stream, mine[i])
        near = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
        torch.testing.assert_close(got, want, **near)
        words, true_words = pool.bank(i).read_words(), truth.read_words()
        ints = 3 + 3 * r.bank_size
        valid = int(true_words[0])
        assert torch.equal(words[:3], true_words[:3])
        for begin in range(3, ints, r.bank_size):
            assert torch.equal(words[begin : begin + valid], true_words[begin : begin + valid])
        squares, true_squares = map(Header.squares_of, (words, true_words))
        torch.testing.assert_close(squares[:valid], true_squares[:valid], **near)
        for mine_rows, true_rows in zip(
            (pool.bank(i).read_keys(valid), pool.bank(i).read_values(valid)),
            (truth.read_keys(valid), truth.read_values(valid)),
            strict=True,
        ):
            torch.testing.assert_close(mine_rows, true_rows, **near)
        kinds += torch.tensor([[s.high, s.mid, s.low] for s in steps]).sum(0)
    assert kinds.min() > 9
    assert torch.equal(pool.tally[:, :3].sum(0).float(), kinds)
    assert int(pool.tally[:, 3].sum()) == sum(len(s) // r.segment_size for s in streams)
    untouched = torch.ones(len(pool.bytes), dtype=torch.bool)
    untouched[pool.table[:2, : pool.layout.num_pages].flatten().long()] = False
    assert torch.equal(pool.bytes[untouched], before[untouched])
    beside = pool.bytes[:, :256], pool.bytes[:, 256 + page_bytes :]
    assert all((part == 0xFF).all() for part in beside)


@pytest.mark.parametrize(
    ("dtype", "preset", "tokens"),
    [
        (torch.bfloat16, "official", 72),
        (torch.float32, "paper", 70),
        (torch.float32, "gentle", 72),
    ],
)
def test_bits_do_not_depend_on_the_cuts(dtype, preset, tokens):
    """Whole, cut oddly, and token by token from the second segment on."""
    r = rules(preset=preset, bank_size=7, segment_size=35)
    stream = activations(tokens, 62).to(dtype)
    cuts = [
        [[tokens]],
        [[33], [5], [25], [1], [tokens - 64]],
        [[35], *[[1]] * (tokens - 35)],
    ]
    results = []
    for steps in cuts:
        pool = Pool(r, 62, dtype, 1)
        (out,) = pool.drive([stream], steps)
        bank = pool.bank(0)
        words = bank.read_words()
        rows = [bank.read_keys(int(words[0])), bank.read_values(int(words[0]))]
        results.append([part.contiguous().view(torch.uint8) for part in (out, words, *rows)])
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def test_bits_do_not_depend_on_how_many_programs_share_d(monkeypatch):
    """More splits than ``top_k`` reads at once, beside tokens of another round."""
    r = rules(bank_size=5, segment_size=9)
    streams = [activations(n, 5000, n) for n in (13, 11)]
    outputs, pools = [], []
    for most in (similarity.MOST_BYTES, 0):
        monkeypatch.setattr(similarity, "MOST_BYTES", most)
        pools.append(Pool(r, 5000, torch.float32, 2, 1 << 15))
        outputs.append(torch.cat(pools[-1].drive(streams, [[9, 4], [4, 7]])))
    assert torch.equal(*outputs)
    assert torch.equal(pools[0].bytes, pools[1].bytes)
    truth, _ = drive(DenseStore(r, 5000), streams[1], r)
    torch.testing.assert_close(outputs[0][13:], truth, rtol=1e-5, atol=1e-5)


def test_banks_are_found_however_far_into_a_pool_they_lie():
    """Offsets of 2**31 and more are no 32-bit numbers; wrapped ones crash the process."""
    r = rules(bank_size=7, segment_size=12, max_insertions=3)
    stream = activations(30, 62)
    (got,) = Pool(r, 62, torch.float32, 1, 8192, far=True).drive([stream], [[14], [1], [15]])
    want, _ = drive(DenseStore(r, 62), stream, r)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rounds", [0, 2**31 - 2, 2**32 - 2, 2**63 - 9])
def test_the_last_commit_is_known_after_any_number_of_rounds(rounds):
    """Every token is low: a request's first commit leaves 4 slots, its second all 7."""
    r = rules(bank_size=7, segment_size=4, theta_low=1.0, theta_high=1.0)
    pool = Pool(r, 62, torch.float32, 3)
    pool.tally[0, CLOCK.value] = rounds
    a = activations(8, 62)
    last = []
    # The counts of a piece lie in the row of its place in the round, whoever's it is.
    for positions, counts in (
        ([0, 0], [4, 4]),
        ([0, 4], [0, 4]),
        ([4], [2]),
        ([6, 0, 0], [1, 0, 4]),
        ([7], [1]),
    ):
        pool.run(a[: sum(counts)], pool.pieces(positions, counts))
        last.append(counts_of(pool.tally).slots_last)
    assert last == [4, 7, 7, 4, 7]
    assert counts_of(pool.tally).commits == 5


def test_padding_and_requests_without_a_bank_pass_through():
    r = rules(bank_size=7, segment_size=20)
    pool = Pool(r, 62, torch.float32, 2)
    streams = [activations(n, 62, n) for n in (3, 21)]
    pool.drive(streams, [[0, 20]])
    before = pool.bytes.clone()
    a = torch.cat([streams[0][:3], streams[1][20:21]])
    # Row 2 of the table is null, row 3 has block ids that do not exist.
    pieces = pool.pieces([0, 0, 5, 20], [1, 0, 1, 1])
    null, padding = (replace(pieces[1], request=2, position=41), replace(pieces[1], begin=2, end=3))
    padding = replace(padding, request=3, position=41, pages=0)
    real = replace(pieces[2], request=1, position=20, begin=3, end=4)
    a[2] = float("nan")
    out = pool.run(a, [replace(null, begin=1, end=2), padding, real])
    assert out[0].isnan().all()
    assert torch.equal(out[1], a[1])
    assert out[2].isnan().all()
    assert torch.isfinite(out[3]).all()
    changed = (pool.bytes != before).any(dim=1).nonzero().flatten().tolist()
    assert changed
    assert set(changed) <= set(pool.table[1, : pool.layout.num_pages].tolist())


def test_copies_are_the_bank_at_the_boundary_and_touch_nothing_else():
    """One request's copies, another without, and a null row behind which stale ids stand."""
    r = rules(bank_size=7, segment_size=20)
    pool, alone = (Pool(r, 62, torch.float32, 3) for _ in range(2))
    layout, grid = pool.layout, SnapshotGrid(pool.layout, 8)
    every = grid.interval
    streams = [activations(every + 9, 62, seed) for seed in range(3)]
    columns = grid.columns(every)
    free = sorted(set(range(1, len(pool.bytes))) - set(pool.table[:3].flatten().tolist()))
    copies, stale = free[: len(columns)], free[-1]
    table = torch.full((3, columns.stop), stale, dtype=torch.int32)
    table[:, : layout.num_pages] = pool.table[:3, : layout.num_pages]
    table[0, columns.start :] = torch.tensor(copies)
    table[1, columns.start :] = 0
    table[2, : layout.num_pages] = 0
    lengths = [len(stream) for stream in streams]
    starts = [sum(lengths[:i]) for i in range(4)]
    pieces = cut_pieces(starts, lengths, layout, r, grid=grid)
    a, before = torch.cat(streams), pool.bytes.clone()
    # The same tokens up to the boundary and none behind it.
    alone.drive([stream[:every] for stream in streams], [[every, 0, 0]])
    want, copied = alone.bank(0), PagedStore(pool.units, copies, layout)
    valid = int(want.read_words()[0])
    assert valid == 7
    step = DeviceTables(layout, r, 3, len(a), torch.device("cpu")).of_batch(
        table, np.array(starts), np.array(lengths), {}, grid
    )
    advance_batch(a, torch.empty_like(a), pool.banks, step.rounds, r, pool.tally)
    for tolerance in (0, 1e-5):
        assert torch.equal(copied.read_words()[: 3 + 7], want.read_words()[: 3 + 7])
        for read in (PagedStore.read_keys, PagedStore.read_values):
            torch.testing.assert_close(
                read(copied, valid), read(want, valid), rtol=tolerance, atol=tolerance
            )
        assert (pool.bytes[free[len(copies) :]] == 0xFF).all()
        pool.bytes.copy_(before)
        plain = PlainStep.of(table, pieces)
        list(plain.run(pool.units, layout, a, torch.empty_like(a), None))


def test_two_ranks_shares_of_d_give_what_one_rank_gives():
    r = rules(bank_size=7, segment_size=12)
    stream = activations(28, 124)
    (whole,) = Pool(r, 124, torch.float32, 1).drive([stream], [[28]])
    shares = [stream[:, :62].contiguous(), stream[:, 62:].contiguous()]
    pools = [Pool(r, 62, torch.float32, 1) for _ in shares]
    got = [[], []]
    for begin, end in ((0, 12), (12, 24), (24, 28)):
        # What the ranks would exchange is learnt from a run on copies of their banks.
        buffers = [
            parts_of(pool, a[begin:end], begin) for pool, a in zip(pools, shares, strict=True)
        ]
        total = sum(buffer.nan_to_num() for buffer in buffers)
        for rank, pool in enumerate(pools):
            pieces = pool.pieces([begin], [end - begin])
            got[rank].append(pool.run(shares[rank][begin:end], pieces, lambda _, sums=total: sums))
    halves = [torch.cat(parts) for parts in got]
    torch.testing.assert_close(torch.cat(halves, dim=1), whole, rtol=1e-5, atol=1e-5)
    assert not torch.equal(whole, stream)


def parts_of(pool, a, position):
    """The buffer that one rank would have summed over ranks; the pool is left as it was."""
    before, seen = pool.bytes.clone(), []

    def note(buffer):
        seen.append(buffer.clone())
        return buffer

    pool.run(a, pool.pieces([position], [len(a)]), note)
    pool.bytes.copy_(before)
    return seen[0]
