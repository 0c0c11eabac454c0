"""``GET /plugins/pacellm/memory``: what the memory, and experts, did, as JSON.

vLLM loads it when VLLM_PLUGINS names ``pacellm_http`` (``pacellm serve`` does so).
"""

from argparse import Namespace
from typing import Any

from fastapi import APIRouter, FastAPI, HTTPException, Request
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient

from pacellm_vllm.compat import api_key_check, ask_all_engines
from pacellm_vllm.models.table import ARCHITECTURES

MEMORY_ROUTE = "/plugins/pacellm/memory"

router = APIRouter()

_REFUSALS: dict[int | str, dict[str, Any]] = {
    401: {"description": "The server has an API key, and the request does not carry it."},
    501: {"description": "The server's workers cannot report."},
    503: {"description": "The server has no engine."},
}


@router.get(MEMORY_ROUTE, responses=_REFUSALS)
async def memory(request: Request) -> dict[str, Any]:
    """``{"active": bool, "config": {...}, "engine": {...}, "layers": ..., "experts": ...}``.

    ``config`` is None without memory or experts; the last two are counts by layer. 401 without the
    server's API key.
    """
    state = request.app.state.pacellm
    if not state.authorized(request.headers):
        raise HTTPException(401, "Unauthorized")
    if state.engine is None:
        raise HTTPException(503, "pacellm: this server has no engine, so no memory to report on.")
    # A server without memory, which has this route too, imports nothing of it before it is asked.
    from pacellm_vllm.models.checks import REPORT_EXTENSION
    from pacellm_vllm.serving.report import (
        EXPERTS_METHOD,
        REPORT_METHOD,
        add_engines,
        describe_engine,
        merge_reports,
    )

    config = state.engine.vllm_config
    if config.model_config.architecture not in ARCHITECTURES:
        return {"active": False, **describe_engine(config), "layers": {}, "experts": {}}
    if config.parallel_config.worker_extension_cls != REPORT_EXTENSION:
        raise HTTPException(
            501,
            "pacellm: --worker-extension-cls names another extension, so workers cannot report; "
            "drop that flag to see the memory.",
        )
    layers, experts = [
        add_engines([merge_reports(each) for each in await ask_all_engines(state.engine, method)])
        for method in (REPORT_METHOD, EXPERTS_METHOD)
    ]
    return {"active": True, **describe_engine(config), "layers": layers, "experts": experts}


class HttpPlugin:
    """vLLM's ``EndpointPlugin`` (``vllm/plugins/endpoint_plugins/interface.py``)."""

    name = "pacellm_http"
    required_tasks = None

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router)

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        state.pacellm = Namespace(engine=engine_client, authorized=api_key_check(args))


def create_plugin() -> HttpPlugin:
    """The entry point of group ``vllm.endpoint_plugins``."""
    return HttpPlugin()
