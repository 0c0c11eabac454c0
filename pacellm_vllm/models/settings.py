"""Where an engine's PaceConfig is read from, and what is told of it."""

from pathlib import Path
from typing import Any

from vllm.config import VllmConfig

from pacellm_vllm.config import CONFIG_KEY, PaceConfig, PaceConfigError
from pacellm_vllm.models.table import is_pace
from pacellm_vllm.request import is_ours
from pacellm_vllm.sentences import shown


def additional_settings(vllm_config: VllmConfig) -> Any:
    """What ``--additional-config`` holds for us, None if nothing.

    Raises ``PaceConfigError`` for settings that stand beside it, which nothing would read.
    """
    additional = vllm_config.additional_config
    if not isinstance(additional, dict):
        return None
    # Other plugins have keys there, too: one named like a setting is ours where nothing else is.
    ours = set() if CONFIG_KEY in additional else set(PaceConfig.model_fields)
    for key in additional:
        if key in ours or (is_ours(key) and key != CONFIG_KEY):
            raise PaceConfigError(
                f"pacellm: {shown(key)} of --additional-config is read by nobody; write "
                f'{{"{CONFIG_KEY}": {{...}}}} around the settings of an engine.'
            )
    return additional.get(CONFIG_KEY)


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
    return config_with(model.hf_config, model.model, additional_settings(vllm_config))


def config_with(hf_config: Any, model: str, ours: Any) -> PaceConfig:
    """What an engine of ``model`` comes to that is given ``{"pacellm": ours}``."""
    return PaceConfig.from_sources(
        beside_checkpoint(getattr(hf_config, CONFIG_KEY, None), model), ours
    )


def as_json(config: PaceConfig, num_layers: int) -> dict[str, Any]:
    """All of ``config`` as JSON, its layers by index, for a model of ``num_layers``.

    But for ``experts.path``: clients have no business with a server's directories, and the same
    one may go by several names.
    """
    layers = list(config.resolve_layers(num_layers))
    return {**config.model_dump(mode="json", exclude={"experts": {"path"}}), "layers": layers}


def describe_engine(vllm_config: VllmConfig) -> dict[str, Any]:
    """``{"config": ..., "engine": ...}``: all of its PaceConfig (None without ours), and vLLM's.

    Of vLLM's only what can change an answer, or how one was measured.
    """
    model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    layers = model.get_total_num_hidden_layers()
    return {
        "config": as_json(read_config(vllm_config), layers) if is_pace(vllm_config) else None,
        "engine": {
            "dtype": str(model.dtype).removeprefix("torch."),
            "quantization": model.quantization,
            "max_model_len": model.max_model_len,
            "max_num_batched_tokens": scheduler.max_num_batched_tokens,
            "max_num_seqs": scheduler.max_num_seqs,
            "block_size": vllm_config.cache_config.block_size,
            "prefix_caching": vllm_config.cache_config.enable_prefix_caching,
            "tensor_parallel_size": vllm_config.parallel_config.tensor_parallel_size,
        },
    }
