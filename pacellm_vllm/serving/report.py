"""What each layer's memory did, asked of the workers of a running engine."""

from typing import Any

from vllm.config import VllmConfig

from pacellm_vllm.memory.layer import PaceMemory

REPORT_METHOD = "pacellm_memory_report"


class MemoryReport:
    """A vLLM worker extension (``--worker-extension-cls``): one method more on every worker."""

    vllm_config: VllmConfig

    def pacellm_memory_report(self) -> dict[int, dict[str, Any]]:
        """By layer index: preset, bank size and ``MemoryCounts`` since the engine started."""
        layers = self.vllm_config.compilation_config.static_forward_context.values()
        return {
            layer.index: {
                "preset": layer.config.preset,
                "bank_size": layer.config.bank_size,
                **layer.counts.as_dict(),
            }
            for layer in layers
            if isinstance(layer, PaceMemory)
        }


def merge_reports(reports: list[dict[int, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """One engine's report from its workers'.

    Tensor parallel ranks decide alike, so any one's counts do; pipeline stages have other layers.
    """
    merged: dict[int, dict[str, Any]] = {}
    for report in reports:
        merged.update({int(layer): counts for layer, counts in report.items()})
    return {str(layer): merged[layer] for layer in sorted(merged)}


def add_engines(reports: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """One report from those of data parallel engines: what they counted together.

    Of ``slots_last`` and ``slots_peak`` the most; of what is configured the first, as all agree.
    """
    total = {layer: dict(counts) for layer, counts in reports[0].items()}
    for report in reports[1:]:
        for layer, counts in report.items():
            mine = total[layer]
            for name in ("high", "mid", "low", "commits"):
                mine[name] += counts[name]
            for name in ("slots_last", "slots_peak"):
                mine[name] = max(mine[name], counts[name])
    return total
