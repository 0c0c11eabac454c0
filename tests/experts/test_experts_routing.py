"""Routing and the routed FFN on plain tensors."""

import pytest
import torch

from pacellm_vllm.experts.errors import ExpertsError
from pacellm_vllm.experts.ffn import FfnWeights, grouped_activations, grouped_output, masked
from pacellm_vllm.experts.routing import ExpertRouter, choose


def act(x):
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def plain_act(x):
    return torch.relu(x).square()


def random_ffn(seed, neurons, hidden, dtype=torch.float32, bias=False, gated=True):
    generator = torch.Generator().manual_seed(seed)
    rows = 2 * neurons if gated else neurons

    def rand(*shape):
        return (torch.randn(*shape, generator=generator) / 3).to(dtype)

    biases = (rand(rows), rand(hidden)) if bias else (None, None)
    how = act if gated else plain_act
    return FfnWeights(rand(rows, hidden), rand(hidden, neurons), how, *biases)


def dense(x, w):
    return w.act(torch.nn.functional.linear(x, w.inputs, w.bias))


def random_choice(seed, tokens, experts, share=0.4):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, experts, generator=generator) < share


@pytest.mark.parametrize(("tokens", "neurons", "experts"), [(1, 12, 4), (37, 33, 11), (64, 96, 1)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [True, False])
def test_grouped_is_the_masked_truth(tokens, neurons, experts, bias, dtype, gated):
    w = random_ffn(0, neurons, 10, dtype, bias, gated)
    x = torch.randn(tokens, 10, generator=torch.Generator().manual_seed(1)).to(dtype)
    chosen = random_choice(2, tokens, experts)
    a = masked(dense(x, w), chosen)
    out = torch.nn.functional.linear(a, w.down, w.down_bias)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(grouped_activations(x, w, chosen), a, rtol=tolerance, atol=tolerance)
    found = grouped_output(x, w, chosen)
    assert found.dtype == dtype
    torch.testing.assert_close(found, out, rtol=tolerance, atol=tolerance)


def test_experts_not_chosen_are_never_computed():
    """Weights of NaN stand for weights that are not read, and 0 * NaN would show."""
    w = random_ffn(0, 24, 10)
    x = torch.randn(9, 10, generator=torch.Generator().manual_seed(1))
    chosen = random_choice(2, 9, 4)
    chosen[:, 2] = False
    truth = grouped_output(x, w, chosen)
    for weights in (w.inputs[12:18], w.inputs[36:42], w.down[:, 12:18]):
        weights.fill_(torch.nan)
    assert torch.equal(grouped_output(x, w, chosen), truth)
    assert masked(dense(x, w), chosen).isfinite().all()


def router(w, experts, **how):
    neurons = w.down.shape[1]
    made = ExpertRouter(experts, w.down.shape[0], w.act, gated=w.halves == 2, **how)
    made.fill(*w.inputs.split(neurons))
    return made


def test_all_experts_are_the_dense_ffn():
    w = random_ffn(0, 48, 10)
    x = torch.randn(20, 10, generator=torch.Generator().manual_seed(1))
    for how in ({"top_k": 8}, {"mass": 1.0}):
        chosen = router(w, 8, **how).choose(x)
        assert chosen.all()
        out = torch.nn.functional.linear(dense(x, w), w.down)
        torch.testing.assert_close(grouped_output(x, w, chosen), out)


def test_a_token_chooses_alone():
    w = random_ffn(0, 48, 10)
    x = torch.randn(20, 10, generator=torch.Generator().manual_seed(1))
    for how in ({"top_k": 3}, {"mass": 0.6}):
        routed = router(w, 8, **how)
        together = routed.choose(x)
        alone = torch.cat([routed.choose(row[None]) for row in x])
        assert torch.equal(together, alone)
        assert torch.equal(routed.choose(x.flip(0)), together.flip(0))
        assert len(together.unique(dim=0)) > 3


def test_top_k_and_mass_are_what_they_say():
    scores = torch.tensor([[0.1, 0.4, 0.1, 0.3, 0.1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    assert choose(scores, 2, None).tolist() == [
        [False, True, False, True, False],
        [True, True, False, False, False],
        [True, True, False, False, False],
    ]
    assert choose(scores, None, 0.75).sum(-1).tolist() == [3, 4, 0]
    assert choose(scores, None, 0.65)[0].tolist() == [False, True, False, True, False]


@pytest.fixture
def clustered_ffn():
    """An FFN whose experts' gates are alike, as clustering makes them, and inputs for it."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(16, 32, generator=generator)
    gate = kinds.repeat_interleave(12, 0) + 0.3 * torch.randn(192, 32, generator=generator)
    up = torch.randn(192, 32, generator=generator)
    w = FfnWeights(torch.cat([gate, up]), torch.randn(32, 192, generator=generator), act)
    return w, torch.randn(200, 32, generator=generator)


def test_the_router_finds_the_experts_that_are_active(clustered_ffn):
    w, x = clustered_ffn
    mass = dense(x, w).abs().unflatten(-1, (16, 12)).sum(-1)
    best = (mass * choose(mass, 4, None)).sum() / mass.sum()
    found = (mass * router(w, 16, top_k=4).choose(x)).sum() / mass.sum()
    assert best > 0.5
    assert found > 0.9 * best


@pytest.mark.parametrize("gated", [True, False])
def test_the_expected_mass_is_near_the_mass(clustered_ffn, gated):
    w, x = clustered_ffn
    if not gated:
        w = FfnWeights(w.inputs[:192], w.down, plain_act)
    mass = dense(x, w).abs().unflatten(-1, (16, 12)).sum(-1)
    found = router(w, 16, mass=0.5).expected_mass(x)
    shares = [m / m.sum(-1, keepdim=True) for m in (mass, found)]
    assert torch.corrcoef(torch.stack([s.flatten() for s in shares]))[0, 1] > 0.8
    for share in (0.5, 0.9):
        chosen = router(w, 16, mass=share).choose(x)
        held = float((mass * chosen).sum() / mass.sum())
        # One expert more or less is much where few hold most, as without a gate.
        assert share - 0.08 < held < share + (0.08 if gated else 0.15)


def test_weights_of_a_running_engine_are_not_loaded_again():
    """vLLM takes buffers to the meta device for it, and puts back what they held."""
    made = ExpertRouter(3, 8, act, top_k=1).to("meta")
    with pytest.raises(ExpertsError, match="cannot load its weights again"):
        made.fill(torch.randn(6, 8), torch.randn(6, 8))
