"""What each layer's memory did, asked of the workers of a running engine."""

from typing import Any

import torch
from vllm.config import VllmConfig

from pacellm_vllm.memory.layer import PaceMemory
from pacellm_vllm.serving.recorder import BankRecorder, decode

REPORT_METHOD = "pacellm_memory_report"
RECORD_METHOD = "pacellm_memory_record"
RECORDED_METHOD = "pacellm_memory_recorded"


class MemoryReport:
    """A vLLM worker extension (``--worker-extension-cls``): more methods on every worker.

    What they return is plain numbers, lists and bytes, which any vLLM executor can carry.
    """

    vllm_config: VllmConfig

    def pacellm_memory_report(self) -> dict[int, dict[str, Any]]:
        """By layer index: preset, bank size and ``MemoryCounts`` since the engine started."""
        return {
            layer.index: {
                "preset": layer.config.preset,
                "bank_size": layer.config.bank_size,
                **layer.counts.as_dict(),
            }
            for layer in self._pacellm_layers()
        }

    def pacellm_memory_record(self) -> None:
        """Record the next request, which must run alone: see ``BankRecorder``."""
        self._pacellm_recorders = [BankRecorder(layer) for layer in self._pacellm_layers()]

    @torch.inference_mode()
    def pacellm_memory_recorded(self, words: int) -> dict[int, dict[str, Any]]:
        """Stop recording. By layer index: ``width``, the ``commits``, and fp32 bytes of ``keys``
        [slots, width] and of ``current`` [tokens, width], each with the ids of the ``words``
        tokens that every row speaks for.
        """
        model = self.get_model()  # type: ignore[attr-defined]
        recorded = {}
        for recorder in self._pacellm_recorders:
            recorder.remove()
            found = {"width": recorder.layer.width, "commits": recorder.commits}
            for name, rows in (("keys", recorder.keys), ("current", recorder.current)):
                found[name] = rows.contiguous().numpy().tobytes()
                found[f"{name}_words"] = decode(model, recorder.layer, rows, words)
            recorded[recorder.layer.index] = found
        self._pacellm_recorders = []
        return recorded

    def _pacellm_layers(self) -> list[PaceMemory]:
        layers = self.vllm_config.compilation_config.static_forward_context.values()
        return [layer for layer in layers if isinstance(layer, PaceMemory)]


def merge_reports(reports: list[dict[int, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """One report from all workers'. Tensor parallel ranks decide alike, so any one's counts do."""
    merged: dict[int, dict[str, Any]] = {}
    for report in reports:
        merged.update({int(layer): counts for layer, counts in report.items()})
    return {str(layer): merged[layer] for layer in sorted(merged)}
