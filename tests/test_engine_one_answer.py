"""One set of requests, many schedules, one set of tokens: the oracle's."""

import pytest
from engines import NATIVE, blocks, engine, poisoned_pages
from test_engine_oracle import clear_cases

PACE = {
    "preset": "official",
    "layers": [1, 3],
    "bank_size": 23,
    "segment_size": 32,
    "max_insertions": 5,
}
MAX_TOKENS = 70
TIGHT = {"num_gpu_blocks_override": blocks(1056), "max_model_len": 512}

# max_num_batched_tokens, max_num_seqs, prefix caching, other settings, rounds, arrival order
SCHEDULES = {
    "one by one": (512, 1, False, {}, 1, 1),
    "small chunks": (17, 2, False, {}, 1, 1),
    "chunks of a segment": (32, 4, False, {}, 1, 1),
    "odd chunks": (75, 8, False, {}, 1, 1),
    "whole prompts": (2048, 8, False, {}, 1, 1),
    "reversed arrivals": (100, 3, False, {}, 1, -1),
    "cache, cold": (64, 4, True, {}, 1, 1),
    "cache, warm": (64, 4, True, {}, 3, 1),
    "cache, warm, reversed": (512, 2, True, {}, 2, -1),
    "preempted": (80, 8, False, TIGHT, 1, 1),
    "preempted, cache": (80, 8, True, TIGHT, 2, 1),
    "large blocks": (96, 8, True, {"block_size": 32}, 2, 1),
    "priorities": (80, 3, True, {"scheduling_policy": "priority"}, 2, 1),
    "asynchronous": (64, 4, True, {"async_scheduling": True}, 2, 1),
    "asynchronous, preempted": (
        80,
        8,
        True,
        {"async_scheduling": True, **TIGHT},
        2,
        1,
    ),
}


@pytest.fixture(scope="module")
def cases(checkpoint):
    return clear_cases(checkpoint(), PACE, [20, 64, 90, 121, 150, 200, 260], MAX_TOKENS)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_gives_the_oracles_tokens(name, cases, checkpoint, monkeypatch):
    if NATIVE and name.startswith("asynchronous"):
        pytest.skip("vLLM's own CPU platform turns asynchronous scheduling off")
    monkeypatch.setenv("PACELLM_CPU_ASYNC_SCHEDULING", "1")
    chunk, seqs, caching, settings, rounds, order = SCHEDULES[name]
    prompts = [prompt for prompt, _, _ in cases][::order]
    truth = [tokens for _, tokens, _ in cases][::order]
    with (
        engine(
            checkpoint(),
            pace=PACE,
            max_num_batched_tokens=chunk,
            max_num_seqs=seqs,
            enable_prefix_caching=caching,
            **{"async_scheduling": False, **settings},
        ) as running,
        poisoned_pages(running),
    ):
        assert running.core.async_scheduling == name.startswith("asynchronous")
        for _ in range(rounds):
            assert running.tokens(prompts, MAX_TOKENS) == truth
        if "preempted" in name:
            assert running.metric("vllm:num_preemptions") > 0
        if rounds > 1 and "preempted" not in name:
            assert running.metric("vllm:prefix_cache_hits") > 0
        assert running.all_blocks_are_back()
