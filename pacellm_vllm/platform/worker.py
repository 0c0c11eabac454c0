"""Workers of engines on a CPU."""

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.v1.worker.cpu_worker import CPUWorker

from pacellm_vllm.compat import layers_by_name


class CpuWorker(CPUWorker):
    """``CPUWorker`` (vllm/v1/worker/cpu_worker.py), with two faults of vLLM worked around.

    A later pipeline stage: the buffers that receive the previous stage's hidden states are made
    in the profiling run (``GPUModelRunner._dummy_run``), which ``CPUModelRunner.warming_up_model``
    leaves out where nothing is compiled. The first step then fails on an assertion in
    ``sync_and_gather_intermediate_tensors``, which the engine reports as a ``KeyError`` in
    ``Scheduler.update_from_output``. Can go when the buffers are made in any case.

    Zeroing of new blocks: see ``compat.set_cpu_worker``.
    """

    def load_model(self, **kwargs: Any) -> None:
        super().load_model(**kwargs)
        runner: Any = self.model_runner
        runner._zero_block_ids = self._zero_blocks
        if not get_pp_group().is_first_rank:
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens,
                dtype=runner.model_config.dtype,
                device=runner.device,
            )

    def _zero_blocks(self, block_ids: list[int]) -> None:
        for layer in layers_by_name(self.vllm_config).values():
            cache = getattr(layer, "kv_cache", None)
            if isinstance(cache, torch.Tensor) and cache.numel():
                cache[block_ids] = 0


class TorchCpuWorker(CpuWorker):
    """The worker of the PyTorch platform, with a third fault worked around.

    Data parallel engines (vLLM 0.33.0): each is given memory nodes of its own, so where there are
    fewer nodes than engines the last ones have none and do not start with an ``IndexError``. Our
    workers are bound to no node. Can go when engines may share nodes.
    """

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        # vLLM's own CPU build imports this module, and has operators of the same names.
        from pacellm_vllm.platform.recurrent import use_delta_rule

        use_delta_rule()
        vllm_config.parallel_config.assigned_physical_gpu_ids = None
        super().__init__(vllm_config, *args, **kwargs)
