"""Latent attention (MLA) of the CPU platform, in PyTorch.

Every query, of a prompt too, reads the latent cache as decoding does: one key head of width
``kv_lora_rank + qk_rope_head_dim`` whose first ``kv_lora_rank`` numbers are its value as well. So
prompts may come in chunks and from the prefix cache, and caches may have any strides.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonMetadata,
    MLACommonMetadataBuilder,
    QueryLenSupport,
)
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend, CPUMLAImpl

from pacellm_vllm.platform.paged_attention import attend


@dataclass
class TorchMLAMetadata(MLACommonMetadata):
    def __post_init__(self) -> None:
        """Without vLLM's list of head sizes, which are those of kernels."""


class TorchMLABuilder(MLACommonMetadataBuilder[TorchMLAMetadata]):
    """Calls every request a decode, however many tokens it has in a step."""

    query_len_support: ClassVar[QueryLenSupport] = QueryLenSupport.VARLEN
    reorder_batch_threshold: int = 1 << 30

    def __init__(self, *engine: Any, **named: Any) -> None:
        named["metadata_cls"] = TorchMLAMetadata
        super().__init__(*engine, **named)


class TorchMLAImpl(CPUMLAImpl):
    """``CPUMLAImpl`` (v1/attention/backends/mla/cpu_mla.py); caches [blocks, block_size, width]."""

    def forward_mqa(
        self,
        q: Tensor | tuple[Tensor, Tensor],
        kv_c_and_k_pe_cache: Tensor,
        attn_metadata: Any,
        layer: Any,
    ) -> tuple[Tensor, None]:
        """``q`` [tokens, heads, width], or its two parts; returns [tokens, heads, kv_lora_rank]."""
        query = torch.cat(q, dim=-1) if isinstance(q, tuple) else q
        cache = kv_c_and_k_pe_cache[:, None]
        # As wide as the keys, which stand for the values too; the rotated part is cut off.
        out = query.new_zeros(*query.shape[:-1], self.head_size)
        decode = attn_metadata.decode
        attend(
            query,
            cache,
            cache,
            out,
            attn_metadata.query_start_loc[: attn_metadata.num_decodes + 1].cpu(),
            decode.seq_lens,
            [attn_metadata.causal] * attn_metadata.num_decodes,
            decode.block_table,
            self.scale,
            window=0,
            softcap=0.0,
            sinks=None,
        )
        return out[..., : self.kv_lora_rank].contiguous(), None

    def do_kv_cache_update(
        self,
        kv_c_normed: Tensor,
        k_pe: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
        *_: Any,
        **__: Any,
    ) -> None:
        """Write [tokens, kv_lora_rank] and [tokens, 1, rest] where ``slot_mapping`` is not -1."""
        if kv_cache.numel() == 0:
            return
        slots = slot_mapping.flatten().long()
        kept = slots >= 0
        rows = torch.cat([kv_c_normed, k_pe.squeeze(1)], dim=-1)[: len(slots)][kept]
        size = kv_cache.shape[1]
        slots = slots[kept]
        kv_cache[slots // size, slots % size] = rows.to(kv_cache.dtype)


class TorchMLABackend(CPUMLABackend):
    """``CPUMLABackend`` for heads of any size and blocks of any multiple of 16 tokens."""

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return []  # any

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        return block_size is None or block_size % 16 == 0

    @staticmethod
    def get_impl_cls() -> type[CPUMLAImpl]:
        return TorchMLAImpl

    @staticmethod
    def get_builder_cls() -> type[MLACommonMetadataBuilder]:
        return TorchMLABuilder
