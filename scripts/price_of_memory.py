"""What memory costs in KV blocks, from vLLM's own planning functions. No GPU, no weights.

    python scripts/price_of_memory.py [--gib 110]

Plans the KV cache of Qwen2.5-7B shapes (28 layers, 4 KV heads, intermediate size 18944, bf16,
layers 12 and 26, default settings) with and without memory at several parallel sizes, and of larger
models with memory in two layers on one rank.
"""

import argparse
import os
from dataclasses import dataclass, replace
from types import SimpleNamespace

os.environ.setdefault("PACELLM_CPU_PLATFORM", "1")

import torch
from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv

try:
    from vllm.v1.core import kv_cache_planning
except ImportError:  # vLLM 0.32
    from vllm.v1.core import kv_cache_utils as kv_cache_planning
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from pacellm_vllm.config import PaceConfig
from pacellm_vllm.memory.plan import bank_spec, page_bytes_beside

LAYERS, KV_HEADS, HEAD, WIDTH, BLOCK = 28, 4, 128, 18944, 16
LENGTHS = (30, 100, 1000, 2000, 8000, 32768)
CONFIG = PaceConfig.from_sources({"layers": [12, 26]})


@dataclass(frozen=True)
class Shapes:
    """A model's layers on one rank, and what memory of the default site keeps of each token."""

    name: str
    remembered: str
    width: int
    attention: AttentionSpec
    count: int
    others: tuple[KVCacheSpec, ...] = ()


def _specs(kind: type, heads: int, size: int, block: int = BLOCK, **more: int) -> AttentionSpec:
    return kind(block_size=block, num_kv_heads=heads, head_size=size, dtype=torch.bfloat16, **more)


def _beside_states(heads: int, size: int, state: MambaSpec) -> tuple[AttentionSpec, MambaSpec]:
    """Attention of such heads and the state, of one page size, as vLLM's platform makes them."""
    token = _specs(FullAttentionSpec, heads, size, 1).page_size_bytes
    block = BLOCK * cdiv(state.page_size_bytes, BLOCK * token)
    return _specs(FullAttentionSpec, heads, size, block), replace(
        state, page_size_padded=block * token
    )


_DELTA_NET = MambaSpec(
    block_size=32768, shapes=((3, 8192), (32, 128, 128)), dtypes=(torch.bfloat16, torch.bfloat16)
)
_QWEN3_NEXT, _STATE = _beside_states(2, 256, _DELTA_NET)
MODELS = (
    Shapes("Qwen3-30B-A3B", "outputs", 2048, _specs(FullAttentionSpec, 4, 128), 48),
    Shapes("DeepSeek-V3", "outputs", 7168, _specs(MLAAttentionSpec, 1, 576, 64), 61),
    Shapes("Qwen3-Next-80B-A3B", "outputs", 2048, _QWEN3_NEXT, 12, (_STATE,) * 36),
    Shapes(
        "Gemma 3 27B",
        "activations",
        21504,
        _specs(FullAttentionSpec, 16, 128),
        10,
        (_specs(SlidingWindowSpec, 16, 128, sliding_window=1024),) * 52,
    ),
)


def plan_model(model: Shapes, budget: int) -> None:
    """Print what memory in two layers costs."""
    page_bytes = page_bytes_beside([model.attention] * model.count, 2)
    block_size = model.attention.block_size
    bank = bank_spec(CONFIG, (0, 1), block_size, page_bytes, model.width, torch.bfloat16, "", 32768)
    plain = {f"layers.{i}.attn": model.attention for i in range(model.count)}
    plain |= {f"layers.{i}.other": spec for i, spec in enumerate(model.others, model.count)}
    banks = {f"layers.{i}.memory": bank for i in range(2)}
    [without] = kv_cache_configs([plain], budget, KVCacheLayout.LBNHC)
    [cache] = kv_cache_configs([plain | banks], budget, KVCacheLayout.BLNHC)
    full = bank.layout.num_pages
    print(
        f"{model.name}, memory of {model.remembered} in two layers: blocks of {block_size} tokens "
        f"and {budget / cache.num_blocks / 2**20:.2f} MiB; {len(without.kv_cache_groups)} groups, "
        f"{len(cache.kv_cache_groups)} with memory; a full bank is {full} blocks, "
        f"{full * budget / cache.num_blocks / 1e6:.1f} MB, as {full * block_size} tokens of "
        f"attention ({bank.layout.committed_bytes * 2 / 1e6:.1f} MB are committed)"
    )
    for tokens in (2000, 8000, 32768):
        at_once = (requests_at_once(each, tokens) for each in (cache, without))
        print(f"{tokens:>10} tokens: {{:.0f}} requests at once, {{:.0f}} plain".format(*at_once))
    print()


