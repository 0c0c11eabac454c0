"""Requests' own settings: each as if alone, whatever its neighbours ask for."""

import re
import sys

import pytest
from checkpoints import make_prompt
from engines import BLOCK_SIZE, blocks, engine
from oracle import OracleModel
from patches import ours_in_vllm
from test_engine_oracle import GAP
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine import EngineCoreRequest

from pacellm_vllm.compat import PATCHED
from pacellm_vllm.memory.batch import NoSettings

# Patched where vLLM's tracing is on, and nowhere else.
TRACING = {"hold_spans", "write_spans"}

PACE = {
    "preset": "official",
    "layers": [1, 3],
    "bank_size": 23,
    "segment_size": 32,
    "max_insertions": 5,
}
MAX_TOKENS = 50
# What a request says, and what that means to the oracle.
ASKS = {
    "nothing": (None, {}),
    "alpha": ({"pacellm_alpha": 0.9}, {"alpha": 0.9}),
    "noise": ({"pacellm": {"noise": 0.0, "alpha": 0.6}}, {"noise": 0.0, "alpha": 0.6}),
    "thresholds": (
        {"pacellm_theta_high": 0.9, "pacellm_theta_low": "0.1"},
        {"theta_high": 0.9, "theta_low": 0.1},
    ),
    "off": ({"pacellm": '{"enabled": false}'}, {"layers": ()}),
    "off, over HTTP": ({"pacellm_enabled": 0, "pacellm_alpha": 0.9}, {"layers": ()}),
}
SCHEDULES = {
    "one by one": {"max_num_seqs": 1, "enable_prefix_caching": False},
    "chunks, cache": {"max_num_batched_tokens": 48, "enable_prefix_caching": True},
    "preempted": {
        "max_num_batched_tokens": 80,
        "num_gpu_blocks_override": blocks(960),
        "max_model_len": 512,
    },
}


def ask(running, cases, **sampling):
    """Greedy outputs for (prompt, extra_args) pairs."""
    settings = {"temperature": 0, "max_tokens": MAX_TOKENS, "ignore_eos": True, **sampling}
    return running.llm.generate(
        [{"prompt_token_ids": prompt} for prompt, _ in cases],
        [SamplingParams(detokenize=False, extra_args=extra, **settings) for _, extra in cases],
        use_tqdm=False,
    )


def said(outputs):
    return [list(output.outputs[0].token_ids) for output in outputs]


def clear_prompt(oracle, length):
    """A prompt without a near tie under any of the settings, and what each makes of it."""
    for seed in range(60):
        prompt, truths, gaps = make_prompt(31 * length + seed, length), {}, [1.0]
        for name, (_, overrides) in ASKS.items():
            truths[name], _ = oracle.generate(prompt, MAX_TOKENS, **overrides)
            gaps += [bank.closest_call for bank in oracle.banks.values()]
        if min(gaps) > GAP:
            return prompt, truths
    raise AssertionError(f"no prompt of {length} tokens without a near tie")


@pytest.fixture(scope="module")
def cases(checkpoint):
    """(prompt, what it asks for, the truth): every prompt with every setting."""
    oracle = OracleModel(checkpoint(), PACE)
    prompts = [clear_prompt(oracle, length) for length in (40, 97, 200)]
    return [(prompt, ASKS[name][0], truths[name]) for prompt, truths in prompts for name in ASKS]


def test_the_settings_matter(cases):
    for i in range(0, len(cases), len(ASKS)):
        truths = [tuple(truth) for _, _, truth in cases[i : i + len(ASKS)]]
        assert len(set(truths)) >= 4


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_request_is_answered_by_its_own_settings(name, cases, checkpoint):
    """I15, too: one prompt under other settings is in the cache, and is not what is found."""
    asked = [(prompt, extra) for prompt, extra, _ in cases]
    truth = [tokens for _, _, tokens in cases]
    with engine(checkpoint(), pace=PACE, **SCHEDULES[name]) as running:
        assert said(ask(running, asked)) == truth
        if name != "one by one":
            assert said(ask(running, asked[::-1])) == truth[::-1]
        if name == "preempted":
            assert running.metric("vllm:num_preemptions") > 0
        if running.core.vllm_config.cache_config.enable_prefix_caching:
            assert running.metric("vllm:prefix_cache_hits") > 0
        assert running.all_blocks_are_back()


@pytest.fixture(scope="module")
def shared(checkpoint):
    with engine(checkpoint(), pace=PACE, enable_prefix_caching=True) as running:
        yield running


@pytest.fixture
def running(shared):
    """An engine for each test, or as good as one."""
    return shared.as_new()


@pytest.fixture(scope="module")
def uncached(checkpoint):
    with engine(checkpoint(), pace=PACE, enable_prefix_caching=False) as running:
        yield running


def used_blocks(running):
    return running.free_at_start - running.pool.get_num_free_blocks()


@pytest.mark.parametrize(
    ("length", "max_tokens", "extra", "pays"),
    [
        (100, 10, None, True),
        (100, 10, {"pacellm_enabled": False}, False),
        # Its 32 computed tokens fill the first segment and no token reads what was kept.
        (20, 13, None, False),
        (20, 14, None, True),
    ],
)
def test_who_cannot_use_memory_pays_nothing(length, max_tokens, extra, pays, uncached):
    core = uncached.llm.llm_engine
    params = SamplingParams(max_tokens=max_tokens, detokenize=False, extra_args=extra)
    core.add_request("it", {"prompt_token_ids": make_prompt(3, length)}, params)
    core.step()
    used = used_blocks(uncached)
    core.abort_request(["it"], internal=False)
    core.step()
    pages = uncached.memories()[1].spec.layout.pages_for(length)
    assert used == blocks(length) + (pages if pays else 0)


