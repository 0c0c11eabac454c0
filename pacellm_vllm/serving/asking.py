"""What every engine behind one API server says of its memory and experts, and of one answer."""

from dataclasses import dataclass
from typing import Any

from vllm.engine.protocol import EngineClient

from pacellm_vllm.compat import ask_all_cores, ask_all_engines, engine_ranks
from pacellm_vllm.memory.manager import POOL_METHOD
from pacellm_vllm.models.checks import carries_memory
from pacellm_vllm.request import ids_of
from pacellm_vllm.serving.report import (
    ANSWER_EXPERTS_METHOD,
    ANSWER_METHOD,
    EXPERTS_METHOD,
    REPORT_METHOD,
    merge_reports,
)


@dataclass(frozen=True)
class EngineReport:
    """One engine's counts since it started: by layer index, of memory and of experts.

    ``pool`` is ``PoolCounts`` as a dictionary, empty where there is no memory.
    """

    rank: int
    layers: dict[str, dict[str, Any]]
    experts: dict[str, dict[str, Any]]
    pool: dict[str, int]


async def ask_engines(client: EngineClient) -> list[EngineReport]:
    """By rank. The engines must be of ours, their workers with our extension."""
    layers, experts = [
        [merge_reports(each) for each in await ask_all_engines(client, method)]
        for method in (REPORT_METHOD, EXPERTS_METHOD)
    ]
    carries = carries_memory(client.vllm_config)
    pools = await ask_all_cores(client, POOL_METHOD) if carries else [{}] * len(layers)
    ranks = engine_ranks(client)
    return [EngineReport(*each) for each in zip(ranks, layers, experts, pools, strict=True)]


async def ask_answer(
    client: EngineClient, answer_id: str, first: int
) -> dict[str, dict[str, Any]] | None:
    """``Journal.report`` by layer index of the answer that a client knows as ``answer_id``.

    None where no engine knows of it.
    """
    known = await _ask_of(client, answer_id, ANSWER_METHOD, first)
    return merge_reports(known) if known else None


async def ask_experts(client: EngineClient, answer_id: str, layer: int) -> dict[str, Any] | None:
    """``Journal.experts`` of the same; tensor parallel ranks choose alike."""
    known = await _ask_of(client, answer_id, ANSWER_EXPERTS_METHOD, layer)
    return known[0] if known else None


async def _ask_of(client: EngineClient, answer_id: str, method: str, *args: Any) -> list[Any]:
    """What the workers of one engine say that knows of the answer; empty where none does."""
    for request_id in ids_of(answer_id):
        for workers in await ask_all_engines(client, method, request_id, *args):
            known = [found for found in workers if found is not None]
            if known:
                return known
    return []
