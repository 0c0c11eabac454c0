"""vLLM's own CPU build, whose attention kernels are compiled: what only it has.

The other engine tests run there too (``scripts/test.sh``); elsewhere these are skipped.
"""

import pytest
import torch
from checkpoints import make_prompt
from engines import NATIVE, engine, poisoned_pages
from test_engine_oracle import assert_engine_agrees, clear_cases
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

pytestmark = pytest.mark.skipif(not NATIVE, reason="for vLLM's own CPU build")

PACE = {
    "preset": "official",
    "layers": [1, 3],
    "bank_size": 23,
    "segment_size": 32,
    "max_insertions": 5,
}


# vLLM's own attention on a CPU, with memory or without, keeps fp8 with these only.
keeps_fp8 = torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()
fp8 = pytest.mark.skipif(not keeps_fp8, reason="an fp8 KV cache on a CPU needs AVX-512 or AMX")


def attention_backends(running):
    layers = running.core.vllm_config.compilation_config.static_forward_context
    return {layer.get_attn_backend() for name, layer in layers.items() if name.endswith("attn")}


def test_a_compiled_model_gives_the_oracles_tokens(checkpoint):
    cases = clear_cases(checkpoint(), PACE, [20, 64, 150])
    settings = {"enforce_eager": False, "max_num_batched_tokens": 80}
    with engine(checkpoint(), PACE, **settings) as running:
        assert running.core.vllm_config.compilation_config.backend == "inductor"
        assert_engine_agrees(running, cases)
        assert running.all_blocks_are_back()


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"kv_cache_dtype": "fp8"}, marks=fp8),
        pytest.param({"dtype": "bfloat16", "kv_cache_dtype": "fp8"}, marks=fp8),
        {"dtype": "float16"},
    ],
    ids=["fp8 cache", "fp8 cache, bf16", "fp16"],
)
def test_no_schedule_changes_a_small_dtypes_tokens(settings, checkpoint):
    """No oracle has their rounding; that a schedule changes nothing is seen without one."""
    prompts = [make_prompt(seed, 100 + 37 * seed) for seed in range(5)]
    said = []
    for chunk, seqs in ((2048, 1), (80, 8)):
        with (
            engine(
                checkpoint(), PACE, max_num_batched_tokens=chunk, max_num_seqs=seqs, **settings
            ) as running,
            poisoned_pages(running),
        ):
            said += [running.tokens(prompts, 12) for _ in range(2)]
            assert running.metric("vllm:prefix_cache_hits") > 0
            assert running.all_blocks_are_back()
    assert said[1:] == said[:-1]


def test_without_memory_nothing_of_vllms_is_replaced(checkpoint):
    with engine(checkpoint()) as running:
        assert attention_backends(running) == {CPUAttentionBackend}
        worker = running.core.vllm_config.parallel_config.worker_cls
        assert worker == "vllm.v1.worker.cpu_worker.CPUWorker"
    with engine(checkpoint(), PACE) as running:
        [packed] = attention_backends(running)
        assert packed is not CPUAttentionBackend
        assert packed.get_impl_cls() is CPUAttentionBackend.get_impl_cls()
    with engine(checkpoint()) as running:
        assert attention_backends(running) == {CPUAttentionBackend}
