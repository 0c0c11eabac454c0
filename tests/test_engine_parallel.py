"""Two tensor parallel ranks say what one says."""

from checkpoints import make_prompt
from engines import engine
from test_engine_oracle import assert_engine_agrees, clear_cases
from test_engine_requests import ask, said


def test_two_ranks_equal_the_oracle(checkpoint):
    pace = {"layers": [1, 3], "bank_size": 23, "segment_size": 32, "max_insertions": 5}
    cases = clear_cases(checkpoint("llama"), pace, [20, 64, 150, 260])
    settings = {"tensor_parallel_size": 2, "max_num_batched_tokens": 80}
    with engine(checkpoint("llama"), pace, **settings) as running:
        assert_engine_agrees(running, cases)
        assert running.all_blocks_are_back()


def test_two_ranks_follow_requests_own_settings(checkpoint):
    pace = {"layers": [1, 3], "bank_size": 23, "segment_size": 32, "max_insertions": 5}
    prompts = [make_prompt(seed, 150) for seed in range(3)]
    asks = [None, {"pacellm_alpha": 0.9}, {"pacellm_enabled": False}]
    cases = [(prompt, extra) for prompt in prompts for extra in asks]
    answers = []
    for ranks in (1, 2):
        with engine(checkpoint("llama"), pace, tensor_parallel_size=ranks) as running:
            answers.append(said(ask(running, cases)))
    assert answers[0] == answers[1]
