"""Activations that are not finite, or too large to square, in the kernels: as the oracle says."""

import pytest
import torch
from banks import Pool
from test_ops import rules
from unsound import PACE, PLACES, assert_bank_is, near, streams, told

# The interpreter computes with NumPy, which speaks up about what is meant here.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

TOKENS = 60


def drive(pool, streams, steps):
    """Outputs of ``streams`` run together in ``steps`` tokens of each at a time."""
    cuts = [[n] * len(streams) for n in steps]
    return pool.drive(streams, cuts)


@pytest.mark.parametrize(
    ("width", "dtype", "preset"), [(62, torch.float32, "official"), (34, torch.bfloat16, "paper")]
)
def test_kernels_are_the_oracles_and_no_other_bit_knows(width, dtype, preset):
    """One request a poison, beside a sound one; in pieces that end in and at segments' ends."""
    r = rules(**PACE, preset=preset)
    sound, poisoned = streams(width, dtype)
    tried = [sound, poisoned["mixed"], poisoned["nan"], poisoned["huge"]]
    pool = Pool(r, width, dtype, len(tried))
    outputs = drive(pool, tried, [30, 1, 1, 1, 2, 25])
    others = [t for t in range(TOKENS) if t not in PLACES]
    for i, stream in enumerate(tried):
        want, bank = told(stream, **PACE, preset=preset)
        torch.testing.assert_close(outputs[i], want, equal_nan=True, **near(dtype))
        assert_bank_is(pool.bank(i), bank)
        if i > 1:
            assert torch.equal(outputs[i][others], outputs[1][others])
            assert torch.equal(pool.bank(i).read_keys(5), pool.bank(1).read_keys(5))
    assert int(pool.tally[:, :3].sum()) == TOKENS + 3 * len(others)
    (alone,) = drive(Pool(r, width, dtype, 1), [sound], [TOKENS])
    assert torch.equal(outputs[0], alone)


def test_a_bank_stays_empty_while_nothing_can_be_kept():
    r = rules(**PACE, preset="paper")
    stream = streams(62, torch.float32, range(13))[1]["mixed"]
    want, bank = told(stream, **PACE, preset="paper")
    pool = Pool(r, 62, torch.float32, 1)
    (got,) = drive(pool, [stream], [1, 20, 39])
    torch.testing.assert_close(got, want, equal_nan=True)
    assert_bank_is(pool.bank(0), bank)


def test_ranks_that_hold_only_sound_shares_of_a_token_pass_it_by_too():
    r = rules(**PACE, preset="official")
    stream = streams(124, torch.float32)[1]["mixed"]
    want, bank = told(stream, **PACE, preset="official")
    shares = [part.contiguous() for part in stream.chunk(2, dim=1)]
    pools = [Pool(r, 62, torch.float32, 1) for _ in shares]
    outputs = [[], []]
    for begin in range(0, TOKENS, 12):
        parts = [share[begin : begin + 12] for share in shares]
        total = sum(sent(pool, a, begin) for pool, a in zip(pools, parts, strict=True))
        for out, pool, a in zip(outputs, pools, parts, strict=True):
            pieces = pool.pieces([begin], [12])
            out.append(pool.run(a, pieces, lambda _, total=total: total.clone()))
    halves = [torch.cat(out) for out in outputs]
    torch.testing.assert_close(torch.cat(halves, dim=1), want, equal_nan=True)
    for pool, keys in zip(pools, bank.keys.chunk(2, dim=1), strict=True):
        torch.testing.assert_close(pool.bank(0).read_keys(5), keys)


def sent(pool, a, position):
    """What a rank gives to the sum over ranks; the pool is left as it was."""
    before, seen = pool.bytes.clone(), []
    pool.run(
        a, pool.pieces([position], [len(a)]), lambda buffer: seen.append(buffer.clone()) or buffer
    )
    pool.bytes.copy_(before)
    return seen[0]
