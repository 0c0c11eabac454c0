"""A real engine whose memory runs as kernels, interpreted, against one on the plain ops."""

import pytest
from checkpoints import make_prompt
from engines import engine, poisoned_pages, prompt_logprobs
from vllm import SamplingParams

from pacellm_vllm.memory import backend, layer

PACE = {
    "preset": "official",
    "layers": [1, 3],
    "bank_size": 7,
    "segment_size": 16,
    "max_insertions": 3,
}
# Chunks that cross segment ends, several requests a step, one that takes no memory, and decode
# steps that cross a segment end.
PROMPTS = [make_prompt(seed, length) for seed, length in ((1, 37), (2, 30), (3, 5))]
# Shares with the first one what lies before the boundary at which its banks were copied; without
# these its answer is another.
SHARING = [*PROMPTS[0][:34], *PROMPTS[0][16:19]]
OWN = [None, {"pacellm_alpha": 0.9}, {"pacellm_enabled": False}]
SAMPLING = {
    "temperature": 0,
    "max_tokens": 4,
    "ignore_eos": True,
    "detokenize": False,
    "prompt_logprobs": 0,
}


def answers(path):
    with (
        engine(path, pace=PACE, max_num_batched_tokens=40) as running,
        poisoned_pages(running),
    ):
        outputs = running.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in PROMPTS],
            [SamplingParams(extra_args=own, **SAMPLING) for own in OWN],
            use_tqdm=False,
        )
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        counts = {i: memory.counts.as_dict() for i, memory in running.memories().items()}
        kernels = all(memory.runs_kernels for memory in running.memories().values())
        if kernels:
            assert running.llm.collective_rpc("pacellm_memory_record")[0].startswith(
                "pacellm: banks"
            )
        [warm] = running.generate([SHARING], 1, logprobs=0)
        assert warm.num_cached_tokens == running.memories()[1].spec.grid.interval
        [said] = warm.outputs[0].logprobs
        tokens.append([*said])
        assert running.all_blocks_are_back()
    logprobs = [prompt_logprobs(output) for output in outputs]
    logprobs.append([found.logprob for found in said.values()])
    return tokens, logprobs, counts, kernels


def test_an_engine_with_kernels_says_what_one_with_plain_ops_says(checkpoint, monkeypatch):
    tokens, logprobs, counts, kernels = answers(checkpoint())
    assert not kernels
    for module in (backend, layer):
        monkeypatch.setattr(module, "takes_kernels", lambda device_type: True)
    got_tokens, got_logprobs, got_counts, kernels = answers(checkpoint())
    assert kernels
    assert got_tokens == tokens
    for got, want in zip(got_logprobs, logprobs, strict=True):
        assert got == pytest.approx(want, abs=1e-4)
    # Kernels do not count all that the plain ops do.
    for layer_index, mine in got_counts.items():
        assert mine.items() <= counts[layer_index].items()
        assert {"high", "mid", "low", "commits", "slots_last", "slots_peak"} <= {*mine}
    assert min(counts[1][kind] for kind in ("high", "mid", "low", "commits")) > 0
