"""Prefix caching: a restored bank gives the tokens of a cold run, whoever left it there."""

import pytest
from checkpoints import make_prompt
from engines import engine, poisoned_pages
from oracle import OracleModel
from test_engine_oracle import GAP, clear_cases

PACE = {
    "preset": "official",
    "layers": [1, 3],
    "bank_size": 23,
    "segment_size": 32,
    "max_insertions": 5,
}
MAX_TOKENS = 40
SETTINGS = {"pace": PACE, "max_num_batched_tokens": 128, "enable_prefix_caching": True}


def tokens_of(outputs):
    return [list(output.outputs[0].token_ids) for output in outputs]


def cached(outputs):
    return [output.num_cached_tokens for output in outputs]


@pytest.fixture(scope="module")
def family(checkpoint):
    """Prompts that part at different places from one prefix, with the truth for each."""
    oracle = OracleModel(checkpoint(), PACE)
    shared = make_prompt(11, 300)
    cases = []
    for part, tail in ((300, 40), (300, 7), (200, 90), (130, 60), (31, 80)):
        for seed in range(40):
            prompt = shared[:part] + make_prompt(1000 * part + 10 * tail + seed, tail)
            tokens, _ = oracle.generate(prompt, MAX_TOKENS)
            if min(bank.closest_call for bank in oracle.banks.values()) > GAP:
                cases.append((prompt, tokens))
                break
        else:
            raise AssertionError(f"no prompt of {part} + {tail} tokens without a near tie")
    return cases


def test_a_warm_run_equals_a_cold_one_and_hits(checkpoint):
    cases = clear_cases(checkpoint(), PACE, [33, 90, 150, 260, 390], MAX_TOKENS)
    prompts, truth = [case[0] for case in cases], [case[1] for case in cases]
    with engine(checkpoint(), **SETTINGS) as running, poisoned_pages(running):
        cold = running.generate(prompts, MAX_TOKENS)
        assert tokens_of(cold) == truth
        for _ in range(2):
            warm = running.generate(prompts, MAX_TOKENS)
            assert tokens_of(warm) == truth
            for prompt, hit in zip(prompts, cached(warm), strict=True):
                assert hit % 32 == 0
                assert hit >= 32 * (len(prompt) // 128 * 4 - 4)
            assert sum(cached(warm)) > 600
        assert running.all_blocks_are_back()


def test_a_conversation_goes_on_from_what_it_said(checkpoint):
    oracle = OracleModel(checkpoint(), PACE)
    with engine(checkpoint(), **SETTINGS) as running:
        history = make_prompt(5, 120)
        for turn in range(4):
            want, _ = oracle.generate(history, MAX_TOKENS)
            [output] = running.generate([history], MAX_TOKENS)
            clear = min(bank.closest_call for bank in oracle.banks.values()) > GAP
            assert not clear or tokens_of([output]) == [want]
            # All of the previous turn, what it generated included, up to a segment's end.
            computed = 0 if turn == 0 else len(history) - 20 - 1
            assert output.num_cached_tokens == computed // 32 * 32
            history = history + tokens_of([output])[0] + make_prompt(50 + turn, 20)


def test_partially_shared_prefixes_hit_up_to_where_they_part(checkpoint, family):
    prompts, truth = [case[0] for case in family], [case[1] for case in family]
    with engine(checkpoint(), **SETTINGS) as running, poisoned_pages(running):
        alone = [running.generate([prompt], MAX_TOKENS)[0] for prompt in prompts]
        assert tokens_of(alone) == truth
        # Forwards end every 128 tokens: copies are there for 128 and 256, donations further on.
        hits = cached(alone)
        assert hits[0] == 0
        assert hits[1:] == [256, 128, 128, 0]
        together = running.generate(prompts, MAX_TOKENS)
        assert tokens_of(together) == truth
        assert running.all_blocks_are_back()


def test_live_requests_share_a_prefix(checkpoint, family):
    prompts, truth = [case[0] for case in family], [case[1] for case in family]
    with engine(checkpoint(), **SETTINGS, max_num_seqs=2) as running:
        assert tokens_of(running.generate(prompts * 3, MAX_TOKENS)) == truth * 3
        assert running.metric("vllm:prefix_cache_hits") > 0
        assert running.all_blocks_are_back()


def test_preempted_requests_give_the_same_tokens_with_caching(checkpoint):
    cases = clear_cases(checkpoint(), PACE, [70, 90, 121, 150, 180, 200], 100)
    prompts, truth = [case[0] for case in cases], [case[1] for case in cases]
    settings = {**SETTINGS, "max_model_len": 512, "num_gpu_blocks_override": 72}
    with engine(checkpoint(), **settings) as running, poisoned_pages(running):
        for _ in range(3):
            assert running.tokens(prompts, 100) == truth
        assert running.metric("vllm:num_preemptions") > 0
        assert running.all_blocks_are_back()


def test_evicted_snapshots_are_recomputed(checkpoint):
    cases = clear_cases(checkpoint(), PACE, [150, 260], MAX_TOKENS)
    prompts, truth = [case[0] for case in cases], [case[1] for case in cases]
    others = [make_prompt(900 + seed, 250) for seed in range(8)]
    settings = {**SETTINGS, "max_model_len": 512, "num_gpu_blocks_override": 60}
    with engine(checkpoint(), **settings) as running, poisoned_pages(running):
        assert running.tokens(prompts, MAX_TOKENS) == truth
        running.tokens(others, 4)
        again = running.generate(prompts, MAX_TOKENS)
        assert tokens_of(again) == truth
        assert cached(again) == [0, 0]


def test_a_salt_keeps_requests_apart(checkpoint):
    prompt = make_prompt(3, 260)
    with engine(checkpoint(), **SETTINGS) as running:
        from vllm import SamplingParams

        def ask(salt):
            [output] = running.llm.generate(
                [{"prompt_token_ids": prompt, "cache_salt": salt}],
                SamplingParams(temperature=0, max_tokens=8, detokenize=False),
                use_tqdm=False,
            )
            return output.num_cached_tokens

        assert ask("a") == 0
        assert ask("b") == 0
        assert ask("a") == ask("b") == 256


def test_segments_must_end_where_blocks_do(checkpoint):
    with (
        pytest.raises(ValueError, match="pacellm: segment_size = 24") as refusal,
        engine(checkpoint(), pace={**PACE, "segment_size": 24}),
    ):
        pass
    assert "multiple of the KV block size 16" in str(refusal.value)
