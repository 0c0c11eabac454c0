"""Prefix caching: a restored bank gives the tokens of a cold run, whoever left it there."""

import pytest
from checkpoints import make_prompt
from engines import BLOCK_SIZE, blocks, engine, poisoned_pages, tokens_of
from oracle import OracleModel
from test_engine_oracle import GAP, clear_cases
from vllm import SamplingParams
from vllm.config import KVEventsConfig

PACE = {
    "preset": "official",
    "layers": [1, 3],
    "bank_size": 23,
    "segment_size": 32,
    "max_insertions": 5,
}
MAX_TOKENS = 40
SETTINGS = {"pace": PACE, "max_num_batched_tokens": 128, "enable_prefix_caching": True}


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


@pytest.fixture(scope="module")
def shared(checkpoint):
    with engine(checkpoint(), **SETTINGS) as running:
        yield running


@pytest.fixture
def running(shared):
    """An engine for each test, or as good as one."""
    return shared.as_new()


def test_a_warm_run_equals_a_cold_one_and_hits(checkpoint, running):
    cases = clear_cases(checkpoint(), PACE, [33, 90, 150, 260, 390], MAX_TOKENS)
    prompts, truth = [case[0] for case in cases], [case[1] for case in cases]
    with poisoned_pages(running):
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


def test_a_conversation_goes_on_from_what_it_said(checkpoint, running):
    oracle = OracleModel(checkpoint(), PACE)
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


def test_partially_shared_prefixes_hit_up_to_where_they_part(family, running):
    prompts, truth = [case[0] for case in family], [case[1] for case in family]
    with poisoned_pages(running):
        alone = [running.generate([prompt], MAX_TOKENS)[0] for prompt in prompts]
        assert tokens_of(alone) == truth
        # Copies are there for every 96 tokens of a prompt.
        assert cached(alone) == [0, 288, 192, 96, 0]
        together = running.generate(prompts, MAX_TOKENS)
        assert tokens_of(together) == truth
        assert running.all_blocks_are_back()


def test_a_salt_keeps_requests_apart(running):
    prompt = make_prompt(3, 260)

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


def test_live_requests_share_a_prefix(checkpoint, family):
    prompts, truth = [case[0] for case in family], [case[1] for case in family]
    with engine(checkpoint(), **SETTINGS, max_num_seqs=2) as running:
        assert tokens_of(running.generate(prompts * 3, MAX_TOKENS)) == truth * 3
        assert running.metric("vllm:prefix_cache_hits") > 0
        assert running.all_blocks_are_back()


def test_preempted_requests_give_the_same_tokens_with_caching(checkpoint):
    cases = clear_cases(checkpoint(), PACE, [70, 90, 121, 150, 180, 200], 100)
    prompts, truth = [case[0] for case in cases], [case[1] for case in cases]
    settings = {**SETTINGS, "max_model_len": 512, "num_gpu_blocks_override": blocks(1152)}
    with engine(checkpoint(), **settings) as running, poisoned_pages(running):
        for _ in range(3):
            assert running.tokens(prompts, 100) == truth
        assert running.metric("vllm:num_preemptions") > 0
        assert running.all_blocks_are_back()


def test_evicted_snapshots_are_recomputed(checkpoint):
    cases = clear_cases(checkpoint(), PACE, [150, 260], MAX_TOKENS)
    prompts, truth = [case[0] for case in cases], [case[1] for case in cases]
    others = [make_prompt(900 + seed, 250) for seed in range(8)]
    settings = {**SETTINGS, "max_model_len": 512, "num_gpu_blocks_override": blocks(960)}
    with engine(checkpoint(), **settings) as running, poisoned_pages(running):
        assert running.tokens(prompts, MAX_TOKENS) == truth
        running.tokens(others, 4)
        again = running.generate(prompts, MAX_TOKENS)
        assert tokens_of(again) == truth
        assert cached(again) == [0, 0]


def test_segments_must_end_where_blocks_do(checkpoint):
    with (
        pytest.raises(ValueError, match="pacellm: segment_size = 24") as refusal,
        engine(checkpoint(), pace={**PACE, "segment_size": 24}),
    ):
        pass
    assert f"multiple of the KV block size {BLOCK_SIZE}" in str(refusal.value)


