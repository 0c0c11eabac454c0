"""Routed experts in PyTorch against a loop over tokens, and what vLLM asks of them."""

import pytest
import torch
from vllm import _custom_ops as ops

import pacellm_vllm.platform.experts  # noqa: F401

TOKENS, EXPERTS, TOP_K, HIDDEN, WIDTH = 7, 5, 2, 16, 12


def activated(hidden, activation):
    """As transformers does it for gpt-oss, and as all others do."""
    if activation == "swigluoai":
        gate = hidden[::2].clamp(max=7)
        up = hidden[1::2].clamp(min=-7, max=7)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    gate, up = hidden[:WIDTH], hidden[WIDTH:]
    if activation == "silu":
        return torch.nn.functional.silu(gate) * up
    approximate = {"gelu": "none", "gelu_tanh": "tanh"}[activation]
    return torch.nn.functional.gelu(gate, approximate=approximate) * up


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "swigluoai"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("weighted_before", [False, True])
def test_experts_are_summed_by_their_weights(activation, biased, weighted_before):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    x = random(TOKENS, HIDDEN)
    w13, w2 = random(EXPERTS, 2 * WIDTH, HIDDEN), random(EXPERTS, HIDDEN, WIDTH)
    b13 = random(EXPERTS, 2 * WIDTH) if biased else None
    b2 = random(EXPERTS, HIDDEN) if biased else None
    weights = torch.rand(TOKENS, TOP_K, generator=generator)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(TOKENS)])
    expected = torch.zeros(TOKENS, HIDDEN)
    for t in range(TOKENS):
        for k in range(TOP_K):
            e = ids[t, k]
            hidden = w13[e] @ x[t] + (b13[e] if biased else 0)
            part = w2[e] @ activated(hidden, activation) + (b2[e] if biased else 0)
            expected[t] += part * (1 if weighted_before else weights[t, k])
    out = torch.full_like(x, float("nan"))
    packed = [ops.cpu_prepack_moe_weight(weight, "vec") for weight in (w13, w2)]
    ids = ids.to(torch.int32)
    ops.cpu_fused_moe(out, x, *packed, b13, b2, weights, ids, activation, "vec", weighted_before)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-3)


def test_another_activation_is_refused():
    x = torch.zeros(1, 4)
    with pytest.raises(NotImplementedError, match="Experts with activation relu2"):
        ops.cpu_fused_moe(
            x.clone(),
            x,
            torch.zeros(1, 4, 4),
            torch.zeros(1, 4, 2),
            None,
            None,
            torch.ones(1, 1),
            torch.zeros(1, 1, dtype=torch.int32),
            "relu2",
            "vec",
        )
