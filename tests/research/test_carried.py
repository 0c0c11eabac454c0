"""The experiment of a bank kept across requests, against the oracle's banks kept by hand."""

import pytest
import torch
from carried import Remembering
from checkpoints import make_prompt
from oracle import STRONGER, OracleModel

SIZE = 16


@pytest.mark.parametrize("preset", ["gentle", "official", "paper"])
def test_a_request_starts_with_what_the_last_one_left(checkpoint, preset):
    pace = {"preset": preset, "segment_size": SIZE, "bank_size": 5, "max_insertions": 2}
    pace |= STRONGER.get(preset, {})
    first, after = make_prompt(1, 3 * SIZE + 5), make_prompt(2, 2 * SIZE + 3)
    model = Remembering(checkpoint("qwen2"), **pace)
    oracle = OracleModel(checkpoint("qwen2"), {**pace, "layers": model.layers})
    oracle.forward(first)
    # A new sequence and the old banks; what was not a whole segment is gone.
    oracle._cache, oracle._position = oracle._new_cache(), 0
    oracle._segment = {index: [] for index in oracle.banks}
    logits = oracle._feed(after)
    expected = torch.nn.functional.cross_entropy(
        logits[:-1], torch.tensor(after[1:]), reduction="none"
    )
    model.losses(first, True)
    left = model.left()
    torch.testing.assert_close(model.losses(after, True, left), expected, atol=1e-4, rtol=1e-4)
    empty = model.losses(after, True)
    assert not torch.allclose(empty, expected, atol=1e-3)
    assert torch.equal(empty[: SIZE - 1], model.losses(after, False)[: SIZE - 1])
