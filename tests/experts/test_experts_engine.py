"""A clustered checkpoint in the engine: the same tokens, with and without memory."""

import pytest
from checkpoints import make_prompt
from engines import engine, prompt_logprobs

from pacellm_vllm.experts.rewrite import cluster_checkpoint
from pacellm_vllm.experts.settings import ClusterSettings

PACE = {"layers": [1, 3], "segment_size": 32, "bank_size": 16, "alpha": 0.5}


def run(path, pace):
    prompts = [make_prompt(seed, 90 + 40 * seed) for seed in range(3)]
    with engine(path, pace=pace, max_num_batched_tokens=64) as running:
        outputs = running.generate(prompts, 24, prompt_logprobs=0)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    return tokens, [value for output in outputs for value in prompt_logprobs(output)]


@pytest.fixture(scope="module")
def clustered(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clustered")
    results = cluster_checkpoint(
        checkpoint("qwen2"),
        folder / "out",
        ClusterSettings(8),
        cache=folder / "cache",
        progress=False,
    )
    assert len(results) == 4
    return folder / "out"


def test_greedy_tokens_are_those_of_the_original_with_memory_off_and_on(checkpoint, clustered):
    off, off_logprobs = run(checkpoint("qwen2"), None)
    on, on_logprobs = run(checkpoint("qwen2"), PACE)
    # Else the second comparison would say nothing about memory.
    assert on != off
    for pace, tokens, logprobs in ((None, off, off_logprobs), (PACE, on, on_logprobs)):
        found, found_logprobs = run(clustered, pace)
        assert found == tokens
        assert found_logprobs == pytest.approx(logprobs, abs=1e-3)
