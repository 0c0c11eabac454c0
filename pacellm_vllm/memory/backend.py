"""What the memory layers of one step share: whose tokens they are and in which segments."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from pacellm_vllm.memory.batch import BatchSettings
from pacellm_vllm.memory.journal import Journal
from pacellm_vllm.memory.pieces import cut_pieces
from pacellm_vllm.memory.plain import PlainStep
from pacellm_vllm.memory.spec import PagedBankSpec
from pacellm_vllm.ops.rules import MemoryRules
from pacellm_vllm.request import RequestSettings

if TYPE_CHECKING:
    # It imports Triton, which a machine without a GPU need not have.
    from pacellm_vllm.memory.device import DeviceStep, DeviceTables


@dataclass
class BankMetadata:
    """One step, for all memory layers: what the plain PyTorch ops do in it, or the kernels.

    ``journal`` is there for requests that asked to be told what their memory did, if any.
    """

    plain: PlainStep | None = None
    device: "DeviceStep | None" = None
    journal: Journal | None = None


def takes_kernels(device_type: str) -> bool:
    """Whether memory on such a device runs as kernels; elsewhere the plain PyTorch ops do."""
    return device_type == "cuda"


class BankMetadataBuilder(AttentionMetadataBuilder[BankMetadata]):
    kv_cache_spec: PagedBankSpec

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._settings = BatchSettings.of_engine(self.vllm_config)
        self._rules = self.kv_cache_spec.rules
        # By row of ``BatchSettings``.
        self._applied: dict[int, tuple[RequestSettings, MemoryRules]] = {}
        self._tables = self._new_tables() if takes_kernels(self.device.type) else None

    def _new_tables(self) -> "DeviceTables":
        from pacellm_vllm.memory.device import DeviceTables

        requests = most_requests(self.vllm_config)
        tokens = max(self.vllm_config.scheduler_config.max_num_batched_tokens, requests)
        layout = self.kv_cache_spec.layout
        return DeviceTables(layout, self._rules, requests, tokens, self.device)

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec
    ) -> AttentionCGSupport:
        # The kernels of a decode step have fixed shapes and read only buffers that stay in place.
        # Other steps differ in their number of rounds, and the plain ops loop on the host: vLLM
        # then captures the pieces between the splitting ops.
        if takes_kernels(vllm_config.device_config.device_type):
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return AttentionCGSupport.NEVER

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> BankMetadata:
        common = common_attn_metadata
        lengths, requests = lengths_of(common), common.num_reqs
        starts = common.query_start_loc_cpu[: requests + 1]
        rows = rows_of(common)
        own = self._own_rules(rows)
        if self._tables is not None:
            table, begins, ends = common.block_table_tensor, starts.numpy(), lengths.numpy()
            if common.max_query_len == 1 and requests == common.num_actual_tokens:
                step = self._tables.of_singles(table, ends * np.diff(begins), own)
            else:
                step = self._tables.of_batch(table, begins, ends, own, self.kv_cache_spec.grid)
            return BankMetadata(device=step)
        layout = self.kv_cache_spec.layout
        pieces = cut_pieces(
            starts.tolist(),
            lengths.tolist(),
            layout,
            self._rules,
            own,
            self.kv_cache_spec.grid,
        )
        asked = {i: key for i, row in enumerate(rows) if (key := self._settings.asked(row))}
        plain = PlainStep.of(common.block_table_tensor, pieces, layout.drafts > 0, asked)
        return BankMetadata(plain=plain, journal=self._settings.journal if asked else None)

    def settings_of(self, rows: Iterable[int]) -> list[RequestSettings | None]:
        """What the request in each of ``rows_of`` has set; None for one that has set nothing."""
        return [self._settings.get(row) for row in rows]

    def _own_rules(self, rows: Sequence[int]) -> dict[int, MemoryRules]:
        """Of the batch's requests that have set something; worked out once for each."""
        own = {}
        for request, (row, mine) in enumerate(zip(rows, self.settings_of(rows), strict=True)):
            if mine is None:
                continue
            known, rules = self._applied.get(row, (None, self._rules))
            if known is not mine:
                rules = mine.applied_to(self._rules)
                self._applied[row] = mine, rules
            own[request] = rules
        return own

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> BankMetadata:
        # Also runs for the dummy steps that replay a captured graph: nobody's bank may change,
        # whatever the block table still holds.
        requests = common_attn_metadata.num_reqs
        nobody = np.zeros(requests, dtype=np.int32)
        assert self._tables is not None, "only decode steps of the kernels are captured whole"
        table = common_attn_metadata.block_table_tensor
        return BankMetadata(device=self._tables.of_singles(table, nobody, {}))


def lengths_of(common: CommonAttentionMetadata) -> torch.Tensor:
    """Tokens of each request when the step is done, on the host."""
    # Exact but for asynchronous scheduling of drafts, which is refused at start-up.
    lengths = common.seq_lens_cpu_upper_bound
    return (common.seq_lens.cpu() if lengths is None else lengths)[: common.num_reqs]


def rows_of(common: CommonAttentionMetadata) -> Sequence[int]:
    """Where ``BatchSettings`` has each request of the step."""
    # Model runner V2 says where in its request table each row is (padding is nowhere); in V1
    # the batch itself is the table.
    return range(common.num_reqs) if common.req_idx is None else common.req_idx.tolist()


def most_requests(vllm_config: VllmConfig) -> int:
    """Of one step, padding included."""
    graphs = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    return max(vllm_config.scheduler_config.max_num_seqs, graphs)


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
