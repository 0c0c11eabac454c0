"""How large a bank's pages are in a given engine, and how many a request needs."""

from collections import Counter
from collections.abc import Sequence
from typing import cast

import torch
from vllm import envs
from vllm.config import VllmConfig
from vllm.distributed.utils import get_pp_indices
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    SlidingWindowSpec,
)

from pacellm_vllm.compat import has_own_cache, hides_freed_windows, layers_by_name
from pacellm_vllm.config import PaceConfig
from pacellm_vllm.memory.backend import BankBackend, takes_kernels
from pacellm_vllm.memory.layout import BankLayout
from pacellm_vllm.memory.spec import PagedBankSpec

_PAGE_ALIGNMENT = 256

# Activations are what is remembered unless it is said; "auto" has become one of the two.
_SITES = {"activation": "", "auto": "", "output": ", of FFN outputs"}


def plan_spec(vllm_config: VllmConfig, config: PaceConfig, width: int) -> PagedBankSpec:
    """The spec of every bank of this engine, on a rank that holds ``width`` of the FFN.

    Raises ``ValueError`` when banks cannot live in this engine's KV cache pool.
    """
    check_layouts(vllm_config)
    check_windows(vllm_config)
    attention = _attention_specs(vllm_config)
    block_size = attention[0].block_size
    size = config.segment_size
    if vllm_config.cache_config.enable_prefix_caching and size % block_size:
        raise ValueError(
            f"pacellm: segment_size = {size} is not allowed; with prefix caching it must be a "
            f"multiple of the KV block size {block_size} (or pass --no-enable-prefix-caching)."
        )
    model = vllm_config.model_config
    layers = config.resolve_layers(model.get_total_num_hidden_layers())
    spec = bank_spec(
        config,
        layers,
        block_size,
        page_bytes(vllm_config, attention, layers),
        width,
        cast(torch.dtype, model.dtype),
        f"layers {', '.join(map(str, layers))} of {model.get_total_num_hidden_layers()}",
        model.max_model_len,
        vllm_config.num_speculative_tokens,
        vllm_config.scheduler_config.max_num_batched_tokens,
        bool(vllm_config.cache_config.enable_prefix_caching),
        blocks_beside(vllm_config, attention, _state_specs(vllm_config)),
    )
    if takes_kernels(vllm_config.device_config.device_type):
        check_kernels(spec.layout)
    return spec


def check_windows(vllm_config: VllmConfig) -> None:
    """Refuse attention that may read a bank in a block that its window has let go of.

    Raises ``ValueError``. vLLM's Triton kernels leave out what lies before a window.
    """
    if not takes_kernels(vllm_config.device_config.device_type):
        return
    backends = {
        layer.get_attn_backend().get_name()
        for layer in _attention_layers(vllm_config)
        if isinstance(layer.get_kv_cache_spec(vllm_config), SlidingWindowSpec)
    }
    if (others := backends - {"TRITON_ATTN"}) and not hides_freed_windows(vllm_config):
        raise ValueError(
            f"pacellm: memory does not work with sliding windows on {min(others)} here, which may "
            "read what is a bank by now in the tile where a window starts; pass "
            "--attention-backend TRITON_ATTN, or serve with vLLM 0.33 and its model runner V2."
        )


def check_kernels(layout: BankLayout) -> None:
    """Refuse rows that the GPU kernels cannot address; ``ValueError``."""
    if layout.unit_bytes % 4:
        raise ValueError(
            "pacellm: on a GPU a rank's share of what is remembered must be words of 4 bytes, "
            f"not {layout.width} x {layout.itemsize} bytes; set bank_dtype to float32, or choose "
            "another --tensor-parallel-size."
        )


def page_bytes(
    vllm_config: VllmConfig, attention: Sequence[AttentionSpec], layers: Sequence[int]
) -> int:
    """The page size that fits every pipeline stage: all ranks must come to the same.

    ``attention`` has the specs of this stage, ``layers`` the memory layers of the whole model.
    """
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    stages = parallel.pipeline_parallel_size
    if stages == 1:
        return page_bytes_beside(attention, len(layers))
    here = model.get_num_layers(parallel)
    kinds = {type(spec) for spec in attention}
    if len(attention) != here or len(kinds) > 1:
        raise ValueError(
            f"pacellm: pipeline parallelism with memory needs attention of one kind in each layer, "
            f"this stage has {len(attention)} of {len(kinds)} kinds in {here} "
            "layers; use --tensor-parallel-size."
        )
    pages = []
    for stage in range(stages):
        start, end = get_pp_indices(model.get_total_num_hidden_layers(), stage, stages)
        banks = sum(start <= layer < end for layer in layers)
        pages.append(page_bytes_beside([attention[0]] * (end - start), max(banks, 1)))
    return min(pages)


