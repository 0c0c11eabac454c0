"""PagedBankSpec: a bank as vLLM's scheduler sees it.

The spec descends from ``CircularBufferSpec`` (``v1/kv_cache_interface.py``), vLLM's type for
per-request state that is no token-indexed cache: grouping, warm-up and sizing treat it as such.
"""

from dataclasses import dataclass
from functools import cached_property

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import CircularBufferSpec, KVCacheSpec

from pacellm_vllm.compat import register_kv_cache_spec
from pacellm_vllm.memory.layout import BankLayout
from pacellm_vllm.memory.manager import PagedBankManager
from pacellm_vllm.memory.snapshots import SnapshotGrid
from pacellm_vllm.ops.rules import MemoryRules


@dataclass(frozen=True, kw_only=True)
class PagedBankSpec(CircularBufferSpec):
    """One layer's bank: up to ``layout.num_pages`` pages of ``layout.page_bytes`` per request.

    ``block_size`` is the attention layers' (it only enters the scheduler's block arithmetic) and
    ``dtype`` is uint8: a dtype unlike the KV cache's makes vLLM zero new attention blocks, which
    may have held a bank whose bytes read as NaN. Banks' own pages need no zeroing: what counts is
    decided by position. ``rules`` are those of requests that set none of their own. ``num_layers``
    carry memory in the whole model, ``summary`` says which, for the start-up line,
    ``max_model_len`` is the longest request's, ``max_step_tokens`` the most tokens of a step,
    ``copied`` whether banks are copied for the prefix cache, and ``other_blocks`` are those that
    the longest request holds of layers with windows or recurrent states.
    """

    layout: BankLayout
    rules: MemoryRules
    num_layers: int
    summary: str
    max_model_len: int
    max_step_tokens: int
    copied: bool
    other_blocks: int = 0

    @cached_property
    def grid(self) -> SnapshotGrid | None:
        """Where banks are copied; None where they are not."""
        return SnapshotGrid(self.layout, self.block_size) if self.copied else None

    @property
    def num_states(self) -> int:
        return 1

    def get_num_kernel_states(self, kernel_block_size: int) -> int:
        return 1

    @property
    def num_heads(self) -> int:
        return 1

    @property
    def state_content_size_bytes(self) -> int:
        return self.layout.page_bytes

    @property
    def prefix_cacheable(self) -> bool:
        # False would leave the group out of hit lookup: an attention hit would then skip tokens
        # the bank never saw.
        return True

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        return self.layout.pages_for(vllm_config.model_config.max_model_len) * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        # Model runner V1 computes a slot mapping for every group, ours included, and reads
        # row[position // block_size] for it: the row must be that long though no one uses it.
        # A snapshot grid's columns are never more than attention's.
        return self.layout.num_pages + cdiv(max_len, self.block_size)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(isinstance(spec, PagedBankSpec) for spec in kv_cache_specs.values())


register_kv_cache_spec(PagedBankSpec, PagedBankManager)
