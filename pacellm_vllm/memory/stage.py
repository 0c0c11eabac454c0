"""StageWithoutMemory: what a pipeline stage holds that has no memory layer."""

from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import KVCacheSpec

from pacellm_vllm.compat import layers_by_name
from pacellm_vllm.config import PaceConfig
from pacellm_vllm.memory.backend import BankBackend
from pacellm_vllm.memory.plan import plan_spec


class StageWithoutMemory(AttentionLayerBase):
    """A bank nobody uses, in blocks that the stage's attention needs anyway.

    vLLM plans one KV cache for all stages. Where one has no layer of a kind, it stops: workers
    "disagree on supported KV cache layouts" (``resolve_kv_cache_layout`` in
    v1/attention/backends/utils.py), and a stage is given tensors of layers it does not have
    (``_project_kv_cache_groups_to_worker`` in v1/core/kv_cache_utils.py keeps the whole group's
    specs; ``allocate_kv_cache`` in v1/worker/utils.py then finds no group for them).
    """

    def __init__(
        self, vllm_config: VllmConfig, config: PaceConfig, width: int, prefix: str
    ) -> None:
        self.config = config
        self.width = width
        layers_by_name(vllm_config)[prefix] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        return BankBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return plan_spec(vllm_config, self.config, self.width)
