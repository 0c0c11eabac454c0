"""Recording what an engine's memory is given and gives, and holding it to the plain truth."""

import contextlib
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch

from pacellm_vllm.compat import config_of
from pacellm_vllm.memory.backend import BankMetadata
from pacellm_vllm.memory.layer import PaceMemory, memory_layers
from pacellm_vllm.verify.truth import Truth, true_outputs

# Of a row's largest number: rounding, by dtype of activations.
_ROUNDING = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# Decisions this close to a tie may fall either way in the engine's float32.
_TIE = 2e-6


class Recording:
    """What one layer's memory was given and gave, of a request that runs alone: [T, D] each."""

    def __init__(self, layer: PaceMemory) -> None:
        self.layer = layer
        self._given: list[torch.Tensor] = []
        self._gave: list[torch.Tensor] = []
        self._run = layer.run

    def run(self, a: torch.Tensor, out: torch.Tensor, metadata: BankMetadata) -> None:
        self._run(a, out, metadata)
        step = metadata.plain or metadata.device
        assert step is not None
        self._given.append(a[: step.num_tokens].cpu().clone())
        self._gave.append(out[: step.num_tokens].cpu().clone())

    def mistake(self) -> str | None:
        """Where the memory first gave something else than the truth; None where it did not.

        Behind a decision within rounding of a tie nothing is said.
        """
        truth, gave = self._truth, torch.cat(self._gave)
        size = truth.outputs.float().abs().amax(dim=1).clamp_min(1e-6)
        error = (gave.float() - truth.outputs.float()).abs().amax(dim=1) / size
        wrong = (~(error <= _ROUNDING[gave.dtype])).nonzero().flatten()
        if not len(wrong):
            return None
        position = int(wrong[0])
        if (truth.gap[: position + 1] < _TIE).any():
            return None
        step = "prompt" if position < len(self._given[0]) else "decode"
        return (
            f"layer {self.layer.index}, token {position} ({step} step): off by "
            f"{float(error[position]):.1e} of the row's largest number"
        )

    def compared(self) -> int:
        """Tokens before the first decision within rounding of a tie."""
        gap = self._truth.gap
        near = (gap < _TIE).nonzero().flatten()
        return int(near[0]) if len(near) else len(gap)

    @cached_property
    def _truth(self) -> Truth:
        """Once the request has ended."""
        a = torch.cat(self._given)
        return true_outputs(a, self.layer.rules, self.layer.config.stored_dtype(a.dtype))


@contextlib.contextmanager
def recording(llm: Any) -> Iterator[list[Recording]]:
    """Record the next request, which must run alone, in every layer with memory."""
    recordings = [Recording(layer) for layer in memory_layers(config_of(llm))]
    for one in recordings:
        one.layer.run = one.run  # type: ignore[method-assign]
    try:
        yield recordings
    finally:
        for one in recordings:
            del one.layer.run