def page_bytes_beside(attention: Sequence[AttentionSpec], banks: int) -> int:
    """The largest page with which ``banks`` of them fit the block that attention already needs.

    ``attention`` has one spec for each attention layer of a stage. Where some layers keep only a
    window, the others decide: vLLM cuts the window layers into groups that fit beside them.
    """
    block_bytes = sum(spec.page_size_bytes for spec in _whole(attention))
    return block_bytes // banks // _PAGE_ALIGNMENT * _PAGE_ALIGNMENT


def _whole(attention: Sequence[AttentionSpec]) -> Sequence[AttentionSpec]:
    """Those whose pages make a block."""
    return [spec for spec in attention if isinstance(spec, FullAttentionSpec)] or attention


def blocks_beside(
    vllm_config: VllmConfig, attention: Sequence[AttentionSpec], states: Sequence[KVCacheSpec]
) -> int:
    """How many blocks the longest request holds of layers that keep a window, or a state.

    vLLM cuts the layers of one kind into groups that fit a block.
    """
    whole = _whole(attention)
    block_bytes = sum(spec.page_size_bytes for spec in whole)
    kinds = Counter(spec for spec in [*attention, *states] if spec not in whole)
    return sum(
        cdiv(layers, max(block_bytes // spec.page_size_bytes, 1))
        * cdiv(spec.max_memory_usage_bytes(vllm_config), spec.page_size_bytes)
        for spec, layers in kinds.items()
    )


def bank_spec(
    config: PaceConfig,
    layers: Sequence[int],
    block_size: int,
    page_bytes: int,
    width: int,
    dtype: torch.dtype,
    where: str,
    max_model_len: int,
    drafts: int = 0,
    max_step_tokens: int = 8192,
    copied: bool = False,
    other_blocks: int = 0,
) -> PagedBankSpec:
    """The spec of banks for ``layers`` with pages of ``page_bytes``; ``where`` is for the log.

    ``drafts`` tokens at most are speculative in a step; ``copied`` is whether prefixes are cached;
    ``other_blocks`` those that the longest request holds beside whole attention's and its banks'.
    """
    stored, rules = config.stored_dtype(dtype), config.rules()
    return PagedBankSpec(
        block_size=block_size,
        num_kv_heads=1,
        head_size=page_bytes // 2,
        head_size_v=page_bytes - page_bytes // 2,
        dtype=torch.uint8,
        layout=BankLayout.plan(rules, width, stored, page_bytes, drafts),
        rules=rules,
        num_layers=len(layers),
        summary=f"{where}, preset {config.preset}{_SITES[config.site]}",
        max_model_len=max_model_len,
        max_step_tokens=max_step_tokens,
        copied=copied,
        other_blocks=other_blocks,
    )


def _attention_layers(vllm_config: VllmConfig) -> list[AttentionLayerBase]:
    layers = layers_by_name(vllm_config).values()
    return [
        layer
        for layer in layers
        if isinstance(layer, AttentionLayerBase)
        and not isinstance(layer, MambaBase)
        and layer.get_attn_backend() is not BankBackend
    ]


def _state_specs(vllm_config: VllmConfig) -> list[KVCacheSpec]:
    """One spec for each layer of this rank that keeps a recurrent state."""
    layers = layers_by_name(vllm_config).values()
    specs = [
        layer.get_kv_cache_spec(vllm_config) for layer in layers if isinstance(layer, MambaBase)
    ]
    return [spec for spec in specs if spec is not None]


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


def _attention_specs(vllm_config: VllmConfig) -> list[AttentionSpec]:
    """One spec for each attention layer of this rank that has a KV cache of its own.

    Raises ``ValueError`` where banks could not tell the size of a block.
    """
    specs = [
        cast(AttentionSpec, spec)
        for layer in _attention_layers(vllm_config)
        if has_own_cache(layer) and (spec := layer.get_kv_cache_spec(vllm_config)) is not None
    ]
    pages = {spec.page_size_bytes for spec in _whole(specs)}
    tokens = {spec.block_size for spec in specs}
    if len(pages) != 1 or len(tokens) != 1:
        raise ValueError(
            f"pacellm: memory needs attention layers whose KV pages make blocks of one size, this "
            f"model has pages of {sorted({spec.page_size_bytes for spec in specs})} bytes for "
            f"{sorted(tokens)} tokens; serve it without pacellm."
        )
    return specs
