"""A server, and what it asks of the engines behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm import envs

if TYPE_CHECKING:
    from argparse import Namespace

    from prometheus_client import CollectorRegistry
    from starlette.datastructures import Headers
    from vllm.engine.protocol import EngineClient
    from vllm.v1.engine.core import EngineCore


def add_engine_method(name: str, method: Callable[[EngineCore], Any]) -> None:
    """Let front ends ask for ``method(engine_core)`` by ``name``, with :func:`ask_all_cores`.

    Symptom: vLLM lets plugins ask workers, and not the scheduler, which alone knows who holds which
    blocks.
    Can go when a plugin can register something to be asked of the engine core.
    """
    from vllm.v1.engine.core import EngineCore

    setattr(EngineCore, name, method)


async def ask_all_cores(client: EngineClient, name: str) -> list[Any]:
    """What the method that :func:`add_engine_method` added returns, of every engine by rank.

    Symptom and end: those of :func:`add_engine_method`.
    """
    core: Any = client.engine_core  # type: ignore[attr-defined]
    ask = getattr(core, "call_utility_all_async", None)
    return await ask(name) if ask else [await core.call_utility_async(name)]


def engine_ranks(client: EngineClient) -> list[int]:
    """The ranks of the engines that :func:`ask_all_engines` and :func:`ask_all_cores` ask.

    Symptom: behind one server of several, ranks do not begin with 0, and only vLLM's client knows.
    Can go when what all engines answer is keyed by rank.
    """
    return list(client.engine_core.engine_ranks_managed)  # type: ignore[attr-defined]


async def ask_all_engines(client: EngineClient, method: str, *args: Any) -> list[list[Any]]:
    """What ``method(*args)`` returns on every worker of every engine that ``client`` speaks to.

    Symptom: with data parallel engines, ``EngineClient.collective_rpc`` calls all of them and
    returns the first one's answers.
    Can go when it returns all.
    """
    ask = getattr(getattr(client, "engine_core", None), "call_utility_all_async", None)
    if ask is None:
        return [await client.collective_rpc(method, args=args)]
    return await ask("collective_rpc", method, None, args, None)


def metrics_registry() -> CollectorRegistry:
    """What vLLM's own ``/metrics`` shows, of all processes of the server.

    Symptom: plugins cannot add metrics that are asked for when they are read, so ``/metrics`` is
    answered by us, with vLLM's own beside.
    Can go when they can.
    """
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    return get_prometheus_registry()


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
