"""How large a bank's pages are in a given engine, and how many a request needs."""

from typing import cast

import torch
from vllm import envs
from vllm.config import VllmConfig
from vllm.distributed.utils import get_pp_indices
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import AttentionSpec

from pacellm_vllm.config import PaceConfig
from pacellm_vllm.memory.backend import BankBackend
from pacellm_vllm.memory.layout import BankLayout
from pacellm_vllm.memory.spec import PagedBankSpec

_PAGE_ALIGNMENT = 256


def plan_spec(vllm_config: VllmConfig, config: PaceConfig, width: int) -> PagedBankSpec:
    """The spec of every bank of this engine, on a rank that holds ``width`` of the FFN.

    Raises ``ValueError`` when banks cannot live in this engine's KV cache pool.
    """
    check_layouts(vllm_config)
    attention = _attention_spec(vllm_config)
    size = config.segment_size
    if vllm_config.cache_config.enable_prefix_caching and size % attention.block_size:
        raise ValueError(
            f"pacellm: segment_size = {size} is not allowed; with prefix caching it must be a "
            f"multiple of the KV block size {attention.block_size} (or pass "
            "--no-enable-prefix-caching)."
        )
    model = vllm_config.model_config
    return bank_spec(
        config,
        attention,
        width,
        cast(torch.dtype, model.dtype),
        model.get_total_num_hidden_layers(),
        vllm_config.parallel_config.pipeline_parallel_size,
        model.max_model_len,
    )


def bank_spec(
    config: PaceConfig,
    attention: AttentionSpec,
    width: int,
    dtype: torch.dtype,
    num_layers: int,
    stages: int,
    max_model_len: int,
) -> PagedBankSpec:
    """The spec for a model of ``num_layers`` in ``stages`` pipeline stages.

    A block of the pool holds the attention pages of all of a stage's layers, or the bank pages of
    all its memory layers: bank pages are cut to fill the block that attention already needs. All
    stages must agree on a bank's pages, so the fullest stage decides.
    """
    layers = config.resolve_layers(num_layers)
    per_bank = []
    for stage in range(stages):
        start, end = get_pp_indices(num_layers, stage, stages)
        if banks := sum(start <= layer < end for layer in layers):
            per_bank.append((end - start) * attention.page_size_bytes // banks)
    page_bytes = min(per_bank) // _PAGE_ALIGNMENT * _PAGE_ALIGNMENT
    layout = BankLayout.plan(config.rules(), width, config.stored_dtype(dtype), page_bytes)
    return PagedBankSpec(
        block_size=attention.block_size,
        num_kv_heads=1,
        head_size=page_bytes // 2,
        head_size_v=page_bytes - page_bytes // 2,
        dtype=torch.uint8,
        layout=layout,
        num_layers=len(layers),
        summary=f"layers {', '.join(map(str, layers))} of {num_layers}, preset {config.preset}",
        max_model_len=max_model_len,
    )


def _attention_layers(vllm_config: VllmConfig) -> list[Attention]:
    layers = vllm_config.compilation_config.static_forward_context.values()
    return [layer for layer in layers if isinstance(layer, Attention)]


def check_layouts(vllm_config: VllmConfig) -> None:
    """Refuse attention backends, or a requested layout, that cannot share blocks with banks."""
    ours = {layout.name for layout in BankBackend.supported_kv_cache_layouts()}
    requested = envs.VLLM_KV_CACHE_LAYOUT
    if requested is not None and requested not in ours:
        raise ValueError(
            f"pacellm: VLLM_KV_CACHE_LAYOUT={requested} keeps layers apart, but memory packs its "
            f"pages beside the attention pages of a block; unset it or use one of {sorted(ours)}."
        )
    for backend in {layer.get_attn_backend() for layer in _attention_layers(vllm_config)}:
        theirs = backend.supported_kv_cache_layouts()
        if theirs is not None and ours.isdisjoint(layout.name for layout in theirs):
            raise ValueError(
                f"pacellm: attention backend {backend.get_name()} knows only the KV cache layouts "
                f"{[layout.name for layout in theirs]}, but memory needs one of {sorted(ours)} to "
                "pack its pages beside attention's; choose another with --attention-backend."
            )


def _attention_spec(vllm_config: VllmConfig) -> AttentionSpec:
    """The one spec all attention layers of this rank share.

    Raises ``ValueError`` when they differ, where a block would not hold one page of each.
    """
    specs = {layer.get_kv_cache_spec(vllm_config) for layer in _attention_layers(vllm_config)}
    if len(specs) != 1:
        raise ValueError(
            f"pacellm: memory needs attention layers with one kind of KV cache, this model has "
            f"{len(specs)}; serve it without pacellm."
        )
    return cast(AttentionSpec, specs.pop())
