"""Two tensor parallel ranks, and two pipeline stages, say what one process says."""

import pytest
from checkpoints import make_prompt
from engines import blocks, engine
from test_engine_oracle import assert_engine_agrees, clear_cases
from test_engine_requests import ask, said

from pacellm_vllm.serving.report import REPORT_METHOD, merge_reports


def test_two_ranks_equal_the_oracle(checkpoint):
    pace = {
        "preset": "official",
        "layers": [1, 3],
        "bank_size": 23,
        "segment_size": 32,
        "max_insertions": 5,
    }
    cases = clear_cases(checkpoint("llama"), pace, [20, 64, 150, 260])
    settings = {"tensor_parallel_size": 2, "max_num_batched_tokens": 80}
    with engine(checkpoint("llama"), pace, **settings) as running:
        assert_engine_agrees(running, cases)
        assert running.all_blocks_are_back()


@pytest.mark.parametrize("layers", [[0, 1, 3], [2]], ids=["unequal stages", "one stage without"])
def test_two_stages_equal_the_oracle(layers, checkpoint):
    pace = {
        "preset": "official",
        "layers": layers,
        "bank_size": 23,
        "segment_size": 32,
        "max_insertions": 5,
    }
    cases = clear_cases(checkpoint(), pace, [20, 64, 150, 260])
    settings = {
        "pipeline_parallel_size": 2,
        "max_num_batched_tokens": 80,
        "enable_prefix_caching": False,
    }
    with engine(checkpoint(), pace=pace, **settings) as running:
        # Both stages work at once, on different requests.
        assert running.core.batch_queue_size == 2
        assert_engine_agrees(running, cases)
        report = merge_reports(running.llm.collective_rpc(REPORT_METHOD))
        assert list(report) == [str(layer) for layer in layers]
        kinds = [sum(counts[kind] for kind in ("high", "mid", "low")) for counts in report.values()]
        assert len(set(kinds)) == 1
        assert kinds[0] >= sum(len(prompt) for prompt, _, _ in cases)
        assert running.all_blocks_are_back()


def test_stages_with_windows_in_some_layers_are_refused(checkpoint):
    with (
        # The sentence is in the log of the worker that refuses it.
        pytest.raises(Exception, match=r"of one kind|WorkerProc initialization failed"),
        engine(checkpoint("gemma2"), {"layers": [1]}, pipeline_parallel_size=2),
    ):
        pass


def test_two_stages_preempt_and_hit_like_one(checkpoint):
    pace = {
        "preset": "official",
        "layers": [1, 3],
        "bank_size": 23,
        "segment_size": 32,
        "max_insertions": 5,
    }
    lengths = [33, 90, 121, 150, 200, 260]
    cases = clear_cases(checkpoint(), pace, lengths, max_tokens=60)
    prompts, truth = [case[0] for case in cases], [case[1] for case in cases]
    settings = {"pipeline_parallel_size": 2, "max_model_len": 512, "max_num_batched_tokens": 64}
    with engine(checkpoint(), pace, num_gpu_blocks_override=blocks(1024), **settings) as running:
        assert running.tokens(prompts, 60) == truth
        assert running.metric("vllm:num_preemptions") > 0
        assert running.all_blocks_are_back()
    with engine(checkpoint(), pace, **settings) as running:
        assert running.tokens(prompts, 60) == truth
        warm = running.generate(prompts, 60)
        assert [list(output.outputs[0].token_ids) for output in warm] == truth
        assert sum(output.num_cached_tokens for output in warm) > 300
        assert running.all_blocks_are_back()


def test_two_ranks_follow_requests_own_settings(checkpoint):
    pace = {
        "preset": "official",
        "layers": [1, 3],
        "bank_size": 23,
        "segment_size": 32,
        "max_insertions": 5,
    }
    prompts = [make_prompt(seed, 150) for seed in range(3)]
    asks = [None, {"pacellm_alpha": 0.9}, {"pacellm_enabled": False}]
    cases = [(prompt, extra) for prompt in prompts for extra in asks]
    answers = []
    for ranks in ({}, {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}):
        with engine(checkpoint("llama"), pace, **ranks) as running:
            answers.append(said(ask(running, cases)))
    assert answers[0] == answers[1] == answers[2]
