"""What each layer's memory and experts did, asked of the workers of a running engine."""

from collections.abc import Callable
from typing import Any

from torch import nn
from vllm.config import VllmConfig

from pacellm_vllm.memory.batch import BatchSettings
from pacellm_vllm.memory.layer import memory_layers
from pacellm_vllm.serving.recorder import BankRecording

REPORT_METHOD = "pacellm_memory_report"
ANSWER_METHOD = "pacellm_answer_report"
ANSWER_EXPERTS_METHOD = "pacellm_answer_experts"
SUMMARIES_METHOD = "pacellm_answer_summaries"
EXPERTS_METHOD = "pacellm_experts_report"

_ADDED = {"high", "mid", "low", "commits"}
_ADDED |= {"merged", "filled", "replaced", "dropped"}


class MemoryReport(BankRecording):
    """A vLLM worker extension (``--worker-extension-cls``): a few methods more on every worker."""

    vllm_config: VllmConfig
    get_model: Callable[[], nn.Module]

    def pacellm_memory_report(self) -> dict[int, dict[str, Any]]:
        """By layer index: preset, site, bank size and ``MemoryCounts`` since the engine started."""
        return {
            layer.index: {
                "preset": layer.config.preset,
                "site": layer.config.site,
                "bank_size": layer.config.bank_size,
                **layer.counts.as_dict(),
            }
            for layer in memory_layers(self.vllm_config)
        }

    def pacellm_answer_report(
        self, request_id: str, first: int = 0
    ) -> dict[int, dict[str, Any]] | None:
        """``Journal.report`` of a request that asked for one; None where there is none."""
        return BatchSettings.of_engine(self.vllm_config).journal.report(request_id, first)

    def pacellm_answer_experts(self, request_id: str, layer: int) -> dict[str, Any] | None:
        """``Journal.experts`` of a request that asked for a report; None where there is none."""
        return BatchSettings.of_engine(self.vllm_config).journal.experts(request_id, layer)

    def pacellm_answer_summaries(
        self, request_ids: list[str]
    ) -> dict[str, dict[int, dict[str, Any]]]:
        """``Journal.summary`` of each of these requests that has one."""
        journal = BatchSettings.of_engine(self.vllm_config).journal
        found = ((request_id, journal.summary(request_id)) for request_id in request_ids)
        return {request_id: summary for request_id, summary in found if summary is not None}

    def pacellm_experts_report(self) -> dict[int, dict[str, Any]]:
        """By layer index: ``ModelExperts.report`` since the engine started; empty without any."""
        experts = getattr(self.get_model(), "_pace_experts", None)
        return experts.report() if experts else {}


def merge_reports(reports: list[dict[int, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """One engine's report from its workers'.

    Tensor parallel ranks decide alike, so any one's counts do; pipeline stages have other layers.
    """
    merged: dict[int, dict[str, Any]] = {}
    for report in reports:
        merged.update({int(layer): counts for layer, counts in report.items()})
    return {str(layer): merged[layer] for layer in sorted(merged)}


def add_layers(reports: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """One memory report from those of data parallel engines: what they counted together.

    Of ``slots_last`` and ``slots_peak`` the most; of what is configured the first, as all agree.
    """
    total = {layer: dict(counts) for layer, counts in reports[0].items()}
    for report in reports[1:]:
        for layer, counts in report.items():
            mine = total[layer]
            for name in mine.keys() & _ADDED:
                mine[name] += counts[name]
            if "similarity" in mine:
                pairs = zip(mine["similarity"], counts["similarity"], strict=True)
                mine["similarity"] = [one + other for one, other in pairs]
            for name in ("slots_last", "slots_peak"):
                mine[name] = max(mine[name], counts[name])
    return total


def add_experts(reports: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The same of experts; of ``share`` the mean over tokens."""
    total = {layer: dict(counts) for layer, counts in reports[0].items()}
    for report in reports[1:]:
        for layer, counts in report.items():
            mine = total[layer]
            if counts["tokens"]:
                computed = mine["tokens"] * (mine["share"] or 0)
                mine["tokens"] += counts["tokens"]
                mine["share"] = (computed + counts["tokens"] * counts["share"]) / mine["tokens"]
    return total


def add_pools(pools: list[dict[str, int]]) -> dict[str, int]:
    """What data parallel engines' ``PoolCounts`` come to together."""
    return {name: sum(pool[name] for pool in pools) for name in pools[0]}