def requests_at_once(cache: KVCacheConfig, tokens: int) -> float:
    """How many requests of so many tokens the pool holds."""
    config = VllmConfig()
    config.model_config = SimpleNamespace(max_model_len=tokens)
    specs = [group.kv_cache_spec for group in cache.kv_cache_groups]
    firsts = [
        spec.first_spec if isinstance(spec, UniformTypeKVCacheSpecs) else spec for spec in specs
    ]
    blocks = [cdiv(one.max_memory_usage_bytes(config), one.page_size_bytes) for one in firsts]
    return cache.num_blocks / sum(blocks)


def plan(
    tensor_parallel: int, pipeline_parallel: int, memory: bool, budget: int
) -> SimpleNamespace:
    """vLLM's KV cache configuration for every stage, and the bank's layout."""
    attention = FullAttentionSpec(
        block_size=BLOCK,
        num_kv_heads=max(KV_HEADS // tensor_parallel, 1),
        head_size=HEAD,
        dtype=torch.bfloat16,
    )
    layers = CONFIG.resolve_layers(LAYERS)
    page_bytes = page_bytes_beside(
        [attention] * (LAYERS // pipeline_parallel), len(layers) // pipeline_parallel
    )
    bank = bank_spec(
        CONFIG, layers, BLOCK, page_bytes, WIDTH // tensor_parallel, torch.bfloat16, "", 32768
    )
    stages = []
    for stage in range(pipeline_parallel):
        first, last = (LAYERS * s // pipeline_parallel for s in (stage, stage + 1))
        specs = {f"model.layers.{i}.self_attn.attn": attention for i in range(first, last)}
        if memory:
            specs |= {f"model.layers.{i}.mlp.memory": bank for i in layers if first <= i < last}
        stages.append(specs)
    layout = KVCacheLayout.BLNHC if memory else KVCacheLayout.LBNHC
    caches = kv_cache_configs(stages, budget, layout)
    return SimpleNamespace(blocks=caches[0].num_blocks, layout=bank.layout)


def kv_cache_configs(
    stages: list[dict[str, KVCacheSpec]], budget: int, layout: KVCacheLayout
) -> list[KVCacheConfig]:
    """vLLM's plan for ``stages`` of layers by name, each with ``budget`` bytes."""
    config = VllmConfig()
    config.model_config = SimpleNamespace(
        max_model_len=32768, original_max_model_len=32768, supports_kv_cache_grouping=False
    )
    config.cache_config.kv_cache_layout = layout.name
    groups = getattr(kv_cache_planning, "get_global_kv_cache_groups", None)  # since vLLM 0.33
    given = [] if groups is None else [groups(config, stages)]
    return kv_cache_planning.get_kv_cache_configs(config, stages, [budget] * len(stages), *given)


def main(gib: float) -> None:
    budget = int(gib * (1 << 30))
    print(f"Qwen2.5-7B shapes, bf16, layers 12 and 26, {gib:g} GiB of KV cache per rank\n")
    for tensor_parallel, pipeline_parallel in ((1, 1), (2, 1), (4, 1), (1, 2)):
        with_memory = plan(tensor_parallel, pipeline_parallel, True, budget)
        without = plan(tensor_parallel, pipeline_parallel, False, budget)
        layout = with_memory.layout
        block = budget // with_memory.blocks
        banks = 2 // pipeline_parallel
        committed = banks * layout.committed_bytes
        full = layout.num_pages * block
        print(
            f"TP {tensor_parallel}, PP {pipeline_parallel}: block {block / 1024:.0f} KiB,", end=" "
        )
        print(f"{with_memory.blocks} blocks with memory, {without.blocks} without;", end=" ")
        print(f"full bank {layout.num_pages} blocks = {full / 1e6:.2f} MB a rank,", end=" ")
        print(f"{full / committed:.2f} x its committed bytes")
        print(f"{'tokens':>10}{'KV blocks':>12}{'bank blocks':>13}{'at once':>9}{'without':>9}")
        for tokens in LENGTHS:
            kv, bank = cdiv(tokens, BLOCK), layout.pages_for(tokens)
            at_once = with_memory.blocks // (kv + bank)
            print(f"{tokens:>10}{kv:>12}{bank:>13}{at_once:>9}{without.blocks // kv:>9}")
        print()
    for model in MODELS:
        plan_model(model, budget)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=110, help="KV cache per rank, in GiB")
    main(parser.parse_args().gib)
