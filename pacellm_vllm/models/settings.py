"""Where an engine's PaceConfig is read from."""

from pathlib import Path
from typing import Any

from vllm.config import VllmConfig

from pacellm_vllm.config import CONFIG_KEY, PaceConfig


def additional_settings(vllm_config: VllmConfig) -> Any:
    """What ``--additional-config`` holds for us, None if nothing."""
    additional = vllm_config.additional_config
    return additional.get(CONFIG_KEY) if isinstance(additional, dict) else None


def beside_checkpoint(settings: Any, model: str) -> Any:
    """``settings`` of the config.json of ``model``, from which their ``experts.path`` counts."""
    experts = settings.get("experts") if isinstance(settings, dict) else None
    path = experts.get("path") if isinstance(experts, dict) else None
    if not isinstance(experts, dict) or not isinstance(path, str):
        return settings
    # A hub name has no files to count from; what is stored beside its weights is found by name.
    found = str(Path(model, path)) if Path(model).is_dir() or path != "." else model
    return {**settings, "experts": {**experts, "path": found}}


def read_config(vllm_config: VllmConfig) -> PaceConfig:
    """The engine's PaceConfig: checkpoint config.json, then ``--additional-config``."""
    model = vllm_config.model_config
    checkpoint = beside_checkpoint(getattr(model.hf_config, CONFIG_KEY, None), model.model)
    return PaceConfig.from_sources(checkpoint, additional_settings(vllm_config))


def as_json(config: PaceConfig, num_layers: int) -> dict[str, Any]:
    """All of ``config`` as JSON, its layers by index, for a model of ``num_layers``.

    But for ``experts.path``: clients have no business with a server's directories, and the same
    one may go by several names.
    """
    layers = list(config.resolve_layers(num_layers))
    return {**config.model_dump(mode="json", exclude={"experts": {"path"}}), "layers": layers}
