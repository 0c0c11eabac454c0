"""Memory of FFN outputs: mixtures of experts and others, held to the oracle."""

import functools

import pytest
from checkpoints import MIXTURES, WITHOUT_ACTIVATIONS
from engines import NATIVE, blocks, engine
from oracle import STRONGER
from test_engine_oracle import (
    MAX_TOKENS_OF_OTHERS,
    SHAPES,
    assert_engine_agrees,
    clear_cases,
)

SHAPE = SHAPES["odd bank, replacements"]
# The preset whose site is "auto": what has no activations to remember gives its outputs.
PACE = {"layers": [1, 3], **SHAPE, **STRONGER["gentle"]}
OUTPUT = {"preset": "official", "site": "output", "layers": [1, 3], **SHAPE}
LENGTHS = [20, 64, 150]
MAX_TOKENS = 40


# Those with latent attention (MLA).
LATENT = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite")
with_latent = pytest.mark.parametrize(
    "arch",
    [
        "mixtral",
        pytest.param(
            "deepseek_v3",
            marks=pytest.mark.skipif(NATIVE, reason="MLA is refused on vLLM's own CPU build"),
        ),
    ],
)


@pytest.mark.parametrize("arch", [*MIXTURES, *WITHOUT_ACTIVATIONS])
def test_families_without_activations_equal_the_oracle(arch, checkpoint):
    if NATIVE and arch in LATENT:
        pytest.skip(
            "MLA is refused on vLLM's own CPU build, which is wrong without it (docs/cpu.md)"
        )
    cases = clear_cases(checkpoint(arch), {**PACE, "site": "output"}, LENGTHS, MAX_TOKENS_OF_OTHERS)
    with engine(checkpoint(arch), PACE, max_num_batched_tokens=80) as running:
        assert_engine_agrees(running, cases, MAX_TOKENS_OF_OTHERS)
        for memory in running.memories().values():
            assert (memory.config.site, memory.width) == (
                "output",
                running.core.vllm_config.model_config.get_hidden_size(),
            )
            assert min(memory.counts.commits, memory.counts.mid + memory.counts.high) > 0
        assert len(running.memories()) == 2
        assert running.all_blocks_are_back()


@pytest.mark.parametrize("preset", ["official", "paper"])
def test_outputs_of_dense_ffns_equal_the_oracle(preset, checkpoint):
    pace = {**OUTPUT, "preset": preset}
    cases = clear_cases(checkpoint("llama"), pace, LENGTHS)
    with engine(checkpoint("llama"), pace, max_num_batched_tokens=80) as running:
        assert_engine_agrees(running, cases)


@pytest.fixture(scope="module")
def cases_of(checkpoint):
    """``cases_of(arch)``: prompts with the truth, found on first use."""
    lengths = [20, 33, 90, 121, 150, 260]
    return functools.cache(lambda arch: clear_cases(checkpoint(arch), OUTPUT, lengths, MAX_TOKENS))


@with_latent
@pytest.mark.parametrize("chunk", [32, 256])
def test_any_chunk_and_a_warm_cache_give_the_same_answers(chunk, arch, checkpoint, cases_of):
    cases = cases_of(arch)
    prompts, truth = [case[0] for case in cases], [case[1] for case in cases]
    with engine(checkpoint(arch), OUTPUT, max_num_batched_tokens=chunk) as running:
        assert_engine_agrees(running, cases, MAX_TOKENS)
        assert running.tokens(prompts, MAX_TOKENS) == truth
        warm = running.generate(prompts, MAX_TOKENS)
        assert [list(output.outputs[0].token_ids) for output in warm] == truth
        assert sum(output.num_cached_tokens for output in warm) > 200
        assert running.all_blocks_are_back()


@with_latent
def test_preempted_requests_give_the_same_tokens(arch, checkpoint, cases_of):
    cases = cases_of(arch)
    prompts, truth = [case[0] for case in cases], [case[1] for case in cases]
    with engine(
        checkpoint(arch), OUTPUT, max_model_len=320, num_gpu_blocks_override=blocks(544)
    ) as running:
        assert running.tokens(prompts, MAX_TOKENS) == truth
        assert running.metric("vllm:num_preemptions") > 0
        assert running.all_blocks_are_back()


@with_latent
def test_two_ranks_equal_the_oracle(arch, checkpoint, cases_of):
    settings = {"tensor_parallel_size": 2, "max_num_batched_tokens": 80}
    with engine(checkpoint(arch), OUTPUT, **settings) as running:
        assert_engine_agrees(running, cases_of(arch), MAX_TOKENS)
        assert running.all_blocks_are_back()


def test_parts_of_an_output_on_each_rank_are_refused(checkpoint, capfd):
    """Cohere adds up attention and FFN before it reduces the sum."""
    with (
        pytest.raises(Exception, match="WorkerProc initialization failed"),
        engine(checkpoint("cohere"), OUTPUT, tensor_parallel_size=2),
    ):
        pass
    assert "mlp returns on each tensor parallel rank a part of its output only" in "".join(
        capfd.readouterr()
    )


@pytest.mark.parametrize(
    ("arch", "pace", "sentence"),
    [
        ("mixtral", {"preset": "official"}, "set site to output, or choose other layers"),
        ("opt", {"site": "output"}, "layer 1 has 2 parts beside its attention"),
    ],
)
def test_sites_that_a_model_does_not_have_are_refused(arch, pace, sentence, checkpoint):
    with (
        pytest.raises(ValueError, match="pacellm") as refusal,
        engine(checkpoint(arch), {**PACE, **pace}),
    ):
        pass
    assert sentence in str(refusal.value)


def test_a_model_that_passes_its_memory_by_is_stopped(checkpoint, monkeypatch):
    """As vLLM's Transformers backend would, whose routed blocks have a forward of their own."""
    monkeypatch.setattr("pacellm_vllm.models.pacify.remember_output", lambda block, memory: None)
    with (
        pytest.raises(RuntimeError, match=r"does not call model\.layers\.1\.block_sparse_moe"),
        engine(checkpoint("mixtral"), OUTPUT) as running,
    ):
        running.tokens([[1, 2, 3]], 2)
