"""How banks' pages fit beside those of a quantised KV cache, as vLLM's own planner sees it."""

from types import SimpleNamespace

import pytest
import torch
from vllm.config import VllmConfig
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVQuantMode

from pacellm_vllm.config import PaceConfig
from pacellm_vllm.memory.plan import bank_spec, page_bytes_beside

CONFIG = PaceConfig.from_sources({"layers": [12, 26]})
LAYERS, BLOCK = 28, 16


def attention(dtype, mode=KVQuantMode.NONE):
    return FullAttentionSpec(
        block_size=BLOCK, num_kv_heads=4, head_size=128, dtype=dtype, kv_quant_mode=mode
    )


def planned(specs):
    config = VllmConfig()
    config.model_config = SimpleNamespace(max_model_len=32768, original_max_model_len=32768)
    config.cache_config.kv_cache_layout = "BLNHC"
    (cache,) = kv_cache_utils.get_kv_cache_configs(config, [specs], [8 << 30])
    return cache


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        (attention(torch.bfloat16), 1),
        (attention(torch.uint8, KVQuantMode.FP8_PER_TENSOR), 2),
    ],
    ids=["bf16", "fp8"],
)
def test_banks_fill_blocks_of_either_precision_and_are_zeroed_after(spec, parts):
    """vLLM stores fp8 as uint8, as banks are: their quantisation modes keep the two apart."""
    page = page_bytes_beside([spec] * LAYERS, 2)
    assert page == page_bytes_beside([attention(torch.bfloat16)] * LAYERS, 2) // parts
    bank = bank_spec(CONFIG, (12, 26), BLOCK, page, 18944, torch.bfloat16, "", 32768)
    # The bank holds the model's dtype whatever the KV cache's is.
    assert bank.layout.num_pages * page >= bank.layout.committed_bytes
    assert bank.layout.itemsize == 2
    plain = {f"model.layers.{i}.self_attn.attn": spec for i in range(LAYERS)}
    banks = {f"model.layers.{i}.mlp.memory": bank for i in (12, 26)}
    without, with_banks = planned(plain), planned(plain | banks)
    assert with_banks.num_blocks == without.num_blocks
    assert with_banks.needs_kv_cache_zeroing
    assert not without.needs_kv_cache_zeroing
