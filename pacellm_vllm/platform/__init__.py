"""A pure-PyTorch CPU platform, so vLLM's published wheel serves on a machine without a GPU.

That wheel ships the Python half of vLLM's CPU backend (``CpuPlatform``, ``CPUWorker``,
``CPUModelRunner``, ``CPUAttentionBackend``) but not its native kernels. This folder supplies
what is missing and leaves the rest alone:

``torch_cpu``        ``TorchCpuPlatform``: configuration defaults and kernel registration
``attention``        ``TorchAttentionBackend``: attention on any KV cache layout torch can view
``latent_attention`` ``TorchMLABackend``: the same for latent caches (MLA)
``worker``           ``TorchCpuWorker``, a worker that can be a later pipeline stage, and
                     ``CpuWorker``, which engines with memory have on vLLM's own CPU build too
``rejection``        which draft tokens of speculative decoding are kept
``operators``        how an operator in PyTorch takes the place of a native one
``kernels``          the ``torch.ops._C`` operators the CPU backend calls, written in PyTorch
``paged_attention``  the arithmetic of the attention operator among them
``activations``      further operators, which vLLM's activation classes look up
``experts``          and those of mixtures of experts
``recurrent``        and those of recurrent layers

It is meant for development, tests and small models; a GPU, or a vLLM built for the CPU, is faster.
So it serves only who asks for it, with PACELLM_CPU_PLATFORM=1, and only where none of vLLM's own
platforms works: a GPU machine whose driver fails is not to serve a large model on this by accident.
vLLM finds it through the ``vllm.platform_plugins`` entry point, which names ``activate``.
"""

import logging
import multiprocessing
import os
from functools import cache

SWITCH = "PACELLM_CPU_PLATFORM"

CPU_WORKER = "pacellm_vllm.platform.worker.CpuWorker"

# vLLM shows the loggers below its own name only.
_logger = logging.getLogger(f"vllm.{__name__}")


def activate() -> str | None:
    """Name the platform class, or return None when not asked or a platform of vLLM's own works.

    Stands in for a probe of ``vllm/platforms/__init__.py``. vLLM prefers any out-of-tree platform
    over its own, so standing aside for CUDA, ROCm, XPU, TPU and native CPU builds is up to us.
    """
    if os.environ.get(SWITCH) != "1":
        _logger.debug("The PyTorch CPU platform is not asked for: that takes %s=1.", SWITCH)
        return None
    from vllm.platforms import builtin_platform_plugins

    for name, probe in builtin_platform_plugins.items():
        try:
            if probe() is not None:
                _say(
                    logging.INFO,
                    f"pacellm: {SWITCH}=1 changes nothing: vLLM's own platform {name} works here.",
                )
                return None
        except Exception:
            # vLLM itself treats a probe that raises as "not this platform".
            continue
    _say(
        logging.WARNING,
        f"pacellm: no platform of vLLM's own works here, so models run on the PyTorch CPU platform "
        f"({SWITCH}=1), which is slow.",
    )
    return "pacellm_vllm.platform.torch_cpu.TorchCpuPlatform"


def check_platform() -> None:
    """Raise ``PaceConfigError`` where vLLM has nothing to run on."""
    from vllm.platforms import current_platform

    from pacellm_vllm.config import PaceConfigError

    if current_platform.is_unspecified():
        raise PaceConfigError(
            f"pacellm: vLLM finds no platform to run on; set {SWITCH}=1 for the PyTorch CPU "
            "platform, which is slow, or, where there is a GPU, see why with "
            "VLLM_LOGGING_LEVEL=DEBUG."
        )


@cache
def _say(level: int, line: str) -> None:
    """Once, whatever the number of calls and of processes that vLLM starts."""
    if multiprocessing.parent_process() is None:
        _logger.log(level, line)
