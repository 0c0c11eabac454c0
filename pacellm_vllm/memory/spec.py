"""PagedBankSpec and PagedBankManager: a bank as vLLM's scheduler sees it.

The spec descends from ``CircularBufferSpec`` (``v1/kv_cache_interface.py``), vLLM's type for
per-request state that is no token-indexed cache: grouping, warm-up and sizing treat it as such.
"""

from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import CircularBufferManager
from vllm.v1.kv_cache_interface import CircularBufferSpec, KVCacheSpec

from pacellm_vllm.compat import plugin_logger, register_kv_cache_spec
from pacellm_vllm.memory.layout import BankLayout

logger = plugin_logger()


@dataclass(frozen=True, kw_only=True)
class PagedBankSpec(CircularBufferSpec):
    """One layer's bank: up to ``layout.num_pages`` pages of ``layout.page_bytes`` per request.

    ``block_size`` is the attention layers' (it only enters the scheduler's block arithmetic) and
    ``dtype`` is uint8: a dtype unlike the KV cache's makes vLLM zero new attention blocks, which
    may have held a bank whose bytes read as NaN. ``num_layers`` carry memory in the whole model,
    ``summary`` says which, for the start-up line.
    """

    layout: BankLayout
    num_layers: int
    summary: str

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
        # the bank never saw. True, with the manager's hit of 0, keeps every hit at 0.
        return True

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        return self.layout.pages_for(vllm_config.model_config.max_model_len) * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        # Model runner V1 computes a slot mapping for every group, ours included, and reads
        # row[position // block_size] for it: the row must be that long though no one uses it.
        return max(self.layout.num_pages, cdiv(max_len, self.block_size))

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(isinstance(spec, PagedBankSpec) for spec in kv_cache_specs.values())


class PagedBankManager(CircularBufferManager):
    """Claims a bank's pages as its tokens come to need them; the base class frees them.

    ``find_longest_cache_hit`` of the base class is always 0, so no prefix is ever skipped.
    """

    def __init__(self, kv_cache_spec: PagedBankSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self._layout = kv_cache_spec.layout
        # The base class leaves state out of zeroing. Pages never need it (what counts is decided
        # by position), but where vLLM zeroes anyway a second defence costs one memset.
        self._record_new_block_ids = bool(kwargs.get("needs_kv_cache_zeroing"))
        self._log_start(kv_cache_spec)

    def _log_start(self, spec: PagedBankSpec) -> None:
        layout, pool = spec.layout, self.block_pool.num_gpu_blocks
        used = spec.num_layers * layout.num_pages * layout.page_bytes
        logger.info(
            "pacellm: memory in %s; a request's banks take %.1f MB: %d KV blocks for its first "
            "token, %d from its second segment on, which is %.2f %% of the pool's %d.",
            spec.summary,
            used / 1e6,
            layout.pages_for(1),
            layout.num_pages,
            100 * layout.num_pages / pool,
            pool,
        )

    def _missing(self, request_id: str, num_tokens: int) -> int:
        held = len(self.req_to_blocks.get(request_id, ()))
        return max(self._layout.pages_for(num_tokens) - held, 0)

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> int:
        return self._missing(request_id, num_tokens)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        missing = self._missing(request_id, num_tokens)
        if not missing:
            return []
        blocks = self.block_pool.get_new_blocks(missing)
        self.req_to_blocks[request_id].extend(blocks)
        if self._record_new_block_ids:
            self.new_block_ids.extend(block.block_id for block in blocks)
        return blocks

    def allocate_external_computed_blocks(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "pacellm: tokens computed elsewhere carry no memory; serve without KV transfer."
        )


register_kv_cache_spec(PagedBankSpec, PagedBankManager)