@pytest.mark.parametrize(
    ("bank_size", "segment_size", "preset"),
    [
        (100, 64, "official"),
        (33, 32, "official"),
        (50, BLOCK_SIZE, "paper"),
        (40, BLOCK_SIZE, "official"),
    ],
)
def test_a_bank_larger_than_a_segment_is_restored_whole(
    bank_size, segment_size, preset, checkpoint
):
    """L1: what a snapshot holds is what its header counts, whoever had the pages before."""
    pace = {
        "layers": [1, 3],
        "preset": preset,
        "bank_size": bank_size,
        "segment_size": segment_size,
    }
    cases = clear_cases(checkpoint(), pace, [200, 330, 401], 12)
    prompts, truth = [case[0] for case in cases], [case[1] for case in cases]
    other = make_prompt(77, 390)
    settings = {
        **SETTINGS,
        "pace": pace,
        "num_gpu_blocks_override": blocks(4800),
        "max_model_len": 512,
    }
    with engine(checkpoint(), **settings) as running, poisoned_pages(running):
        for prompt, want in zip(prompts, truth, strict=True):
            [cold] = running.generate([prompt], 12, logprobs=0)
            running.generate([other], 2)
            [warm] = running.generate([prompt], 12, logprobs=0)
            assert tokens_of([cold, warm]) == [want, want]
            assert warm.num_cached_tokens > 0
            for a, b in zip(cold.outputs[0].logprobs, warm.outputs[0].logprobs, strict=True):
                for token in a:
                    assert a[token].logprob == pytest.approx(b[token].logprob, abs=1e-4)
        assert running.all_blocks_are_back()


@pytest.mark.parametrize("chunk", [512, 2048])
def test_a_system_prompt_read_in_one_forward_is_shared(chunk, checkpoint):
    pace = {**PACE, "bank_size": 20, "segment_size": 64}
    system = make_prompt(4, 900)
    settings = {**SETTINGS, "pace": pace, "max_num_batched_tokens": chunk, "max_model_len": 2048}
    with engine(checkpoint(), **settings) as running:
        hits = [
            running.generate([system + make_prompt(60 + i, 300)], 1)[0].num_cached_tokens
            for i in range(3)
        ]
    assert hits == [0, 896, 896]


def test_the_same_prompt_twice_is_scheduled_in_a_pool_that_just_holds_it(checkpoint):
    """H1: with all blocks free, nothing waits for ever."""
    pace = {**PACE, "bank_size": 20, "segment_size": 64}
    prompt = make_prompt(8, 1000)
    settings = {**SETTINGS, "pace": pace, "max_num_batched_tokens": 512}
    with engine(checkpoint(), **settings) as running:
        pages = running.memories()[1].spec.layout.num_pages
    settings["num_gpu_blocks_override"] = 1 + blocks(1024) + pages
    with engine(checkpoint(), **settings) as running:
        core = running.llm.llm_engine
        said = []
        for name in "abc":
            params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False)
            core.add_request(name, {"prompt_token_ids": prompt}, params)
            for _ in range(60):
                said += [list(out.outputs[0].token_ids) for out in core.step() if out.finished]
                if not core.has_unfinished_requests():
                    break
            assert not core.has_unfinished_requests(), "it waits for ever"
        assert said[0] == said[1] == said[2]
        assert running.metric("vllm:prefix_cache_hits") > 0
        assert running.all_blocks_are_back()


def test_events_name_attention_blocks_only(checkpoint):
    """H2, with reports of reused blocks, which reach past no request's hashes."""
    settings = {
        **SETTINGS,
        "kv_events_config": KVEventsConfig(enable_kv_cache_events=True, publisher="null"),
    }
    with engine(checkpoint(), **settings) as running:
        prompt, report = make_prompt(9, 170), {"kv_cache_report_mode": "full"}
        first = running.tokens([prompt])
        assert running.tokens([prompt], extra_args=report) == first
        assert running.metric("vllm:prefix_cache_hits") > 0
