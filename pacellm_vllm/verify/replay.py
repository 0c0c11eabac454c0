"""Recording what an engine's memory is given and gives, and holding it to the plain truth."""

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch

from pacellm_vllm.compat import config_of
from pacellm_vllm.memory.backend import BankMetadata, BankMetadataBuilder, lengths_of, rows_of
from pacellm_vllm.memory.layer import PaceMemory, memory_layers
from pacellm_vllm.request import RequestSettings
from pacellm_vllm.verify.truth import Truth, true_outputs

# Of a row's largest number: rounding, by dtype of activations.
_ROUNDING = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# Decisions this close to a tie may fall either way in the engine's float32.
_TIE = 2e-6
# The engine's own may be so low that a wrong bank is less than rounding.
_ALPHA = 0.9


def loud(request: int) -> dict[str, Any]:
    """Settings at which a fault shows, and by which ``Recording`` tells a request from others."""
    return {"pacellm_alpha": _ALPHA - request / 1000}


@dataclass
class Seen:
    """Of one request, in the order it came: rows [n, D] from a position on."""

    positions: list[int] = field(default_factory=list)
    given: list[torch.Tensor] = field(default_factory=list)
    gave: list[torch.Tensor] = field(default_factory=list)

    def whole(self, rows: list[torch.Tensor]) -> torch.Tensor:
        """[T, D]; a position that was computed again is as it was the last time."""
        ends = [at + len(part) for at, part in zip(self.positions, rows, strict=True)]
        found = rows[0].new_full((max(ends), rows[0].shape[1]), torch.nan)
        for begin, end, part in zip(self.positions, ends, rows, strict=True):
            found[begin:end] = part
        return found

    def steps(self) -> torch.Tensor:
        """By position, how many tokens the step had that computed it."""
        return self.whole([torch.full((len(part), 1), float(len(part))) for part in self.given])


class Recording:
    """What one layer's memory was given and gave, by request: those with settings of their own."""

    def __init__(self, layer: PaceMemory) -> None:
        self.layer = layer
        self.spans: list[tuple[RequestSettings | None, int, int, int]] = []
        self._seen: dict[RequestSettings, Seen] = defaultdict(Seen)
        self._run = layer.run

    def run(self, a: torch.Tensor, out: torch.Tensor, metadata: BankMetadata) -> None:
        self._run(a, out, metadata)
        for own, begin, end, position in self.spans:
            if own is not None and begin < end:
                seen = self._seen[own]
                seen.positions.append(position)
                seen.given.append(a[begin:end].cpu().clone())
                seen.gave.append(out[begin:end].cpu().clone())

    def mistake(self) -> str | None:
        """Where the memory first gave something else than the truth; None where it did not.

        Behind a decision within rounding of a tie nothing is said of a request.
        """
        for seen, truth in self._truths:
            gave = seen.whole(seen.gave)
            size = truth.outputs.float().abs().amax(dim=1).clamp_min(1e-6)
            error = (gave.float() - truth.outputs.float()).abs().amax(dim=1) / size
            wrong = (~(error <= _ROUNDING[gave.dtype]) & _sure(truth)).nonzero().flatten()
            if len(wrong):
                position = int(wrong[0])
                step = "decode" if seen.steps()[position] == 1 else "prompt"
                return (
                    f"layer {self.layer.index}, token {position} ({step} step): off by "
                    f"{float(error[position]):.1e} of the row's largest number"
                )
        return None

    def compared(self) -> int:
        """Tokens, of each request those before its first decision within rounding of a tie."""
        return sum(int(_sure(truth).sum()) for _, truth in self._truths)

    @cached_property
    def _truths(self) -> list[tuple[Seen, Truth]]:
        """Once the requests have ended."""
        found = []
        for own, seen in self._seen.items():
            a = seen.whole(seen.given)
            stored = self.layer.config.stored_dtype(a.dtype)
            found.append((seen, true_outputs(a, own.applied_to(self.layer.rules), stored)))
        return found


def _sure(truth: Truth) -> torch.Tensor:
    """[T] bool: the tokens before the first decision within rounding of a tie."""
    return (truth.gap < _TIE).cumsum(0) == 0


@contextlib.contextmanager
def recording(llm: Any) -> Iterator[list[Recording]]:
    """Record requests in every layer with memory, until the end of the context.

    They are told apart by their settings, so no two may have the same at once (``loud``). One that
    reads a prefix from the cache takes it from the last one of its settings.
    """
    recordings = [Recording(layer) for layer in memory_layers(config_of(llm))]
    build = BankMetadataBuilder.build

    def noted(builder: Any, prefix: int, common: Any, *more: Any, **named: Any) -> BankMetadata:
        places = pairwise(common.query_start_loc_cpu[: common.num_reqs + 1].tolist())
        owners = builder.settings_of(rows_of(common))
        lengths = lengths_of(common).tolist()
        spans = [
            (own, begin, end, length - (end - begin))
            for own, (begin, end), length in zip(owners, places, lengths, strict=True)
        ]
        for one in recordings:
            one.spans = spans
        return build(builder, prefix, common, *more, **named)

    for one in recordings:
        one.layer.run = one.run  # type: ignore[method-assign]
    try:
        with patch.object(BankMetadataBuilder, "build", noted):
            yield recordings
    finally:
        for one in recordings:
            del one.layer.run
