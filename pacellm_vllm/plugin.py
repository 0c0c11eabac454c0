"""What vLLM's entry points call, in every process that loads plugins."""


def register() -> None:
    """Make the ``Pace*`` architectures known, lazily; safe to call again."""
    from vllm.model_executor.models import ModelRegistry

    from pacellm_vllm.compat import add_config_hook, load_with_drafts
    from pacellm_vllm.models import checks
    from pacellm_vllm.models.table import ARCHITECTURES

    load_with_drafts({checks.REQUEST_SETTINGS, checks.NO_REQUEST_SETTINGS})
    known = ModelRegistry.get_supported_archs()
    for name in ARCHITECTURES:
        if name not in known:
            ModelRegistry.register_model(name, f"pacellm_vllm.models:{name}")
    for name in ModelRegistry.get_supported_archs():
        if name in ARCHITECTURES:
            add_config_hook(name, checks.check_engine)
        else:
            add_config_hook(name, checks.check_not_configured)
