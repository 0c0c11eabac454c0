"""What an engine is configured with before it is made."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Set
from typing import TYPE_CHECKING, Any

from pacellm_vllm.compat.patching import patch

if TYPE_CHECKING:
    from vllm.config import VllmConfig

ConfigHook = Callable[["VllmConfig"], None]


def add_config_hook(architecture: str, hook: ConfigHook, base: str | None = None) -> None:
    """Run ``hook(vllm_config)`` when an engine for ``architecture`` is configured.

    The architecture's own hook, if any, runs first, or that of ``base``, which it stands on.
    Idempotent per architecture and hook.
    Symptom: vLLM has no public place where a plugin may check the finished configuration;
    ``MODELS_CONFIG_MAP`` is what its own models use.
    Can go when there is one.
    """
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    if getattr(MODELS_CONFIG_MAP.get(architecture), "_pacellm_hook", None) is hook:
        return
    own = MODELS_CONFIG_MAP.get(base or architecture, VerifyAndUpdateConfig)

    class HookedConfig(own):  # type: ignore[valid-type, misc]
        _pacellm_hook = staticmethod(hook)

        @staticmethod
        def verify_and_update_config(vllm_config: VllmConfig) -> None:
            own.verify_and_update_config(vllm_config)
            hook(vllm_config)

    MODELS_CONFIG_MAP[architecture] = HookedConfig


def api_processes(vllm_config: VllmConfig) -> int:
    """How many API servers stand before the engine.

    Symptom: the number that ``--api-server-count`` has come to is in a private field, and what one
    server knows of requests, the others do not.
    Can go when the field is public.
    """
    return vllm_config.parallel_config._api_process_count


def is_vllms_cpu_build() -> bool:
    """Whether engines run on vLLM's own CPU build, and not on another platform for CPUs.

    Symptom: ``is_cpu()`` is true of both, and this one's kernels for latent attention want each
    layer's cache apart.
    Can go when they take blocks that layers share.
    """
    from vllm.platforms import current_platform
    from vllm.platforms.cpu import CpuPlatform

    # AMD's platform, for Zen, stands on it too.
    of_vllm = type(current_platform).__module__.startswith("vllm.")
    return of_vllm and isinstance(current_platform, CpuPlatform)


def add_worker_extension(vllm_config: VllmConfig, name: str) -> None:
    """Give every worker the methods of class ``name``, unless the user named an extension.

    Symptom: vLLM has one slot for worker extensions and no way to add a second.
    Can go when there can be several.
    """
    if not vllm_config.parallel_config.worker_extension_cls:
        vllm_config.parallel_config.worker_extension_cls = name


def add_logits_processor(vllm_config: VllmConfig, processor: type) -> None:
    """Load custom logits processor ``processor`` in this engine's workers.

    Given as a class, so that a process which is sent the configuration imports its module at once.
    Symptom: vLLM has no other way to add one for some models only; what plugins register is
    loaded for all.
    Can go when a model class can name its own.
    """
    model = vllm_config.model_config
    known = list(model.logits_processors or ())
    if processor not in known:
        model.logits_processors = [*known, processor]


def load_with_drafts(processors: Set[type]) -> None:
    """Let logits ``processors``, which leave logits alone, be loaded beside a drafter.

    Symptom: with speculative decoding, model runner V1 refuses custom logits processors of any
    kind.
    Can go when it loads those that are argmax invariant.
    """

    def build(
        original: Callable[..., Any],
        vllm_config: VllmConfig,
        device: Any,
        pin_memory: bool,
        pooling: bool,
        custom: Iterable[Any] = (),
    ) -> Any:
        custom = tuple(custom)
        if not vllm_config.speculative_config or not custom or not processors >= {*custom}:
            return original(vllm_config, device, pin_memory, pooling, custom)
        built = original(vllm_config, device, pin_memory, pooling)
        for processor in custom:
            built.argmax_invariant.append(processor(vllm_config, device, pin_memory))
        return built

    patch("load_with_drafts", build)


def set_cpu_worker(vllm_config: VllmConfig, name: str) -> None:
    """Have class ``name`` as the worker of an engine on a CPU, where the user named none.

    Symptom: ``CPUModelRunner._zero_block_ids`` leaves out groups whose layers have specs of their
    own (``UniformTypeKVCacheSpecs``), as all groups beside banks do, so attention would find NaN
    where a bank's bytes were.
    Can go when it zeroes those too.
    Raises ``ValueError`` where another worker is named.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    parallel = vllm_config.parallel_config
    module = name.rpartition(".")[0]
    # A checked configuration may be checked again.
    if parallel.worker_cls.startswith(f"{module}."):
        return
    if parallel.worker_cls not in ("auto", "vllm.v1.worker.cpu_worker.CPUWorker"):
        raise ValueError(
            f"pacellm: worker class {parallel.worker_cls} does not work with memory on a CPU: it "
            "does not zero what banks have written before attention gets it; drop --worker-cls."
        )
    parallel.worker_cls = name


def with_final_blocks(vllm_config: VllmConfig) -> VllmConfig:
    """A copy of the configuration with the KV block size that a model, once built, will have.

    Symptom: vLLM chooses the size, which recurrent layers can make large, when it has loaded the
    weights, so a size that does not fit would be refused only then.
    Can go when it chooses before (``update_block_size_for_backend`` in v1/executor).
    """
    from vllm.platforms import current_platform

    final = copy.copy(vllm_config)
    final.cache_config = copy.copy(vllm_config.cache_config)
    current_platform.update_block_size_for_backend(final)
    return final
