"""Quantised linears: memory takes activations as they come and gives them to what is there."""

import torch
from checkpoints import make_prompt
from engines import engine, prompt_logprobs
from oracle import OracleModel
from torch import nn

PACE = {
    "layers": [1, 3],
    "preset": "paper",
    "bank_size": 23,
    "segment_size": 32,
    "max_insertions": 5,
}
PROMPTS = [make_prompt(seed, 200) for seed in range(2)]


def to_fp8(x):
    """``x`` rounded to fp8 (e4m3) with one scale a row, as vLLM's fp8_per_channel does."""
    scale = x.abs().amax(dim=-1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def quantise(linear):
    weight = to_fp8(linear.weight.bfloat16().float())
    linear.forward = lambda x: nn.functional.linear(to_fp8(x), weight, linear.bias)


def oracle_logprobs(path, pace):
    oracle = OracleModel(path, pace)
    with torch.no_grad():
        for name, module in oracle.model.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                quantise(module)
    return torch.tensor([v for prompt in PROMPTS for v in oracle.generate(prompt, 1)[1]])


def engine_logprobs(path, pace):
    settings = {"dtype": "bfloat16", "quantization": "fp8_per_channel"}
    with engine(path, pace, max_num_batched_tokens=80, **settings) as running:
        outputs = running.generate(PROMPTS, 8, prompt_logprobs=0)
        (down,) = (
            module
            for name, module in running.model().named_modules()
            if name.endswith("layers.1.mlp.down_proj")
        )
        assert down.weight.dtype == torch.float8_e4m3fn
        assert running.all_blocks_are_back()
    return torch.tensor([v for output in outputs for v in prompt_logprobs(output)])


def distance(got, truth):
    return float((got - truth).abs().mean())


def test_memory_adds_no_error_to_that_of_fp8_weights_and_activations(checkpoint):
    """Roundings to bf16 fall either way in fp8, so even without memory the two are only near."""
    plain, truth = (oracle_logprobs(checkpoint(), pace) for pace in ({}, PACE))
    got = engine_logprobs(checkpoint(), PACE)
    assert distance(got, truth) < 1.3 * distance(engine_logprobs(checkpoint(), None), plain)
    assert distance(got, plain) > 1.4 * distance(got, truth)
