"""The architectures that vLLM knows, and checkpoints as it reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def checkpoint_config(
    model: str, trust_remote_code: bool = False, revision: str | None = None
) -> PretrainedConfig:
    """The configuration of a checkpoint; ``OSError`` or ``ValueError`` where there is none.

    Symptom: transformers does not know all architectures that vLLM has configurations for, and
    what reads those is no public function.
    Can go when it is.
    """
    from vllm.transformers_utils.config import get_config

    return get_config(model, trust_remote_code, revision=revision)


def generation_models() -> list[tuple[str, str, str]]:
    """Architecture, module and class of what vLLM generates text with; nothing is imported.

    Symptom: the registry knows what a class can do only once it has imported it, which takes
    seconds for all of them; the tables it is made from are not public.
    Can go when there is a public list of generative architectures.
    """
    from vllm.model_executor.models import registry

    listed = {
        **registry._TEXT_GENERATION_MODELS,
        **registry._MULTIMODAL_MODELS,
        **registry._TRANSFORMERS_SUPPORTED_MODELS,
    }
    names = [*listed, *(n for n in registry._TRANSFORMERS_BACKEND_MODELS if "ForCausalLM" in n)]
    found = [(name, registry.ModelRegistry.models.get(name)) for name in names]
    # Another plugin may have put a class of its own under one of the names.
    return [
        (name, model.module_name, model.class_name)
        for name, model in found
        if isinstance(model, registry._LazyRegisteredModel)
    ]
