"""A model's layers beside banks: attention, recurrent states, shared caches."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pacellm_vllm.compat.patching import patch

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase


def layers_by_name(vllm_config: VllmConfig) -> dict[str, Any]:
    """All layers of an engine's model, on this rank, that vLLM plans a KV cache for or calls by
    name; those that are added are planned for.

    Symptom: they are in what compiled graphs read, and nowhere else.
    Can go when a model's layers can be listed, and added to, in a public place.
    """
    return vllm_config.compilation_config.static_forward_context


def has_own_cache(layer: AttentionLayerBase) -> bool:
    """Whether ``layer`` keeps a KV cache, and does not read another layer's.

    Symptom: one that shares has a spec like any other; an attribute that not all classes of layers
    have tells it apart.
    Can go when ``AttentionLayerBase`` does.
    """
    return not getattr(layer, "kv_sharing_target_layer_name", None)


def hides_freed_windows(vllm_config: VllmConfig) -> bool:
    """Whether attention on a GPU is kept from blocks that a window has let go of.

    Symptom: the scheduler frees them and the runner's block tables still name them, so a kernel may
    load one in the tile where the window starts. It masks what it computes of it, but NaN it passes
    on, and a bank's bytes, read as keys and values, may be NaN.
    Can go when vLLM 0.32 and model runner V1 do.
    """
    from vllm.v1.worker.gpu.block_table import BlockTables

    told = inspect.signature(BlockTables.gather_block_tables).parameters
    return vllm_config.use_v2_model_runner and "num_computed_tokens" in told


def pack_cpu_attention(vllm_config: VllmConfig) -> None:
    """Let the attention layers of vLLM's own CPU builds share blocks with banks.

    Symptom: CPU_ATTN declares one KV cache layout, which keeps layers apart; its kernels follow
    strides, and on block-outermost caches do the same.
    Can go when ``CPUAttentionBackend`` declares BLHNC.
    """
    from vllm.model_executor.layers.attention import Attention
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    for layer in layers_by_name(vllm_config).values():
        if isinstance(layer, Attention):
            layer.attn_backend = packing(layer.attn_backend)


@functools.cache
def packing(backend: Any) -> Any:
    """``backend`` if it is none of the CPU's or packs already, else a subclass that does."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    from vllm.v1.kv_cache_layout import KVCacheLayout

    if not issubclass(backend, CPUAttentionBackend):
        return backend
    known = backend.supported_kv_cache_layouts()
    if KVCacheLayout.BLHNC in known:
        return backend
    layouts = (*known, KVCacheLayout.BLHNC)
    body = {"supported_kv_cache_layouts": classmethod(lambda cls: layouts)}
    return type(f"Packed{backend.__name__}", (backend,), body)


def start_state_updates(vllm_config: VllmConfig) -> None:
    """Choose how this worker's Mamba layers update their states in decode steps, if it has any.

    Symptom: vLLM does so when it has planned the KV cache, and overlooks groups whose layers have
    specs of their own (``UniformTypeKVCacheSpecs``), as all groups beside banks do: the first
    decode step finds that "Mamba SSU backend has not been initialized".
    Can go when ``initialize_mamba_ssu_backend`` looks into such groups.
    """
    from vllm.model_executor.layers.mamba.abstract import MambaBase
    from vllm.model_executor.layers.mamba.ops.ssu_dispatch import initialize_mamba_ssu_backend
    from vllm.v1.kv_cache_interface import MambaSpec

    layers = layers_by_name(vllm_config).values()
    kinds = {layer.mamba_type for layer in layers if isinstance(layer, MambaBase)}
    specs = [MambaSpec(block_size=1, shapes=(), dtypes=(), mamba_type=kind) for kind in kinds]
    groups: Any = SimpleNamespace(
        kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec) for spec in specs]
    )
    initialize_mamba_ssu_backend(
        vllm_config.mamba_config, groups, use_replayssm=vllm_config.cache_config.use_replayssm
    )


def place_shared_layers() -> None:
    """Let attention layers that share another one's KV cache stand beside banks.

    Symptom: vLLM adds such a layer to the group of the other and not to the specs of its own that
    the group's layers have beside banks (``UniformTypeKVCacheSpecs``): ``KeyError`` of the layer's
    name.
    Can go when ``add_kv_sharing_layers_to_kv_cache_groups`` adds it there, too.
    """
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    def placed(
        original: Callable[..., None],
        shared: dict[str, str],
        groups: Iterable[Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        original(shared, groups, *args, **kwargs)
        for group in groups:
            if isinstance(group.kv_cache_spec, UniformTypeKVCacheSpecs):
                specs = group.kv_cache_spec.kv_cache_specs
                specs |= {name: specs[shared[name]] for name in group.layer_names if name in shared}

    patch("place_shared_layers", placed)
