"""Whole FFNs of vLLM's decoders, dense or routed, and memory of the states that they return."""

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear

from pacellm_vllm.config import PaceConfigError
from pacellm_vllm.memory.layer import PaceMemory
from pacellm_vllm.models.layers import DecoderLayer

# Granite's layers give both the same states, and add up what they return, in this order.
_SUM = ("block_sparse_moe", "shared_mlp")


@dataclass(frozen=True)
class WholeFfn:
    """The FFN of one decoder layer as the layer calls it: ``module``, which hangs at ``name``.

    Where the layer adds what the part ``added`` makes of the same states, the FFN is the sum.
    """

    name: str
    module: Any
    added: Any = None


def find_whole(layer: DecoderLayer) -> WholeFfn:
    """The one FFN of ``layer``: its only part with weight matrices that is no attention.

    Raises ``PaceConfigError`` when there is none, or several, of which it is not known what the
    layer does with them.
    """
    found = [
        WholeFfn(f"{layer.name}.{name}", part)
        for name, part in layer.parts().items()
        if any(parameter.ndim > 1 for parameter in part.parameters())
    ]
    if tuple(ffn.name.removeprefix(f"{layer.name}.") for ffn in found) == _SUM:
        first, last = found
        return WholeFfn(last.name, last.module, first.module)
    if len(found) != 1:
        names = ", ".join(ffn.name.removeprefix(f"{layer.name}.") for ffn in found)
        raise PaceConfigError(
            f"pacellm: layer {layer.index} has {len(found)} parts beside its attention that could "
            f"be its FFN ({names or 'none'}), where memory of outputs needs one that returns what "
            "the FFN gives; choose other layers, or serve the model without pacellm."
        )
    return found[0]


def check_reduced(whole: WholeFfn, ranks: int) -> None:
    """Refuse a dense FFN that leaves it to its caller to add up what tensor parallel ranks return.

    Others are found out in the first step (``PaceMemory.check_whole``).
    """
    parts = [*whole.module.children()]
    ends = [part for part in parts if isinstance(part, RowParallelLinear)]
    dense = all(isinstance(part, LinearBase) or not [*part.parameters()] for part in parts)
    if ranks > 1 and dense and ends and not any(end.reduce_results for end in ends):
        raise PaceConfigError(
            f"pacellm: {whole.name} returns on each tensor parallel rank a part of its output "
            "only, which memory of outputs cannot compare; set site to activation, or "
            "--tensor-parallel-size to 1."
        )


class PaceWhole:
    """Mixin: a whole FFN whose result passes through ``memory``, whatever happens inside it."""

    memory: PaceMemory
    ffn: Callable[..., Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        returned = self.ffn(*args, **kwargs)
        # A projection's bias that its caller adds comes along, and is mostly None.
        states, *others = returned if isinstance(returned, tuple) else (returned,)
        width = self.memory.width
        if (
            not isinstance(states, torch.Tensor)
            or states.shape[-1] != width
            or any(other is not None for other in others)
        ):
            raise RuntimeError(
                f"pacellm: {self.memory.prefix.removesuffix('.memory')} returns something else "
                f"than one state of width {width} for each token, so memory cannot keep its "
                "outputs; choose other layers, or serve the model without pacellm."
            )
        states = self.memory(states)
        return (states, *others) if isinstance(returned, tuple) else states


class PaceNothing:
    """Mixin: a part that another one computes with its own, so it adds nothing itself."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(states)


def remember_output(whole: WholeFfn, memory: PaceMemory) -> None:
    """Make what ``whole`` returns pass through ``memory``."""
    ffn = _become(PaceWhole, whole.module)
    if whole.added is not None:
        ffn = _sum(_become(PaceNothing, whole.added), ffn)
    whole.module.ffn = ffn
    whole.module.memory = memory


def _become(mixin: type, module: Any) -> Callable[..., Any]:
    """Put ``mixin`` before the class of ``module``; returns the forward that it had."""
    base = type(module)
    # vLLM's Transformers backend gives routed FFNs a forward of their own, which would hide ours.
    own = vars(module).pop("forward", None)
    module.__class__ = type(f"Pace{base.__name__}", (mixin, base), {})
    return own or MethodType(base.forward, module)


def _sum(first: Callable[..., Any], last: Callable[..., Any]) -> Callable[..., Any]:
    # Routed experts may write to what they are given.
    return lambda states: first(states.clone()) + last(states)
