"""MetricsMiddleware: the memory's metrics beside vLLM's own, in one ``/metrics``."""

from collections.abc import Iterable
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from prometheus_client import CollectorRegistry, make_asgi_app
from prometheus_client.core import Metric
from starlette.types import ASGIApp, Receive, Scope, Send

from pacellm_vllm.compat import metrics_registry

if TYPE_CHECKING:
    from pacellm_vllm.serving.metrics import Scrapes


class MetricsMiddleware:
    """Answers ``/metrics`` of a server with memory; leaves everything else alone.

    vLLM's multiprocess mode does not matter to ours: they come from the engines, not from the
    process that happens to answer, so every API server says the same.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scrapes: Scrapes | None = None
        # Behind a proxy both may begin with the path that the server is mounted under.
        path = scope.get("path", "").removeprefix(scope.get("root_path", "")).rstrip("/")
        if scope["type"] == "http" and path == "/metrics":
            scrapes = scope["app"].state.pacellm.scrapes
        if scrapes is None:
            await self._app(scope, receive, send)
            return
        ours = await scrapes.metrics()
        # Where names are asked for, a registry must know which collector has which.
        named = "name[]" in parse_qs(scope["query_string"].decode("latin-1"))
        registry = CollectorRegistry(auto_describe=named)
        registry.register(metrics_registry())
        registry.register(_Found(ours))
        await make_asgi_app(registry)(scope, receive, send)


class _Found:
    """A collector of metrics that are there."""

    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics
