"""How banks' pages fit beside those of a quantised KV cache, as vLLM's own planner sees it."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from price_of_memory import MODELS, kv_cache_configs, requests_at_once
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVQuantMode,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from pacellm_vllm.config import PaceConfig
from pacellm_vllm.memory import plan
from pacellm_vllm.memory.plan import (
    _attention_specs,
    bank_spec,
    blocks_beside,
    check_windows,
    page_bytes,
    page_bytes_beside,
    plan_spec,
)

CONFIG = PaceConfig.from_sources({"layers": [12, 26]})
LAYERS, BLOCK = 28, 16


def attention(dtype, mode=KVQuantMode.NONE):
    return FullAttentionSpec(
        block_size=BLOCK, num_kv_heads=4, head_size=128, dtype=dtype, kv_quant_mode=mode
    )


def planned(specs):
    (cache,) = kv_cache_configs([specs], 8 << 30, KVCacheLayout.BLNHC)
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


@pytest.mark.parametrize("model", MODELS, ids=[model.name for model in MODELS])
def test_what_the_longest_request_holds_is_what_vllm_plans_for_it(model):
    config = VllmConfig()
    config.model_config = SimpleNamespace(max_model_len=32768)
    attention = [model.attention] * model.count
    windows = [spec for spec in model.others if isinstance(spec, SlidingWindowSpec)]
    states = [spec for spec in model.others if isinstance(spec, MambaSpec)]
    beside = blocks_beside(config, attention + windows, states)
    bank = bank_spec(
        *(CONFIG, (0, 1), model.attention.block_size, page_bytes_beside(attention, 2)),
        *(model.width, torch.bfloat16, "", 32768),
    )
    specs = {f"layers.{i}": spec for i, spec in enumerate([*attention, *model.others])}
    cache = planned({**specs, "layers.0.memory": bank, "layers.1.memory": bank})
    whole = -(-32768 // model.attention.block_size)
    blocks = whole + beside + bank.layout.pages_for(32768)
    assert requests_at_once(cache, 32768) == cache.num_blocks / blocks


def stage_of(layers):
    """The configuration of one of two stages of ``layers`` decoder layers each."""
    return SimpleNamespace(
        parallel_config=SimpleNamespace(pipeline_parallel_size=2),
        model_config=SimpleNamespace(
            get_num_layers=lambda parallel: layers,
            get_total_num_hidden_layers=lambda: 2 * layers,
        ),
    )


@pytest.mark.parametrize(
    ("memory", "share"),
    [([1, 3], 2), ([0, 1, 3], 1), ([2, 3], 1), ([2], 2)],
    ids=["one each", "two and one", "none and two", "none and one"],
)
def test_all_stages_come_to_the_page_that_fits_the_fullest(memory, share):
    spec = attention(torch.bfloat16)
    assert page_bytes(stage_of(2), [spec] * 2, memory) == share * spec.page_size_bytes


def test_stages_with_windows_in_some_layers_or_with_shared_caches_are_refused():
    spec = attention(torch.bfloat16)
    window = SlidingWindowSpec(
        block_size=BLOCK, num_kv_heads=4, head_size=128, dtype=torch.bfloat16, sliding_window=64
    )
    for specs, sentence in (([spec, window], "2 of 2 kinds in 2"), ([spec], "1 of 1 kinds in 2")):
        with pytest.raises(ValueError, match="attention of one kind in each layer") as refusal:
            page_bytes(stage_of(2), specs, [1])
        assert sentence in str(refusal.value)


@pytest.mark.parametrize("width", [62, 61])
def test_rows_of_half_words_are_refused_where_kernels_would_read_them(width):
    config = PaceConfig.from_sources({"layers": [1], "bank_size": 7, "segment_size": 64})
    model = SimpleNamespace(
        get_total_num_hidden_layers=lambda: 2, dtype=torch.bfloat16, max_model_len=1024
    )
    vllm_config = SimpleNamespace(
        compilation_config=SimpleNamespace(
            static_forward_context={"attn": Layer(attention(torch.bfloat16))}
        ),
        cache_config=SimpleNamespace(enable_prefix_caching=False),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=512),
        model_config=model,
        num_speculative_tokens=0,
    )
    for device in ("cpu", "cuda"):
        vllm_config.device_config = SimpleNamespace(device_type=device)
        refused = device == "cuda" and width == 61
        why = "must be words of 4 bytes, not 61 x 2 bytes; set bank_dtype to float32"
        with pytest.raises(ValueError, match=why) if refused else nullcontext():
            assert plan_spec(vllm_config, config, width).layout.width == width


class Layer(AttentionLayerBase):
    """Attention with a cache of such pages, or with that of another layer."""

    def __init__(self, spec, target=None, backend=AttentionBackend):
        self.spec, self.kv_sharing_target_layer_name = spec, target
        self.backend = backend

    def get_attn_backend(self):
        return self.backend

    def get_kv_cache_spec(self, vllm_config):
        return self.spec


def specs_of(**layers):
    config = SimpleNamespace(static_forward_context=layers)
    return _attention_specs(SimpleNamespace(compilation_config=config))


def test_layers_without_a_cache_of_their_own_need_no_pages_and_windows_may_have_others():
    spec, wider = attention(torch.bfloat16), attention(torch.float32)
    window = SlidingWindowSpec(
        block_size=BLOCK, num_kv_heads=2, head_size=128, dtype=torch.bfloat16, sliding_window=64
    )
    assert specs_of(a=Layer(spec), b=Layer(window), c=Layer(wider, "a")) == [spec, window]
    with pytest.raises(ValueError, match=r"has pages of \[32768, 65536\] bytes for \[16\] tokens"):
        specs_of(a=Layer(spec), b=Layer(wider))


WINDOW = SlidingWindowSpec(
    block_size=BLOCK, num_kv_heads=4, head_size=128, dtype=torch.bfloat16, sliding_window=512
)


@pytest.mark.parametrize(
    ("device", "hides", "backends", "served"),
    [
        ("cuda", False, ("FLASH_ATTN", "FLASH_ATTN"), False),
        ("cuda", False, ("FLASH_ATTN", "TRITON_ATTN"), True),
        ("cuda", True, ("FLASH_ATTN", "FLASH_ATTN"), True),
        ("cpu", False, ("CPU_ATTN", "CPU_ATTN"), True),
    ],
)
def test_windows_whose_kernels_may_read_a_bank_are_refused(
    device, hides, backends, served, monkeypatch
):
    full, windowed = backends
    layers = {
        "0": Layer(attention(torch.bfloat16), backend=SimpleNamespace(get_name=lambda: full)),
        "1": Layer(WINDOW, backend=SimpleNamespace(get_name=lambda: windowed)),
    }
    monkeypatch.setattr(plan, "layers_by_name", lambda _: layers)
    monkeypatch.setattr(plan, "hides_freed_windows", lambda _: hides)
    config = SimpleNamespace(device_config=SimpleNamespace(device_type=device))
    if served:
        check_windows(config)
        return
    with pytest.raises(ValueError, match="sliding windows on FLASH_ATTN here, which may"):
        check_windows(config)
