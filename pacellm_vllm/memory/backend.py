"""What the memory layers of one step share: whose tokens they are and in which segments."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from pacellm_vllm.memory.batch import BatchSettings
from pacellm_vllm.memory.layout import BankLayout
from pacellm_vllm.memory.spec import PagedBankSpec
from pacellm_vllm.request import RequestSettings


@dataclass(frozen=True)
class Piece:
    """Tokens ``begin`` .. ``end - 1`` of the batch: one request's, in one segment.

    ``position`` is the first one's place in its request, ``pages`` how many of the request's
    pages the piece can reach, ``settings`` what the request has set for itself.
    """

    request: int
    begin: int
    end: int
    position: int
    pages: int
    settings: RequestSettings | None = None


@dataclass
class BankMetadata:
    """``block_table`` [requests, >= num_pages] int32 block ids in claiming order.

    A request that takes no memory holds the null block, 0, instead of every page.
    """

    block_table: torch.Tensor
    pieces: list[Piece]


def cut_pieces(
    starts: list[int],
    lengths: list[int],
    layout: BankLayout,
    settings: Sequence[RequestSettings | None] = (),
) -> list[Piece]:
    """Cut a batch at request borders and segment ends.

    ``starts`` [requests + 1] are offsets into the batch, ``lengths`` [requests] each request's
    tokens after this step, ``settings`` what the first of them have set. Requests without tokens
    give no piece.
    """
    size = layout.segment_size
    pieces = []
    for request, length in enumerate(lengths):
        begin, end = starts[request], starts[request + 1]
        position = length - (end - begin)
        own = settings[request] if request < len(settings) else None
        while begin < end:
            n = min(end - begin, size - position % size)
            pages = layout.pages_for(position + n)
            pieces.append(Piece(request, begin, begin + n, position, pages, own))
            begin, position = begin + n, position + n
    return pieces


class BankMetadataBuilder(AttentionMetadataBuilder[BankMetadata]):
    # The op loops over requests on the host, so no CUDA graph may hold it: vLLM then captures
    # the pieces between the splitting ops.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    kv_cache_spec: PagedBankSpec

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._settings = BatchSettings.of_engine(self.vllm_config)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> BankMetadata:
        common = common_attn_metadata
        # Exact without speculative decoding, which is refused at start-up.
        lengths = common.seq_lens_cpu_upper_bound
        if lengths is None:
            lengths = common.seq_lens.cpu()
        requests = common.num_reqs
        # Model runner V2 says where in its request table each row is (padding is nowhere); in V1
        # the batch itself is the table.
        rows = range(requests) if common.req_idx is None else common.req_idx.tolist()
        return BankMetadata(
            common.block_table_tensor,
            cut_pieces(
                common.query_start_loc_cpu[: requests + 1].tolist(),
                lengths[:requests].tolist(),
                self.kv_cache_spec.layout,
                [self._settings.get(row) for row in rows],
            ),
        )


class BankBackend(AttentionBackend):
    """Tells vLLM how to build metadata for banks; there is no attention implementation."""

    @staticmethod
    def get_name() -> str:
        return "PACE_BANK"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("a bank is read by its layer, not by an attention kernel")

    @staticmethod
    def get_builder_cls() -> type[BankMetadataBuilder]:
        return BankMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(1)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # Only block-outermost layouts pack bank pages and attention pages of different sizes
        # side by side in one block. Elsewhere vLLM would silently pad every attention page.
        return (KVCacheLayout.BLNHC, KVCacheLayout.BLHNC)
