"""Everything that leans on vLLM internals: each with its symptom and when it can go.

``tests/test_compat.py`` has one test per entry that tells when vLLM moved.
"""

import logging
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers
from vllm import envs
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

ConfigHook = Callable[[VllmConfig], None]


def register_kv_cache_spec(spec: type, manager: type) -> None:
    """Register a KV cache spec of ours with its manager.

    Symptom: registering into an empty registry leaves vLLM's own specs unregistered in that
    process, because ``_ensure_registered`` returns early when it finds any entry.
    Can go when ``KVCacheSpecRegistry.register`` registers the built-in specs first.
    """
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(spec, manager, uniform_type_base_spec=spec)


def add_config_hook(architecture: str, hook: ConfigHook) -> None:
    """Run ``hook(vllm_config)`` when an engine for ``architecture`` is configured.

    The architecture's own hook, if any, runs first. Idempotent per architecture and hook.
    Symptom: vLLM has no public place where a plugin may check the finished configuration;
    ``MODELS_CONFIG_MAP`` is what its own models use. Can go when there is one.
    """
    base = MODELS_CONFIG_MAP.get(architecture, VerifyAndUpdateConfig)
    if getattr(base, "_pacellm_hook", None) is hook:
        return

    class HookedConfig(base):  # type: ignore[valid-type, misc]
        _pacellm_hook = staticmethod(hook)

        @staticmethod
        def verify_and_update_config(vllm_config: VllmConfig) -> None:
            base.verify_and_update_config(vllm_config)
            hook(vllm_config)

    MODELS_CONFIG_MAP[architecture] = HookedConfig


def add_splitting_op(vllm_config: VllmConfig, op_name: str) -> None:
    """Keep ``torch.ops.vllm.<op_name>`` out of compiled and captured graphs.

    Symptom: the op reads this step's metadata on the host, which a graph would freeze.
    vLLM's own state-carrying layers add themselves to the same list. Can go when custom ops can
    be declared splitting where they are registered.
    """
    name = f"vllm::{op_name}"
    ops = vllm_config.compilation_config.splitting_ops
    if ops is not None and name not in ops:
        ops.append(name)


def eager_in_graphs(function: Callable[..., None]) -> Callable[..., None]:
    """Run the body of a custom op eagerly during breakable CUDA graph capture.

    Symptom: as for ``add_splitting_op``, under VLLM_USE_BREAKABLE_CUDAGRAPH=1.
    """
    return eager_break_during_capture(function)


def register_custom_op(name: str, function: Callable[..., None], mutates: list[str]) -> None:
    """Register ``torch.ops.vllm.<name>``, which returns nothing and writes to ``mutates``."""

    def fake(*args: Any, **kwargs: Any) -> None:
        return None

    direct_register_custom_op(op_name=name, op_func=function, mutates_args=mutates, fake_impl=fake)


def plugin_logger() -> logging.Logger:
    """The logger of this plugin.

    Symptom: vLLM configures handlers for loggers below ``vllm`` only, so a logger named after our
    own package prints nothing. Can go when plugins' loggers are configured too.
    """
    return init_logger("vllm.plugins.pacellm")


def add_worker_extension(vllm_config: VllmConfig, name: str) -> None:
    """Give every worker the methods of class ``name``, unless the user named an extension.

    Symptom: vLLM has one slot for worker extensions and no way to add a second.
    Can go when there can be several.
    """
    if not vllm_config.parallel_config.worker_extension_cls:
        vllm_config.parallel_config.worker_extension_cls = name


def api_key_check(args: Namespace) -> Callable[[Headers], bool]:
    """Whether a request's headers carry one of the server's API keys; always, if it has none.

    Symptom: vLLM's own middleware guards its ``/v1`` routes and not those of plugins.
    Can go when it guards those too.
    """
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    keys = [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]
    if not keys:
        return lambda headers: True
    return AuthenticationMiddleware(None, keys).verify_token  # type: ignore[arg-type]
