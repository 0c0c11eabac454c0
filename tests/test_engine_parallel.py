"""Two tensor parallel ranks say what one says."""

from engines import engine
from test_engine_oracle import assert_engine_agrees, clear_cases


def test_two_ranks_equal_the_oracle(checkpoint):
    pace = {"layers": [1, 3], "bank_size": 23, "segment_size": 32, "max_insertions": 5}
    cases = clear_cases(checkpoint("llama"), pace, [20, 64, 150, 260])
    settings = {"tensor_parallel_size": 2, "max_num_batched_tokens": 80}
    with engine(checkpoint("llama"), "llama", pace, **settings) as running:
        assert_engine_agrees(running, cases)
        assert running.all_blocks_are_back()
