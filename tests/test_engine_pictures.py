"""Memory in the text decoder of a model that sees pictures."""

import pytest
import torch
from checkpoints import make_prompt
from engines import NATIVE, blocks, engine, prompt_logprobs
from pictures import SeeingOracle, make_picture, make_seeing_checkpoint
from test_engine_oracle import GAP, GOOD_GAP, TRIES
from vllm import SamplingParams

PACE = {"layers": [1, 3], "bank_size": 23, "segment_size": 32, "max_insertions": 5}
PICTURES = [make_picture(seed) for seed in range(2)]
LENGTHS = (20, 90, 150)
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    return make_seeing_checkpoint(tmp_path_factory.mktemp("idefics3"))


@pytest.fixture(scope="module")
def cases(seeing):
    """Prompts with a picture in the middle, each with both pictures: (prompt, picture, truth)."""
    oracle = SeeingOracle(seeing, PACE)
    place = oracle.model.config.image_token_id
    found = []
    for length in LENGTHS:
        for picture in PICTURES:
            best = (GAP, None)
            for seed in range(TRIES):
                prompt = make_prompt(1000 * length + seed, length)
                prompt.insert(length // 2, place)
                case = (prompt, picture, *oracle.answer(prompt, picture, MAX_TOKENS))
                gap = min(bank.closest_call for bank in oracle.banks.values())
                best = max(best, (gap, case), key=lambda found: found[0])
                if gap > GOOD_GAP:
                    break
            assert best[1] is not None
            found.append(best[1])
    return found


def ask(running, cases, **sampling):
    params = SamplingParams(
        temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, detokenize=False, **sampling
    )
    prompts = [
        {"prompt_token_ids": prompt, "multi_modal_data": {"image": picture}}
        for prompt, picture, _, _ in cases
    ]
    return running.llm.generate(prompts, params, use_tqdm=False)


def seeing_engine(path, **settings):
    # vLLM's default hashes pictures by a package that a CPU needs for nothing else.
    hashes = {"mm_hasher_algorithm": "sha256"}
    return engine(path, PACE, skip_tokenizer_init=False, **hashes, **settings)


def tokens_of(outputs):
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("tokens", [48, 256])
def test_prompts_with_pictures_equal_the_oracle_cold_and_warm(tokens, seeing, cases):
    truth = [answer for _, _, answer, _ in cases]
    with seeing_engine(seeing, max_num_batched_tokens=tokens) as running:
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


@pytest.mark.skipif(NATIVE, reason="with blocks of 32 tokens none of these is preempted")
def test_preempted_requests_give_the_same_tokens(seeing, cases):
    tight = {"max_model_len": 256, "num_gpu_blocks_override": blocks(512)}
    settings = {"max_num_batched_tokens": 64, **tight}
    with seeing_engine(seeing, **settings) as running:
        assert tokens_of(ask(running, cases)) == [answer for _, _, answer, _ in cases]
        assert running.metric("vllm:num_preemptions") > 0
        assert running.all_blocks_are_back()


def test_pictures_matter(cases):
    assert not torch.equal(torch.tensor(cases[0][2]), torch.tensor(cases[1][2]))
