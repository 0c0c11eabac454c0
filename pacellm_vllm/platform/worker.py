"""The worker of the CPU platform."""

from typing import Any

from vllm.distributed import get_pp_group
from vllm.v1.worker.cpu_worker import CPUWorker


class TorchCpuWorker(CPUWorker):
    """``CPUWorker`` (vllm/v1/worker/cpu_worker.py) that can be a later pipeline stage.

    Works around vLLM 0.32.0: the buffers that receive the previous stage's hidden states are made
    in the profiling run (``GPUModelRunner._dummy_run``), which ``CPUModelRunner.warming_up_model``
    leaves out where nothing is compiled. The first step then fails on an assertion in
    ``sync_and_gather_intermediate_tensors``, which the engine reports as a ``KeyError`` in
    ``Scheduler.update_from_output``. Can go when the buffers are made in any case.
    """

    def load_model(self, **kwargs: Any) -> None:
        super().load_model(**kwargs)
        if not get_pp_group().is_first_rank:
            runner: Any = self.model_runner
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens,
                dtype=runner.model_config.dtype,
                device=runner.device,
            )
