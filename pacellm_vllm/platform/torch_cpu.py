"""``TorchCpuPlatform``: vLLM's CPU platform without native kernels."""

import os
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from vllm.logger import init_logger
from vllm.platforms.cpu import CpuPlatform, get_max_threads
from vllm.utils.cpu_resource_utils import get_memory_node_info, get_visible_memory_node
from vllm.utils.mem_constants import GiB_bytes

from pacellm_vllm.platform import CPU_WORKER

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# vLLM shows the loggers below its own name only.
logger = init_logger(f"vllm.{__name__}")

_ASYNC_SWITCH = "PACELLM_CPU_ASYNC_SCHEDULING"
_MIN_DEFAULT_KV_BYTES = GiB_bytes // 2
_MAX_DEFAULT_KV_BYTES = 4 * GiB_bytes


class _PromptSettings(NamedTuple):
    """How prompts are to be read: in chunks, of how many tokens, and from the prefix cache."""

    chunked: bool
    tokens: int
    cached: bool

    @classmethod
    def of(cls, vllm_config: "VllmConfig") -> "_PromptSettings":
        scheduler = vllm_config.scheduler_config
        return cls(
            scheduler.enable_chunked_prefill,
            scheduler.max_num_batched_tokens,
            vllm_config.cache_config.enable_prefix_caching,
        )

    def put_back(self, vllm_config: "VllmConfig") -> None:
        scheduler = vllm_config.scheduler_config
        scheduler.enable_chunked_prefill = self.chunked
        scheduler.max_num_batched_tokens = self.tokens
        vllm_config.cache_config.enable_prefix_caching = self.cached


class TorchCpuPlatform(CpuPlatform):
    """``CpuPlatform`` (vllm/platforms/cpu.py) whose kernels are PyTorch operators."""

    # Inductor would compile C++ for tens of seconds at the first logprobs request.
    simple_compile_backend = "eager"

    @classmethod
    def import_kernels(cls) -> None:
        """Register ``torch.ops._C`` operators, whose libraries are not in the wheel."""
        from pacellm_vllm.platform import activations, experts, kernels, recurrent  # noqa: F401

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        if attn_selector_config.use_sparse:
            raise NotImplementedError(
                "Sparse attention is not implemented on the torch CPU platform."
            )
        if attn_selector_config.use_mla:
            return "pacellm_vllm.platform.latent_attention.TorchMLABackend"
        super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)
        return "pacellm_vllm.platform.attention.TorchAttentionBackend"

    @classmethod
    def apply_config_platform_defaults(cls, vllm_config: "VllmConfig") -> None:
        # check_and_update_config runs after vLLM has derived its compilation settings: too late.
        from vllm.config import CompilationMode

        compilation = vllm_config.compilation_config
        compilation.mode = CompilationMode.NONE
        if not {"all", "none"} & set(compilation.custom_ops):
            compilation.custom_ops.append("none")  # every custom op has a PyTorch forward
        vllm_config.kernel_config.enable_jit_warmup = False

    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        parallel = vllm_config.parallel_config
        backend = parallel.distributed_executor_backend
        resolved = vllm_config.scheduler_config.async_scheduling
        if parallel.worker_cls in ("auto", CPU_WORKER):
            parallel.worker_cls = "pacellm_vllm.platform.worker.TorchCpuWorker"
        asked = _PromptSettings.of(vllm_config)
        super().check_and_update_config(vllm_config)
        # CpuPlatform's latent attention reads prompts whole, ours does not.
        asked.put_back(vllm_config)
        # CpuPlatform turns async scheduling off: a CPU gains nothing from it. Whether it was asked
        # for or is vLLM's default cannot be told apart here, so a switch of our own restores it.
        if os.environ.get(_ASYNC_SWITCH) == "1":
            vllm_config.scheduler_config.async_scheduling = resolved
        # CpuPlatform turns "uni" into "mp" only to pin OpenMP threads for its native kernels:
        # not worth one more process and its start-up.
        parallel.distributed_executor_backend = backend
        cls._set_default_thread_placement(parallel.world_size)
        cls._set_default_kv_cache_size(vllm_config)

    @classmethod
    def _set_default_thread_placement(cls, workers: int) -> None:
        """Leave threads unpinned, and share the cores out where several workers start here.

        vLLM's default ("auto") asks for one NUMA node per worker, so tensor parallelism would not
        start on most machines (vllm/utils/ompmultiprocessing.py).
        """
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        if workers > 1:
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, get_max_threads() // workers)))

    @classmethod
    def _set_default_kv_cache_size(cls, vllm_config: "VllmConfig") -> None:
        """Choose a modest KV cache where the user has not.

        vLLM's own CPU default takes ``gpu_memory_utilization`` (0.92) of the machine, refuses to
        start where that much is not free, and touches every page of it at start-up.
        """
        from vllm.config import CacheConfig

        cache, model = vllm_config.cache_config, vllm_config.model_config
        default_share = CacheConfig().gpu_memory_utilization
        if (
            model is None
            or cache.kv_cache_memory_bytes is not None
            or cache.gpu_memory_utilization != default_share
        ):
            return
        parallel = vllm_config.parallel_config
        assert isinstance(model.dtype, torch.dtype)  # vLLM has resolved "auto" by now
        token_bytes = (
            2
            * model.get_num_layers(parallel)
            * model.get_num_kv_heads(parallel)
            * model.get_head_size()
            * model.dtype.itemsize
        )
        two_requests = 2 * model.max_model_len * token_bytes
        size = min(max(two_requests, _MIN_DEFAULT_KV_BYTES), _MAX_DEFAULT_KV_BYTES)
        node = get_memory_node_info(get_visible_memory_node()[0])  # knows container limits
        size = min(size, node.available_memory // (4 * parallel.world_size))
        cache.kv_cache_memory_bytes = size
        logger.info(
            "KV cache: %.2f GiB per worker (two requests of full length; at least 0.5 GiB, at most "
            "4 GiB and a quarter of the free memory). Set --kv-cache-memory-bytes or "
            "--gpu-memory-utilization to change it.",
            size / GiB_bytes,
        )

    @classmethod
    def register_triton_kernel_overrides(cls) -> None:
        """Replace the Triton kernels every step needs, and those of rejection sampling.

        Works around vLLM 0.32.0: the fallback for slot mappings in vllm/utils/cpu_triton_utils.py
        still has an older kernel's parameters, so without Triton the first step fails on its
        arguments, and those for rejection sampling call native kernels. The table of CpuPlatform
        can serve again once that signature follows ``ComputeSlotMappingKernel.kernel`` and those
        kernels have a PyTorch form; its other entries are for draft models.
        """
        from vllm.triton_utils import HAS_TRITON

        if not HAS_TRITON:
            _register_kernels()


@cache
def _register_kernels() -> None:
    """Once in a process: vLLM asks for each engine, looks through every loaded module, and stops
    at an object of llvmlite, which an n-gram drafter loads (``_rebind_kernels`` in
    vllm/triton_utils/dispatcher.py).
    """
    from vllm.triton_utils.dispatcher import register_kernels
    from vllm.utils.cpu_triton_utils import _batch_memcpy_impl

    from pacellm_vllm.platform.kernels import slot_mapping_kernel
    from pacellm_vllm.platform.rejection import KERNELS

    slots = "vllm.v1.worker.block_table.ComputeSlotMappingKernel.kernel"
    states = "vllm.v1.worker.mamba_utils.batch_memcpy_kernel"
    register_kernels({slots: slot_mapping_kernel, states: _batch_memcpy_impl, **KERNELS})
