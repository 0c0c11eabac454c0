"""Where an engine's PaceConfig is read from."""

from typing import Any

from vllm.config import VllmConfig

from pacellm_vllm.config import CONFIG_KEY, PaceConfig


def additional_settings(vllm_config: VllmConfig) -> Any:
    """What ``--additional-config`` holds for us, None if nothing."""
    additional = vllm_config.additional_config
    return additional.get(CONFIG_KEY) if isinstance(additional, dict) else None


def read_config(vllm_config: VllmConfig) -> PaceConfig:
    """The engine's PaceConfig: checkpoint config.json, then ``--additional-config``."""
    checkpoint = getattr(vllm_config.model_config.hf_config, CONFIG_KEY, None)
    return PaceConfig.from_sources(checkpoint, additional_settings(vllm_config))
