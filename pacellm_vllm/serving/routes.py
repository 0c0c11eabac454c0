"""``GET /plugins/pacellm/memory``: what the memory, and experts, did, as JSON; and ``/metrics``.

vLLM loads it when VLLM_PLUGINS names ``pacellm_http`` (``pacellm serve`` does so).
"""

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI, HTTPException, Request
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient

from pacellm_vllm.compat import api_key_check
from pacellm_vllm.models.table import is_pace
from pacellm_vllm.sentences import shown
from pacellm_vllm.serving import MEMORY_ROUTE, viewer
from pacellm_vllm.serving.middleware import MetricsMiddleware

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from pacellm_vllm.serving.metrics import Scrapes

ANSWER_ROUTE = "/plugins/pacellm/answers/{answer_id}"

router = APIRouter()

_REFUSALS: dict[int | str, dict[str, Any]] = {
    401: {"description": "The server has an API key, and the request does not carry it."},
    501: {"description": "The server's workers cannot report."},
    503: {"description": "The server has no engine."},
}


@router.get(MEMORY_ROUTE, responses=_REFUSALS)
async def memory(request: Request) -> dict[str, Any]:
    """``{"active": bool, "config": {...}, "engine": {...}, "layers": ..., "experts": ..., "pool":
    ..., "sessions": ...}``.

    ``config`` is None without memory, experts or sessions; ``layers`` and ``experts`` are counts by
    layer, ``pool`` is ``PoolCounts``, of all engines together, and ``sessions`` ``StoreCounts`` of
    this server. 401 without the server's API key.
    """
    engine = _engine(request)
    # A server without memory, which has this route too, imports nothing of it before it is asked.
    from pacellm_vllm.models.settings import describe_engine
    from pacellm_vllm.serving.asking import ask_engines
    from pacellm_vllm.serving.report import add_experts, add_layers, add_pools
    from pacellm_vllm.sessions.admission import session_counts

    config = engine.vllm_config
    if not is_pace(config):
        counts: dict[str, Any] = {"layers": {}, "experts": {}, "pool": {}, "sessions": {}}
        return {"active": False, **describe_engine(config), **counts}
    _check_reports(config)
    reports = await ask_engines(engine)
    return {
        "active": True,
        **describe_engine(config),
        "layers": add_layers([report.layers for report in reports]),
        "experts": add_experts([report.experts for report in reports]),
        "pool": add_pools([report.pool for report in reports]),
        "sessions": session_counts(engine.input_processor),
    }


@router.get(
    ANSWER_ROUTE,
    responses={**_REFUSALS, 404: {"description": "No answer with this id has a report."}},
)
async def answer(
    request: Request,
    answer_id: str,
    first: int = 0,
    empty: bool = False,
    experts: int | None = None,
) -> dict[str, Any]:
    """What memory did for one request that said ``"pacellm_report": true``, also while it runs.

    ``answer_id`` is the ``id`` of its response; of several prompts in one request the first one's,
    and with ``-1`` behind it the second one's. ``layers`` has ``Journal.report`` by layer, whose
    strongest recalls are of tokens from position ``first`` on. With ``experts``, a layer's index,
    ``experts`` is ``Journal.experts`` of that layer. ``session`` says what a request that named one
    has read of it, whether it asked for a report or not. 404 where there is neither, or with
    ``empty`` no layers.
    """
    engine = _engine(request)
    found, session, more = None, None, {}
    if is_pace(engine.vllm_config):
        from pacellm_vllm.models.checks import carries_memory
        from pacellm_vllm.serving.asking import ask_answer, ask_experts

        _check_reports(engine.vllm_config)
        if carries_memory(engine.vllm_config):
            found = await ask_answer(engine, answer_id, max(first, 0))
            if found and experts is not None:
                more["experts"] = await ask_experts(engine, answer_id, experts)
        from pacellm_vllm.sessions.admission import reading_for

        session = reading_for(engine.input_processor, answer_id)
    if found is None and session is None and not empty:
        raise HTTPException(
            404,
            f"pacellm: there is no report of {shown(answer_id)}; ask for one with vllm_xargs "
            '{"pacellm_report": true}, and read it soon, as the oldest are dropped.',
        )
    return {"id": answer_id, "layers": found or {}, "session": session, **more}


def _engine(request: Request) -> EngineClient:
    """Of the server, for a request that may see it."""
    state = request.app.state.pacellm
    if not viewer.may_look(request):
        raise HTTPException(401, "Unauthorized")
    if state.engine is None:
        raise HTTPException(503, "pacellm: this server has no engine, so no memory to report on.")
    return state.engine


def _check_reports(vllm_config: "VllmConfig") -> None:
    from pacellm_vllm.models.checks import can_report

    if not can_report(vllm_config):
        raise HTTPException(
            501,
            "pacellm: --worker-extension-cls names another extension, so workers cannot report; "
            "drop that flag to see the memory.",
        )


class HttpPlugin:
    """vLLM's ``EndpointPlugin`` (``vllm/plugins/endpoint_plugins/interface.py``)."""

    name = "pacellm_http"
    required_tasks = None

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router)
        app.include_router(viewer.router)
        app.add_middleware(MetricsMiddleware)

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        state.pacellm = Namespace(
            engine=engine_client, authorized=api_key_check(args), scrapes=_scrapes(engine_client)
        )


def _scrapes(client: EngineClient | None) -> "Scrapes | None":
    """None where there is nothing to ask for."""
    if client is None or not is_pace(client.vllm_config):
        return None
    from pacellm_vllm.models.checks import can_report
    from pacellm_vllm.serving.metrics import Scrapes

    return Scrapes(client) if can_report(client.vllm_config) else None


def create_plugin() -> HttpPlugin:
    """The entry point of group ``vllm.endpoint_plugins``."""
    return HttpPlugin()
