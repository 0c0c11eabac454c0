"""Speculative decoding: drafts change when tokens are computed, and nothing else (I14)."""

import random

import pytest
from engines import blocks, engine, poisoned_pages
from oracle import OracleModel
from test_engine_oracle import clear_cases
from test_engine_requests import ASKS, PACE, ask, clear_prompt, said
from vllm.exceptions import VLLMValidationError

MAX_TOKENS = 60
DRAFTS = 5
# A step of six tokens crosses no segment end, one, or up to three of them.
SHAPES = {
    "long segments": {"bank_size": 23, "segment_size": 32, "max_insertions": 5},
    "short segments": {"bank_size": 7, "segment_size": 2, "max_insertions": 2},
    "paper": {"preset": "paper", "bank_size": 23, "segment_size": 32, "max_insertions": 5},
}
SCHEDULES = {
    "chunks, cache": {"max_num_batched_tokens": 80, "enable_prefix_caching": True},
    "preempted, cache": {
        "max_num_batched_tokens": 80,
        "enable_prefix_caching": True,
        "num_gpu_blocks_override": blocks(512),
        "max_model_len": 256,
    },
    "one by one": {"max_num_seqs": 1, "enable_prefix_caching": False},
}


def ngram(tokens=DRAFTS):
    return {
        "method": "ngram",
        "num_speculative_tokens": tokens,
        "prompt_lookup_min": 1,
        "prompt_lookup_max": 3,
    }


def draft_from(running, texts):
    """Draft some of the tokens that ``texts`` go on with and then some that they do not."""
    drafter = running.core.model_executor.driver_worker.worker.model_runner.drafter

    def propose(most, sampled, num_tokens, token_ids, **unused):
        drafts = []
        for row, new in enumerate(sampled):
            text = token_ids[row, : num_tokens[row]].tolist()
            rest = next((known[len(text) :] for known in texts if known[: len(text)] == text), [])
            rng = random.Random(len(text))
            right = rest[: rng.randint(0, most)] if new else []
            wrong = [(token + 1) % 256 for token in rest[len(right) : rng.randint(0, most)]]
            drafts.append(right + wrong if new else [])
        return drafts

    drafter.propose = propose


def accepted_and_rejected(running):
    drafted = running.metric("vllm:spec_decode_num_draft_tokens")
    accepted = running.metric("vllm:spec_decode_num_accepted_tokens")
    return accepted, drafted - accepted


@pytest.mark.parametrize(
    ("shape", "schedule"),
    [
        ("long segments", "chunks, cache"),
        ("long segments", "preempted, cache"),
        ("short segments", "one by one"),
        ("paper", "preempted, cache"),
    ],
)
def test_drafts_right_and_wrong_leave_the_oracles_tokens(shape, schedule, checkpoint):
    pace, settings = {"preset": "official", "layers": [1, 3], **SHAPES[shape]}, SCHEDULES[schedule]
    caching = settings["enable_prefix_caching"]
    cases = clear_cases(checkpoint(), pace, [20, 63, 90, 121, 150], MAX_TOKENS)
    prompts, truth = [case[0] for case in cases], [case[1] for case in cases]
    with (
        engine(checkpoint(), pace, speculative_config=ngram(), **settings) as running,
        poisoned_pages(running),
    ):
        draft_from(running, [prompt + tokens for prompt, tokens, _ in cases])
        for _ in range(3 if caching else 1):
            assert running.tokens(prompts, MAX_TOKENS) == truth
        accepted, rejected = accepted_and_rejected(running)
        assert min(accepted, rejected) > 50
        if caching and schedule == "chunks, cache":
            assert running.metric("vllm:prefix_cache_hits") > 0
        if schedule.startswith("preempted"):
            assert running.metric("vllm:num_preemptions") > 0
        assert running.all_blocks_are_back()


def test_a_prompt_that_ends_where_banks_are_copied_leaves_no_copy_unwritten(checkpoint):
    """A bank is copied by the step that reads the next token, here the first one with drafts."""
    pace = {"preset": "official", "layers": [1, 3], **SHAPES["long segments"]}
    settings = SCHEDULES["chunks, cache"]
    with (
        engine(checkpoint(), pace, speculative_config=ngram(), **settings) as running,
        poisoned_pages(running),
    ):
        interval = running.memories()[1].spec.grid.interval
        for length in (interval, 2 * interval):
            [(longer, truth, _)] = clear_cases(checkpoint(), pace, [length + 10], MAX_TOKENS)
            first = longer[:length]
            known, _ = OracleModel(checkpoint(), pace).generate(first, DRAFTS + 1)
            draft_from(running, [first + known, longer + truth])
            # Not as far as the next segment's end, whose bank would be found instead.
            assert running.tokens([first], DRAFTS + 1) == [known]
            hits = running.metric("vllm:prefix_cache_hits")
            assert running.tokens([longer], MAX_TOKENS) == [truth]
            assert running.metric("vllm:prefix_cache_hits") - hits == length
        assert accepted_and_rejected(running)[0] > 0
        assert running.all_blocks_are_back()


def test_what_vllm_pads_a_single_token_with_stays_out_of_the_bank(checkpoint):
    """One token left of a prompt takes as many rows as a step with drafts, and none of them stays.

    It is the last one behind a prefix that was found, or a prompt that comes while others decode.
    """
    pace = {"preset": "official", "layers": [1, 3], **SHAPES["long segments"]}
    settings, budget = SCHEDULES["chunks, cache"], 80
    lengths = [65, 97, budget, 1]
    *found, first, single = clear_cases(checkpoint(), pace, lengths, MAX_TOKENS)
    with (
        engine(checkpoint(), pace, speculative_config=ngram(), **settings) as running,
        poisoned_pages(running),
    ):
        draft_from(running, [])
        for prompt, truth, _ in found:
            # Not as far as the next segment's end, whose bank would be left instead.
            few = DRAFTS + 1
            assert running.tokens([prompt], few) == [truth[:few]]
            hits = running.metric("vllm:prefix_cache_hits")
            assert running.tokens([prompt], MAX_TOKENS) == [truth]
            assert running.metric("vllm:prefix_cache_hits") - hits == len(prompt) - 1
        # The first one takes all of the first step.
        assert running.tokens([first[0], single[0]], MAX_TOKENS) == [first[1], single[1]]


def test_drafts_follow_each_requests_own_settings(checkpoint):
    oracle = OracleModel(checkpoint(), PACE)
    prompt, truths = clear_prompt(oracle, 90)
    asks = [(prompt, extra) for extra, _ in ASKS.values()]
    with engine(checkpoint(), pace=PACE, speculative_config=ngram()) as running:
        draft_from(running, [prompt + tokens for tokens in truths.values()])
        assert said(ask(running, asks)) == [truths[name] for name in ASKS]
        assert min(accepted_and_rejected(running)) > 50
        with pytest.raises(VLLMValidationError, match="pacellm"):
            ask(running, [(prompt, {"pacellm_alpha": 7})])


def test_n_grams_under_tensor_parallelism(checkpoint):
    cases = clear_cases(checkpoint("llama"), PACE, [20, 63, 150], MAX_TOKENS)
    prompts, truth = [case[0] for case in cases], [case[1] for case in cases]
    settings = {"tensor_parallel_size": 2, "speculative_config": ngram()}
    with engine(checkpoint("llama"), pace=PACE, **settings) as running:
        assert running.tokens(prompts, MAX_TOKENS) == truth
        assert min(accepted_and_rejected(running)) > 0
