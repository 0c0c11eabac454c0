"""Recurrent layers in PyTorch: models without memory against transformers, and what is refused."""

import pytest
import torch
from checkpoints import HYBRIDS, make_prompt
from engines import NATIVE, engine, prompt_logprobs
from hf import load_model
from vllm import _custom_ops as ops


@pytest.mark.skipif(NATIVE, reason="vLLM's own operators are not ours to test")
@pytest.mark.parametrize("arch", HYBRIDS)
def test_hybrids_without_memory_equal_transformers(arch, checkpoint):
    model = load_model(checkpoint(arch), dtype=torch.float32, attn_implementation="eager")
    prompts = [make_prompt(seed, length) for seed, length in enumerate((5, 40, 150))]
    with engine(
        checkpoint(arch), max_num_batched_tokens=64, enable_prefix_caching=False
    ) as running:
        outputs = running.generate(prompts, 12, prompt_logprobs=0)
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = list(output.outputs[0].token_ids)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens]), use_cache=False).logits[0]
        logprobs = logits.log_softmax(-1)
        want = [logprobs[t, token].item() for t, token in enumerate(prompt[1:])]
        assert prompt_logprobs(output) == pytest.approx(want, abs=1e-3)
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens


@pytest.mark.skipif(NATIVE, reason="vLLM's own operators are not ours to test")
def test_draft_tokens_are_refused():
    x, state = torch.zeros(1, 1, 4), torch.zeros(2, 1, 4, 3)
    matrix, vector = torch.zeros(1, 4, 3), torch.zeros(1, 1, 3)
    rows = torch.ones(1, dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="Draft tokens"):
        ops.selective_state_update_cpu(
            state,
            x,
            x,
            matrix,
            vector,
            vector,
            None,
            None,
            None,
            True,
            rows,
            rows,
            0,
            x,
            rows,
            None,
        )
    with pytest.raises(NotImplementedError, match="Several tokens"):
        ops.causal_conv1d_update_cpu_vec(
            torch.zeros(1, 4, 2), torch.zeros(2, 4, 3), torch.zeros(4, 4), None, None, rows
        )
