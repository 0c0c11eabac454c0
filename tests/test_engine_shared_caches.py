"""Layers that share another's KV cache, beside windows with pages of another size: Gemma 4."""

import pytest
from any_checkpoint import make_any_checkpoint
from engines import blocks, engine, poisoned_pages
from test_engine_oracle import assert_engine_agrees, clear_cases

# A bank that takes few of the small blocks, so that prefixes are found in each segment.
PACE = {"layers": [3], "preset": "official", "bank_size": 11, "segment_size": 32}
PACE |= {"max_insertions": 5}
MAX_TOKENS = 40


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_any_checkpoint(tmp_path_factory.mktemp("gemma4"), "Gemma4ForCausalLM")


@pytest.fixture(scope="module")
def cases(path):
    return clear_cases(path, PACE, [20, 33, 90, 121, 150], MAX_TOKENS)


def test_cold_warm_and_in_chunks_it_equals_the_oracle(path, cases):
    prompts, truth = [case[0] for case in cases], [case[1] for case in cases]
    settings = {"max_num_batched_tokens": 48}
    with engine(path, PACE, **settings) as running, poisoned_pages(running):
        window, whole, bank = running.core.scheduler.kv_cache_config.kv_cache_groups
        assert 2 * window.kv_cache_spec.page_size_bytes == whole.kv_cache_spec.page_size_bytes
        # The last two of the four layers have no caches of their own.
        assert [len(group.layer_names) for group in (window, whole, bank)] == [1, 1, 1]
        assert_engine_agrees(running, cases, MAX_TOKENS)
        assert running.tokens(prompts, MAX_TOKENS) == truth
        warm = running.generate(prompts, MAX_TOKENS)
        assert [list(output.outputs[0].token_ids) for output in warm] == truth
        assert sum(output.num_cached_tokens for output in warm) > 200
        assert running.all_blocks_are_back()


def test_preempted_requests_read_no_stale_page(path, cases):
    prompts, truth = [case[0] for case in cases], [case[1] for case in cases]
    settings = {"max_model_len": 224, "num_gpu_blocks_override": blocks(576)}
    with engine(path, PACE, **settings) as running, poisoned_pages(running):
        assert running.tokens(prompts, MAX_TOKENS) == truth
        assert running.metric("vllm:num_preemptions") > 0
        assert running.all_blocks_are_back()
