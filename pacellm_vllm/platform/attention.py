"""The attention backend of the CPU platform: vLLM's CPU_ATTN on PyTorch operators."""

from typing import TYPE_CHECKING, Any, ClassVar

from vllm.v1.attention.backend import MultipleOf
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.kv_cache_interface import KVCacheLayout, is_quantized_kv_cache

if TYPE_CHECKING:
    from vllm.config.cache import CacheDType


class TorchAttentionImpl(CPUAttentionBackendImpl):
    """``CPUAttentionBackendImpl`` (v1/attention/backends/cpu_attn.py) with early refusals.

    Same forward: query ``[tokens, heads, head_size]``, key and value
    ``[tokens, kv_heads, head_size]``, KV cache ``[blocks, kv_heads, block_size, 2 * head_size]``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.alibi_slopes is not None:
            raise NotImplementedError(
                "ALiBi attention is not implemented on the torch CPU platform."
            )
        kv_cache_dtype = self.kv_cache_dtype
        if is_quantized_kv_cache(kv_cache_dtype):
            raise NotImplementedError(
                f"KV cache dtype {kv_cache_dtype} is not implemented on the torch CPU platform."
            )


class TorchAttentionBackend(CPUAttentionBackend):
    """``CPUAttentionBackend`` (v1/attention/backends/cpu_attn.py) for the PyTorch operators.

    Torch operators follow strides, so the restrictions of the native kernels go: a layer's cache
    ``[blocks, kv_heads, block_size, 2 * head_size]`` may be one layer's slice of a packed
    (block-outermost) allocation, blocks may be any multiple of 16 tokens, and heads any size.
    """

    supported_kv_cache_dtypes: ClassVar[list["CacheDType"]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return []  # any

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # The stock layout comes first, so plain models keep it; the block-outermost one is there
        # for backends that pack their own pages beside the KV pages. Both are head-major inside a
        # block, which CPUAttentionBackendImpl's views rely on.
        return (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return TorchAttentionImpl
