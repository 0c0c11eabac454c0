"""ask_engines: what every engine behind one API server says of its memory and experts."""

from dataclasses import dataclass
from typing import Any

from vllm.engine.protocol import EngineClient

from pacellm_vllm.compat import ask_all_cores, ask_all_engines, engine_ranks
from pacellm_vllm.memory.batch import BatchSettings
from pacellm_vllm.memory.manager import POOL_METHOD
from pacellm_vllm.serving.report import EXPERTS_METHOD, REPORT_METHOD, merge_reports


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
    carries = BatchSettings in (client.vllm_config.model_config.logits_processors or ())
    pools = await ask_all_cores(client, POOL_METHOD) if carries else [{}] * len(layers)
    ranks = engine_ranks(client)
    return [EngineReport(*each) for each in zip(ranks, layers, experts, pools, strict=True)]
