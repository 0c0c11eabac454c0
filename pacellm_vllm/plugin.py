"""What vLLM's entry points call, in every process that loads plugins.

vLLM goes on with whatever it serves: what is imported here is little, what is needed by engines
with memory or experts is imported when one is configured, and an error costs those engines only.
"""

import logging
from typing import TYPE_CHECKING

from pacellm_vllm import CONFIG_KEY

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def register() -> None:
    """Make the ``Pace*`` architectures known, lazily; safe to call again."""
    try:
        _register()
    except Exception as error:
        # A name below vLLM's, whose handlers print it.
        logging.getLogger("vllm.plugins.pacellm").exception(
            "pacellm: the plugin could not be registered (%s: %s), so Pace* architectures are not "
            "served and a pacellm configuration is not looked at; everything else is as without "
            "the plugin.",
            type(error).__name__,
            error,
        )


def _register() -> None:
    from vllm.model_executor.models import ModelRegistry

    from pacellm_vllm.compat import add_config_hook
    from pacellm_vllm.models.table import ARCHITECTURES

    for name, base in ARCHITECTURES.items():
        # The check first: without it there is to be no architecture.
        add_config_hook(name, _check_engine, base.architecture)
        if name not in ModelRegistry.models:
            ModelRegistry.register_model(name, f"pacellm_vllm.models:{name}")
    for name in ModelRegistry.get_supported_archs():
        if name not in ARCHITECTURES:
            add_config_hook(name, _check_not_configured)


def _check_engine(vllm_config: "VllmConfig") -> None:
    from pacellm_vllm.models.checks import carries_memory, check_engine, is_traced

    check_engine(vllm_config)
    if carries_memory(vllm_config) and is_traced(vllm_config):
        # Servers without tracing import nothing of it.
        from pacellm_vllm.serving.tracing import hold_request_spans

        hold_request_spans()


def _check_not_configured(vllm_config: "VllmConfig") -> None:
    from pacellm_vllm.models.table import ARCHITECTURES

    additional, overrides = vllm_config.additional_config, vllm_config.model_config.hf_overrides
    named = overrides.get("architectures") if isinstance(overrides, dict) else None
    asked = next((name for name in named or () if name in ARCHITECTURES), None)
    given = [where for where in (additional, overrides) if isinstance(where, dict)]
    keys = [key for where in given for key, value in where.items() if value is not None]
    if asked or any(str(key).lower().startswith(CONFIG_KEY) for key in keys):
        from pacellm_vllm.models.checks import refuse_configuration

        refuse_configuration(vllm_config, asked)
