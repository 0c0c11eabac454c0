"""Memory in the text decoder of a model that sees pictures."""

import functools

import pytest
from checkpoints import make_prompt
from engines import NATIVE, blocks, engine, prompt_logprobs, tokens_of
from oracle import OracleModel
from pictures import FAMILIES, SeeingOracle, make_picture, make_seeing_checkpoint
from test_engine_oracle import GAP, clearest
from vllm import SamplingParams

PACE = {"layers": [1, 3], "bank_size": 23, "segment_size": 32, "max_insertions": 5, "alpha": 0.1}
PICTURES = [make_picture(seed) for seed in range(2)]
LENGTHS = (20, 90, 150)
MAX_TOKENS = 24
# Where pictures are read causally, which is all that vLLM's attention on a CPU can do.
CAUSAL = [arch for arch in FAMILIES if arch != "gemma3"]


def pace_of(arch):
    return {**PACE, "site": "output"} if arch == "llama4" else PACE


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """``seeing(arch)``: a checkpoint's directory, made on first use."""
    return functools.cache(lambda arch: make_seeing_checkpoint(tmp_path_factory.mktemp(arch), arch))


@pytest.fixture(scope="module")
def cases_of(seeing):
    """``cases_of(arch)``: prompts with a picture in the middle, each with both pictures, as
    (prompt, picture, tokens, log-probabilities).
    """

    @functools.cache
    def find(arch):
        oracle = SeeingOracle(seeing(arch), pace_of(arch))

        def case(picture, seed, length):
            prompt = make_prompt(seed, length)
            prompt[length // 2 : length // 2] = oracle.place()
            return (prompt, picture, *oracle.answer(prompt, picture, MAX_TOKENS))

        return [
            clearest(oracle, length, functools.partial(case, picture))
            for length in LENGTHS
            for picture in PICTURES
        ]

    return find


def ask(running, cases, **sampling):
    params = SamplingParams(
        temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, detokenize=False, **sampling
    )
    prompts = [
        {"prompt_token_ids": prompt, "multi_modal_data": {"image": picture}}
        for prompt, picture, _, _ in cases
    ]
    return running.llm.generate(prompts, params, use_tqdm=False)


def seeing_engine(path, arch, **settings):
    # vLLM's default hashes pictures by a package that a CPU needs for nothing else.
    hashes = {"mm_hasher_algorithm": "sha256"}
    return engine(path, pace_of(arch), skip_tokenizer_init=False, **hashes, **settings)


@pytest.mark.parametrize(("arch", "tokens"), [("idefics3", 48), *((arch, 256) for arch in CAUSAL)])
def test_prompts_with_pictures_equal_the_oracle_cold_and_warm(arch, tokens, seeing, cases_of):
    if NATIVE and arch == "qwen3_5":
        pytest.skip("vLLM's own CPU build has its gated delta nets in bfloat16 only")
    cases = cases_of(arch)
    truth = [answer for _, _, answer, _ in cases]
    with seeing_engine(seeing(arch), arch, max_num_batched_tokens=tokens) as running:
        outputs = ask(running, cases, prompt_logprobs=0)
        for output, (_, _, _, logprobs) in zip(outputs, cases, strict=True):
            worst = max(abs(a - b) for a, b in zip(prompt_logprobs(output), logprobs, strict=True))
            assert worst <= 1e-3
        assert tokens_of(outputs) == truth
        for memory in running.memories().values():
            assert min(memory.counts.commits, memory.counts.mid + memory.counts.high) > 0
        assert len(running.memories()) == 2
        # Prompts are the same but for their pictures.
        assert tokens_of(ask(running, cases)) == truth
        warm = ask(running, cases)
        assert tokens_of(warm) == truth
        assert sum(output.num_cached_tokens for output in warm) > 0
        assert running.all_blocks_are_back()
    # The pictures matter: two prompts that differ in nothing else are worth telling apart.
    (*_, one), (*_, other) = cases[-2:]
    assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > 0.05


@pytest.mark.skipif(NATIVE, reason="with blocks of 32 tokens none of these is preempted")
@pytest.mark.parametrize("arch", ["idefics3", "qwen3_vl"])
def test_preempted_requests_give_the_same_tokens(arch, seeing, cases_of):
    cases = cases_of(arch)
    tight = {"max_model_len": 256, "num_gpu_blocks_override": blocks(512)}
    with seeing_engine(seeing(arch), arch, max_num_batched_tokens=64, **tight) as running:
        assert tokens_of(ask(running, cases)) == [answer for _, _, answer, _ in cases]
        assert running.metric("vllm:num_preemptions") > 0
        assert running.all_blocks_are_back()


def test_pictures_that_a_cpu_would_read_causally_are_refused(seeing):
    """Gemma 3 lets a picture's tokens see all of it, which no attention of vLLM on a CPU does."""
    with (
        pytest.raises(Exception, match="--limit-mm-per-prompt"),
        seeing_engine(seeing("gemma3"), "gemma3"),
    ):
        pass


def test_its_texts_are_served(seeing):
    """The same model, without pictures."""
    oracle = OracleModel(seeing("gemma3"), PACE)
    prompt = make_prompt(0, 150)
    tokens, logprobs = oracle.generate(prompt, MAX_TOKENS)
    assert min(bank.closest_call for bank in oracle.banks.values()) > GAP
    with seeing_engine(
        seeing("gemma3"), "gemma3", limit_mm_per_prompt={"image": 0}, max_num_batched_tokens=64
    ) as running:
        [output] = running.generate([prompt], MAX_TOKENS, prompt_logprobs=0)
        got = prompt_logprobs(output)
        assert max(abs(a - b) for a, b in zip(got, logprobs, strict=True)) <= 1e-3
        assert list(output.outputs[0].token_ids) == tokens
