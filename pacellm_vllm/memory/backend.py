"""What the memory layers of one step share: whose tokens they are and in which segments."""

from dataclasses import dataclass
from typing import Any, ClassVar

from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from pacellm_vllm.memory.batch import BatchSettings
from pacellm_vllm.memory.pieces import cut_pieces
from pacellm_vllm.memory.plain import PlainStep
from pacellm_vllm.memory.spec import PagedBankSpec
from pacellm_vllm.ops.rules import MemoryRules


@dataclass
class BankMetadata:
    """One step, for all memory layers; ``plain`` is what the plain PyTorch ops do in it."""

    plain: PlainStep


class BankMetadataBuilder(AttentionMetadataBuilder[BankMetadata]):
    # The op loops over requests on the host, so no CUDA graph may hold it: vLLM then captures
    # the pieces between the splitting ops.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    kv_cache_spec: PagedBankSpec

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._settings = BatchSettings.of_engine(self.vllm_config)
        layers: dict[str, Any] = self.vllm_config.compilation_config.static_forward_context
        self._rules: MemoryRules = layers[self.layer_names[0]].rules

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> BankMetadata:
        common = common_attn_metadata
        # Exact but for asynchronous scheduling of drafts, which is refused at start-up.
        lengths = common.seq_lens_cpu_upper_bound
        if lengths is None:
            lengths = common.seq_lens.cpu()
        requests = common.num_reqs
        # Model runner V2 says where in its request table each row is (padding is nowhere); in V1
        # the batch itself is the table.
        rows = range(requests) if common.req_idx is None else common.req_idx.tolist()
        layout = self.kv_cache_spec.layout
        prefilling: list[bool] = []
        if layout.drafts:
            assert common.is_prefilling is not None
            prefilling = common.is_prefilling[:requests].tolist()
        pieces = cut_pieces(
            common.query_start_loc_cpu[: requests + 1].tolist(),
            lengths[:requests].tolist(),
            layout,
            self._rules,
            [self._settings.get(row) for row in rows],
            prefilling,
        )
        return BankMetadata(PlainStep.of(common.block_table_tensor, pieces, layout.drafts > 0))


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
