"""A pure-PyTorch CPU platform, so vLLM's published wheel serves on a machine without a GPU.

That wheel ships the Python half of vLLM's CPU backend (``CpuPlatform``, ``CPUWorker``,
``CPUModelRunner``, ``CPUAttentionBackend``) but not its native kernels. This folder supplies
what is missing and leaves the rest alone:

``torch_cpu``        ``TorchCpuPlatform``: configuration defaults and kernel registration
``attention``        ``TorchAttentionBackend``: attention on any KV cache layout torch can view
``worker``           ``TorchCpuWorker``: a worker that can be a later pipeline stage
``rejection``        which draft tokens of speculative decoding are kept
``kernels``          the ``torch.ops._C`` operators the CPU backend calls, written in PyTorch
``paged_attention``  the arithmetic of the attention operator among them
``activations``      further operators, which vLLM's activation classes look up

It is meant for development, tests and small models; a GPU, or a vLLM built for the CPU, is faster.
vLLM finds it through the ``vllm.platform_plugins`` entry point, which names ``activate``.
"""


def activate() -> str | None:
    """Name the platform class, or return None when one of vLLM's own platforms is usable.

    Stands in for a probe of ``vllm/platforms/__init__.py``. vLLM prefers any out-of-tree platform
    over its own, so standing aside for CUDA, ROCm, XPU, TPU and native CPU builds is up to us.
    """
    from vllm.platforms import builtin_platform_plugins

    for probe in builtin_platform_plugins.values():
        try:
            if probe() is not None:
                return None
        except Exception:
            # vLLM itself treats a probe that raises as "not this platform".
            continue
    return "pacellm_vllm.platform.torch_cpu.TorchCpuPlatform"
