"""One answer under every schedule: chunks, neighbours, preemption, stale pages, aborts, forks."""

import pytest
import torch
from checkpoints import make_prompt
from engines import blocks, engine, poisoned_pages, prompt_logprobs
from test_engine_oracle import clear_cases
from vllm import SamplingParams

PACE = {
    "preset": "official",
    "layers": [1, 3],
    "bank_size": 23,
    "segment_size": 32,
    "max_insertions": 5,
}
MAX_TOKENS = 60
TIGHT = {"max_model_len": 512, "num_gpu_blocks_override": blocks(1024)}


@pytest.fixture(scope="module")
def cases(checkpoint):
    return clear_cases(checkpoint(), PACE, [20, 33, 64, 90, 121, 150, 200, 260], MAX_TOKENS)


@pytest.fixture(scope="module")
def prompts(cases):
    return [prompt for prompt, _, _ in cases]


@pytest.fixture(scope="module")
def truth(cases):
    return [tokens for _, tokens, _ in cases]


@pytest.mark.parametrize("chunk", [32, 80, 512])
def test_any_chunk_size_gives_the_same_tokens(chunk, checkpoint, prompts, truth):
    with engine(checkpoint(), pace=PACE, max_num_batched_tokens=chunk) as running:
        assert running.tokens(prompts, MAX_TOKENS) == truth
        assert running.all_blocks_are_back()


@pytest.fixture(scope="module")
def shared(checkpoint):
    with engine(checkpoint(), pace=PACE) as running:
        yield running


@pytest.fixture
def running(shared):
    """An engine for each test, or as good as one."""
    return shared.as_new()


def test_alone_and_in_a_batch_give_the_same_tokens(running, prompts, truth):
    assert [running.tokens([prompt], MAX_TOKENS)[0] for prompt in prompts] == truth
    assert running.tokens(prompts[::-1], MAX_TOKENS) == truth[::-1]


def test_siblings_do_not_share_a_bank_after_they_part(running, prompts):
    sampled = running.generate(prompts[:1], MAX_TOKENS, n=2, temperature=1, seed=7, logprobs=0)
    first, second = sampled[0].outputs
    assert first.token_ids != second.token_ids
    # Each says what it would have said alone: its tokens, read back as a prompt, are as likely.
    for sibling in (first, second):
        said = list(sibling.token_ids)
        alone = running.generate([prompts[0] + said], 1, prompt_logprobs=0)[0]
        want = prompt_logprobs(alone)[-len(said) :]
        got = [entry[token].logprob for entry, token in zip(sibling.logprobs, said, strict=True)]
        assert max(abs(a - b) for a, b in zip(want, got, strict=True)) < 1e-3
    assert running.all_blocks_are_back()


def test_new_attention_blocks_hold_nothing_of_the_bank_that_had_them(running, monkeypatch):
    """L2: vLLM's own CPU runner zeroes no block beside banks; NaN is what a bank may look like."""
    runner = running.core.model_executor.driver_worker.worker.model_runner
    zeroed, zero = [], runner._zero_block_ids
    monkeypatch.setattr(runner, "_zero_block_ids", lambda ids: (zeroed.extend(ids), zero(ids)))
    for cache in runner.kv_caches:
        cache.view(torch.uint8).fill_(0xFF)
    running.tokens([make_prompt(1, 70)], 4)
    assert len(zeroed) == blocks(73)
    layers = running.core.vllm_config.compilation_config.static_forward_context
    attention = [layer for name, layer in layers.items() if name.endswith(".attn")]
    assert len(attention) == 4
    assert all(torch.isfinite(layer.kv_cache[zeroed]).all() for layer in attention)


@pytest.fixture(scope="module")
def crowded(checkpoint):
    """An engine whose pool is too small for all prompts at once."""
    with engine(checkpoint(), pace=PACE, **TIGHT) as running:
        yield running


def test_preempted_requests_give_the_same_tokens(crowded, prompts, truth):
    assert crowded.tokens(prompts, MAX_TOKENS) == truth
    assert crowded.metric("vllm:num_preemptions") > 0
    assert crowded.all_blocks_are_back()


def test_freed_pages_are_never_read(crowded, prompts, truth):
    with poisoned_pages(crowded.as_new()) as poisoned:
        for _ in range(2):
            assert crowded.tokens(prompts, MAX_TOKENS) == truth
        assert len(set(poisoned)) > 0.75 * blocks(1024)


def test_an_aborted_prefill_leaves_nothing_behind(checkpoint, prompts, truth):
    with engine(checkpoint(), pace=PACE, max_num_batched_tokens=32) as running:
        add, step = running.llm.llm_engine.add_request, running.llm.llm_engine.step
        add("gone", {"prompt_token_ids": prompts[-1]}, SamplingParams(max_tokens=4))
        step()
        step()
        assert not running.all_blocks_are_back()
        running.llm.llm_engine.abort_request(["gone"], internal=False)
        step()
        assert running.all_blocks_are_back()
        assert running.tokens(prompts[:3], MAX_TOKENS) == truth[:3]


def test_pages_are_claimed_as_tokens_need_them(checkpoint):
    settings = {"max_num_batched_tokens": 16, "enable_prefix_caching": False}
    with engine(checkpoint(), pace=PACE, **settings) as running:
        layout = running.memories()[1].spec.layout
        engine_ = running.llm.llm_engine
        engine_.add_request(
            "grows",
            {"prompt_token_ids": make_prompt(1, 80)},
            SamplingParams(max_tokens=2, detokenize=False),
        )
        held = []
        for _ in range(5):
            engine_.step()
            used = running.free_at_start - running.pool.get_num_free_blocks()
            held.append(used - blocks(16 * (len(held) + 1)))
        assert held == [layout.pages_for(tokens) for tokens in (16, 32, 48, 64, 80)]
        assert held[0] < held[2] == layout.num_pages


def test_blocks_that_a_window_lets_go_of_are_never_read(checkpoint):
    """By then a bank may lie in them, and NaN passes through what masks them."""
    [case] = clear_cases(checkpoint("gemma2"), PACE, [220], MAX_TOKENS)
    settings = {"max_num_batched_tokens": 48, "enable_prefix_caching": False}
    with (
        engine(checkpoint("gemma2"), PACE, **settings) as running,
        poisoned_pages(running) as poisoned,
    ):
        freed = []
        step = running.core.step_fn

        def counted():
            freed.append(len(poisoned))
            return step()

        running.core.step_fn = counted
        assert running.tokens([case[0]], MAX_TOKENS) == [case[1]]
        # While the request ran, not only where it ended.
        assert freed[-1] - freed[0] >= 4
