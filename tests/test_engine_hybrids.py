"""Decoders of which some layers keep a recurrent state: memory in them, held to the oracle."""

import pytest
from checkpoints import HYBRIDS, make_checkpoint
from engines import NATIVE, engine, poisoned_pages
from test_engine_oracle import (
    MAX_TOKENS_OF_OTHERS,
    SHAPES,
    assert_engine_agrees,
    clear_cases,
)

SHAPE = SHAPES["odd bank, replacements"]
LENGTHS = [20, 64, 150]
MIXTURES = ("jamba", "lfm2_moe", "qwen3_next")
# vLLM's own CPU build has no scan for Jamba, takes Qwen3-Next in bfloat16 only, and differs from
# transformers without memory too for both LFM2.
if NATIVE:
    HYBRIDS = {arch: HYBRIDS[arch] for arch in ("granitemoehybrid", "falcon_h1", "nemotron_h")}


def pace_of(arch, preset):
    """As many layers as have attention, whose pages are then of one size, or another number."""
    layers = [0, 1, 3] if preset == "paper" else [1, 2]
    if arch == "nemotron_h":
        # It has FFNs of their own layers.
        layers = [1, 3] if preset == "paper" else [3]
    site = "output" if arch in MIXTURES else "activation"
    return {"layers": layers, "preset": preset, "site": site, **SHAPE}


@pytest.mark.parametrize(
    ("arch", "preset", "chunks"),
    [
        (arch, preset, chunks)
        for arch in HYBRIDS
        for preset, chunks in (("official", (17, 256)), ("paper", (80,)))
    ],
)
def test_hybrids_equal_the_oracle_in_any_chunks(arch, preset, chunks, checkpoint):
    pace = pace_of(arch, preset)
    cases = clear_cases(checkpoint(arch), pace, LENGTHS, MAX_TOKENS_OF_OTHERS)
    for chunk in chunks:
        with engine(checkpoint(arch), pace, max_num_batched_tokens=chunk) as running:
            assert_engine_agrees(running, cases, MAX_TOKENS_OF_OTHERS)
            memories = running.memories()
            assert sorted(memories) == pace["layers"]
            for memory in memories.values():
                assert min(memory.counts.commits, memory.counts.mid + memory.counts.high) > 0
            assert running.all_blocks_are_back()


@pytest.mark.parametrize(
    "arch", sorted({"lfm2", "granitemoehybrid", "jamba", "qwen3_next"} & HYBRIDS.keys())
)
def test_preempted_requests_read_no_stale_page_or_state(arch, checkpoint):
    pace = pace_of(arch, "gentle")
    cases = clear_cases(checkpoint(arch), pace, [20, 33, 45, 50, 60, 90], 100)
    prompts, truth = [case[0] for case in cases], [case[1] for case in cases]
    settings = {"max_model_len": 256, "num_gpu_blocks_override": 40}
    with engine(checkpoint(arch), pace, **settings) as running, poisoned_pages(running):
        for _ in range(2):
            assert running.tokens(prompts, 100) == truth
        assert running.metric("vllm:num_preemptions") > 0
        assert running.all_blocks_are_back()


def test_many_states_beside_little_attention(tmp_path):
    """Blocks hold the states of one layer then, in groups of their own."""
    kinds = ["mamba", "mamba", "mamba", "attention"]
    path = make_checkpoint(tmp_path, "granitemoehybrid", layer_types=kinds)
    pace = pace_of("granitemoehybrid", "paper")
    cases = clear_cases(path, pace, LENGTHS, MAX_TOKENS_OF_OTHERS)
    with engine(path, pace, max_num_batched_tokens=80) as running:
        plan = running.core.scheduler.kv_cache_config
        assert sorted(len(group.layer_names) for group in plan.kv_cache_groups) == [1, 1, 1, 1, 3]
        # Banks fit the block that one attention layer already needs.
        [size] = {tensor.size for tensor in plan.kv_cache_tensors}
        block = running.core.vllm_config.cache_config.block_size
        assert size == plan.num_blocks * block * 2 * 2 * 32 * 4
        assert running.memories()[0].spec.other_blocks == 3
        assert_engine_agrees(running, cases, MAX_TOKENS_OF_OTHERS)
        assert running.all_blocks_are_back()


@pytest.mark.parametrize("arch", sorted({"granitemoehybrid", "qwen3_next"} & HYBRIDS.keys()))
def test_two_ranks_equal_the_oracle(arch, checkpoint):
    pace = pace_of(arch, "official")
    cases = clear_cases(checkpoint(arch), pace, LENGTHS, MAX_TOKENS_OF_OTHERS)
    settings = {"tensor_parallel_size": 2, "max_num_batched_tokens": 80}
    with engine(checkpoint(arch), pace, **settings) as running:
        assert_engine_agrees(running, cases, MAX_TOKENS_OF_OTHERS)
        assert running.all_blocks_are_back()
