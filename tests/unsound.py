"""Streams with activations no memory should keep, and what the oracle makes of them."""

import torch
from oracle import Bank, MemoryRules
from test_ops import activations

PACE = {"segment_size": 12, "bank_size": 5, "top_k": 2, "max_insertions": 3}
NAN, INF, HUGE = float("nan"), float("inf"), 1e20
# One element, both ends of a row (two ranks' shares), or all of it; 1e20 squared is no fp32 number.
POISONS = {
    "nan": lambda row: row.__setitem__(0, NAN),
    "inf": lambda row: row.__setitem__(-1, INF),
    "-inf": lambda row: row.__setitem__(0, -INF),
    "infs": lambda row: row.__setitem__(slice(None, None, 2), INF),
    "huge": lambda row: row.mul_(HUGE / row.abs().max()),
}
# Of 60 tokens: the first, one and the last while the bank is empty; the first, one and the last of
# a later segment; most of a segment; the last of all.
PLACES = [0, 4, 11, 12, 18, 23, *range(25, 34), 59]


def streams(width, dtype, places=PLACES):
    """60 tokens, and them again with each of ``POISONS`` at ``places``, and with all in turn."""
    sound = activations(60, width, 3).to(dtype)
    kinds = {name: [poison] for name, poison in POISONS.items()} | {"mixed": [*POISONS.values()]}
    made = {}
    for name, poisons in kinds.items():
        made[name] = sound.clone()
        for i, token in enumerate(places):
            poisons[i % len(poisons)](made[name][token])
    return sound, made


def told(stream, **pace):
    """The oracle's outputs and its bank after the whole segments of ``stream``."""
    bank = Bank(MemoryRules.of(**pace), stream.shape[1], stream.dtype)
    outputs = []
    for a in stream.split(pace["segment_size"]):
        outputs.append(bank.enhance(a)[0])
        if len(a) == pace["segment_size"]:
            bank.update(a, outputs[-1])
    assert bank.closest_call > 1e-5, "another seed: a decision here is within rounding"
    return torch.cat(outputs), bank


def near(dtype):
    """How far outputs and rows of ``dtype`` may be from the oracle's."""
    return {} if dtype is torch.float32 else {"rtol": 0.016, "atol": 0.016}


def assert_bank_is(store, bank):
    """A store's committed slots are finite and the oracle's."""
    valid = int(store.read_words()[0])
    assert valid == bank.num_valid
    for got, want in (
        (store.read_keys(valid), bank.keys[:valid]),
        (store.read_values(valid), bank.values[:valid]),
    ):
        assert got.isfinite().all()
        torch.testing.assert_close(got, want, **near(want.dtype))
    usage = store.read_words()[3 : 3 + valid]
    assert usage.tolist() == bank.usage[:valid].tolist()
