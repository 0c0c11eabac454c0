"""Decoders of which some layers keep a recurrent state: memory in them, held to the oracle."""

import pytest
from checkpoints import HYBRIDS, make_checkpoint, make_prompt
from engines import NATIVE, engine, poisoned_pages
from oracle import STRONGER
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
# On a CPU vLLM caches no states of Mamba2: its scan leaves none but the last one there.
CACHED = [
    case
    for case in (
        ("lfm2", "official"),
        ("jamba", "paper"),
        ("qwen3_next", "official"),
        ("qwen3_next", "paper"),
    )
    if case[0] in HYBRIDS
]


def pace_of(arch, preset):
    """As many layers as have attention, whose pages are then of one size, or another number."""
    layers = [0, 1, 3] if preset == "paper" else [1, 2]
    if arch == "nemotron_h":
        # It has FFNs of their own layers.
        layers = [1, 3] if preset == "paper" else [3]
    site = "output" if arch in MIXTURES else "activation"
    stronger = STRONGER.get(preset, {})
    return {"layers": layers, "preset": preset, "site": site, **stronger, **SHAPE}


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
        settings = {"max_num_batched_tokens": chunk, "enable_prefix_caching": False}
        with engine(checkpoint(arch), pace, **settings) as running:
            assert_engine_agrees(running, cases, MAX_TOKENS_OF_OTHERS)
            memories = running.memories()
            assert sorted(memories) == pace["layers"]
            for memory in memories.values():
                assert min(memory.counts.commits, memory.counts.mid + memory.counts.high) > 0
            assert running.all_blocks_are_back()


@pytest.mark.parametrize(
    ("arch", "caching"),
    [
        case
        for case in (
            ("lfm2", True),
            ("granitemoehybrid", False),
            ("jamba", True),
            ("qwen3_next", False),
        )
        if case[0] in HYBRIDS
    ],
)
def test_preempted_requests_read_no_stale_page_or_state(arch, caching, checkpoint):
    pace = pace_of(arch, "gentle")
    cases = clear_cases(checkpoint(arch), pace, [20, 33, 45, 50, 60, 90], 50)
    prompts, truth = [case[0] for case in cases], [case[1] for case in cases]
    settings = {"max_model_len": 160, "num_gpu_blocks_override": 26}
    settings["enable_prefix_caching"] = caching
    with engine(checkpoint(arch), pace, **settings) as running, poisoned_pages(running):
        for _ in range(2):
            assert running.tokens(prompts, 50) == truth
        assert running.metric("vllm:num_preemptions") > 0
        assert running.all_blocks_are_back()


@pytest.mark.parametrize(("arch", "preset"), CACHED)
def test_a_warm_run_equals_a_cold_one_and_hits(arch, preset, checkpoint):
    pace = pace_of(arch, preset)
    shared = make_prompt(11, 128)
    cases = clear_cases(checkpoint(arch), pace, [40, 97, 200], 20)
    cases += clear_cases(checkpoint(arch), pace, [140, 170], 20, shared)
    prompts, truth = [case[0] for case in cases], [case[1] for case in cases]
    for chunk in (64, 256):
        with (
            engine(checkpoint(arch), pace, max_num_batched_tokens=chunk) as running,
            poisoned_pages(running),
        ):
            assert running.tokens(prompts, 20) == truth
            warm = running.generate(prompts, 20)
            assert [list(output.outputs[0].token_ids) for output in warm] == truth
            hits = [output.num_cached_tokens for output in warm]
            assert sum(hits) >= 192
            assert all(hit % SHAPE["segment_size"] == 0 for hit in hits)
            assert running.all_blocks_are_back()


def test_a_state_that_another_request_left_is_found_with_its_bank(checkpoint):
    """Requests that share a prefix, one after the other and together."""
    arch = "lfm2"
    if arch not in HYBRIDS:
        pytest.skip(f"{arch} does not run here")
    pace = pace_of(arch, "official")
    shared = make_prompt(11, 128)
    cases = clear_cases(checkpoint(arch), pace, [140, 150, 170, 190], 24, shared)
    prompts, truth = [case[0] for case in cases], [case[1] for case in cases]
    settings = {"max_num_batched_tokens": 64, "max_num_seqs": 2}
    with engine(checkpoint(arch), pace, **settings) as running, poisoned_pages(running):
        alone = [running.generate([prompt], 24)[0] for prompt in prompts]
        assert [list(output.outputs[0].token_ids) for output in alone] == truth
        assert [output.num_cached_tokens for output in alone] == [0, 128, 128, 128]
        assert running.tokens(prompts * 3, 24) == truth * 3
        assert running.all_blocks_are_back()


def test_many_states_beside_little_attention(tmp_path):
    """Blocks hold the states of one layer then, in groups of their own."""
    kinds = ["mamba", "mamba", "mamba", "attention"]
    path = make_checkpoint(tmp_path, "granitemoehybrid", layer_types=kinds)
    pace = pace_of("granitemoehybrid", "paper")
    cases = clear_cases(path, pace, LENGTHS, MAX_TOKENS_OF_OTHERS)
    settings = {"max_num_batched_tokens": 80, "enable_prefix_caching": False}
    with engine(path, pace, **settings) as running:
        plan = running.core.scheduler.kv_cache_config
        assert sorted(len(group.layer_names) for group in plan.kv_cache_groups) == [1, 1, 1, 1, 3]
        # Banks fit the block that one attention layer already needs.
        [size] = {tensor.size for tensor in plan.kv_cache_tensors}
        block = running.core.vllm_config.cache_config.block_size
        assert size == plan.num_blocks * block * 2 * 2 * 32 * 4
        assert running.memories()[0].spec.other_blocks == 3
        assert_engine_agrees(running, cases, MAX_TOKENS_OF_OTHERS)
        assert running.all_blocks_are_back()


def test_a_sum_of_experts_and_a_dense_ffn_equals_the_oracle(tmp_path):
    """Granite's larger hybrids: neither of the two is the whole FFN."""
    path = make_checkpoint(tmp_path, "granitemoehybrid", num_local_experts=4)
    pace = {"layers": [1, 2], "preset": "official", **SHAPE}
    with (
        pytest.raises(ValueError, match=r"layer 1 has block_sparse_moe beside .*\.shared_mlp"),
        engine(path, pace),
    ):
        pass
    cases = clear_cases(path, {**pace, "site": "output"}, LENGTHS, MAX_TOKENS_OF_OTHERS)
    settings = {"max_num_batched_tokens": 80, "enable_prefix_caching": False}
    with engine(path, {**pace, "site": "auto"}, **settings) as running:
        assert_engine_agrees(running, cases, MAX_TOKENS_OF_OTHERS)
        for memory in running.memories().values():
            assert min(memory.counts.commits, memory.counts.mid + memory.counts.high) > 0
        assert running.all_blocks_are_back()


@pytest.mark.parametrize("arch", sorted({"granitemoehybrid", "qwen3_next"} & HYBRIDS.keys()))
def test_two_ranks_equal_the_oracle(arch, checkpoint):
    pace = pace_of(arch, "official")
    cases = clear_cases(checkpoint(arch), pace, LENGTHS, MAX_TOKENS_OF_OTHERS)
    settings = {"tensor_parallel_size": 2, "max_num_batched_tokens": 80}
    settings["enable_prefix_caching"] = False
    with engine(checkpoint(arch), pace, **settings) as running:
        assert_engine_agrees(running, cases, MAX_TOKENS_OF_OTHERS)
        assert running.all_blocks_are_back()