def test_who_cannot_use_memory_hits_the_cache_as_without_it(running):
    prompt = make_prompt(3, 120)
    off = {"pacellm_enabled": False}
    for cases, length in (([(prompt, off)], 119), ([(prompt[:31], None)], 30)):
        first, second = (ask(running, cases, max_tokens=2)[0] for _ in range(2))
        cached = length // BLOCK_SIZE * BLOCK_SIZE
        assert (first.num_cached_tokens, second.num_cached_tokens) == (0, cached)
    # Neither leaves behind what a request with memory could take for a bank's.
    assert ask(running, [(prompt, None)])[0].num_cached_tokens == 0


def test_the_cache_is_shared_by_what_comes_to_the_same(running):
    prompt = make_prompt(3, 120)
    asks = [
        [None, {"pacellm_alpha": 0.2}, {"pacellm": '{"noise": 1e-1}'}, {"pacellm_enabled": True}],
        [{"pacellm_alpha": 0.5}, {"pacellm": {"alpha": "5e-1"}, "pacellm_noise": 0.1}],
        [{"pacellm_enabled": False}, {"pacellm_alpha": 0}],
    ]
    for same in asks:
        first, *rest = [ask(running, [(prompt, extra)], max_tokens=2)[0] for extra in same]
        assert first.num_cached_tokens == 0
        for output in rest:
            assert output.num_cached_tokens >= 96
            assert said([output]) == said([first])


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ({"pacellm_alpha": 3}, "alpha = 3 is not allowed in a request; it must be a number from"),
        ({"pacellm": {"alhpa": 0.1}}, "a request cannot set 'alhpa'; it can set enabled, alpha"),
        ({"pacellm_bank_size": 5}, "a request cannot set 'pacellm_bank_size'"),
        ({"pacellm_theta_low": 0.1}, "must set both"),
        (
            {"pacellm_theta_low": 0.5, "pacellm_theta_high": 0.4},
            "theta_low = 0.5 is not allowed in a request; it must be at most theta_high = 0.4",
        ),
        ({"pacellm": "{alpha}"}, "'pacellm' = '{alpha}' is not allowed; it must be an object"),
        ({"pacellm": {"noise": 0.1}, "pacellm_noise": 0.1}, "sets 'noise' twice"),
        ({"pacellm_enabled": "perhaps"}, "enabled = 'perhaps' is not allowed"),
        ({"pacellm_noise": float("nan")}, "noise = nan is not allowed"),
    ],
)
def test_bad_settings_fail_the_request_alone(extra, sentence, running):
    prompt = make_prompt(1, 40)
    with pytest.raises(VLLMValidationError, match=r"^pacellm: ") as refusal:
        ask(running, [(prompt, extra)])
    assert sentence in str(refusal.value)
    # One of a list of prompts, so which.
    assert re.search(r"[^.] \(request '\d+'\)\.$", str(refusal.value))
    assert len(ask(running, [(prompt, None)])[0].outputs[0].token_ids) == MAX_TOKENS


def test_the_engine_refuses_what_no_front_end_has_checked(running):
    """As one in another language, or on another machine, would send it."""
    sent = EngineCoreRequest(
        request_id="unchecked",
        prompt_token_ids=[1, 2, 3],
        mm_features=None,
        sampling_params=SamplingParams(extra_args={"pacellm_alpha": 7}),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    with pytest.raises(VLLMValidationError, match=r"alpha = 7 .* \(request 'unchecked'\)\.$"):
        running.core.preprocess_add_request(sent)
    sent.sampling_params.extra_args = {"pacellm_alpha": 0.7}
    request, _ = running.core.preprocess_add_request(sent)
    assert request.request_id == "unchecked"


def test_an_engine_with_experts_alone_refuses_settings():
    for extra in ({"other": 1}, {"pacellm_enabled": False}, {"pacellm": {}}):
        NoSettings.validate_params(SamplingParams(extra_args=extra))
    for extra in ({"pacellm_alpha": 0.5}, {"pacellm_enabled": True}):
        with pytest.raises(ValueError, match="carries no memory that a request could set"):
            NoSettings.validate_params(SamplingParams(extra_args=extra))
    with pytest.raises(ValueError, match="write pacellm_alpha"):
        NoSettings.validate_params(SamplingParams(extra_args={"pacellm-alpha": 0.5}))


def test_a_plain_engine_in_the_same_process_ignores_them(checkpoint, running):
    prompt = make_prompt(3, 100)
    cases = [(prompt, extra) for extra in (None, {"pacellm_alpha": 0.9}, {"pacellm_alpha": 3})]
    ask(running, cases[:2])
    with engine(checkpoint()) as plain:
        outputs = [ask(plain, [case])[0] for case in cases]
    assert len({tuple(tokens) for tokens in said(outputs)}) == 1
    assert [output.num_cached_tokens for output in outputs] == [0, 96, 96]


@pytest.mark.usefixtures("shared")
def test_what_an_engine_with_memory_patches_is_what_the_table_says():
    # Those of sessions are looked at in tests/sessions.
    left_out = {"follow_answers", "answers_made"}
    if "pacellm_vllm.serving.tracing" not in sys.modules:
        left_out |= TRACING
    names = {name for patch in PATCHED.keys() - left_out for name in PATCHED[patch]}
    assert ours_in_vllm() == {name for name in names if name.partition(":")[0] in sys.modules}
