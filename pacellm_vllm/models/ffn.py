"""The FFNs of vLLM's decoders: where they hang, what they are made of, memory inside them."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear

from pacellm_vllm.config import PaceConfigError
from pacellm_vllm.memory.layer import PaceMemory
from pacellm_vllm.models.layers import DecoderLayer

# The projections of an FFN, and what its activation may be called. A gated FFN has gate and up in
# one projection, and an activation that joins them.
_PROJECTIONS = (
    ("gate_up_proj", "down_proj"),
    ("gate_up_proj", "c_proj"),
    ("gate_up_proj", "w2"),
    ("up_proj", "down_proj"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("c_fc", "c_proj"),
    ("fc_in", "fc_out"),
    ("fc1", "fc2"),
    ("w13", "w2"),
    ("input_linear", "output_linear"),
)
_ACTIVATIONS = ("act_fn", "act", "activation_fn", "activation_func", "gelu_impl")


@dataclass(frozen=True)
class FeedForward:
    """The FFN of one decoder layer: ``output(activation(input(x)))``, parts of ``module``.

    ``name`` is where ``module`` hangs in the model. Parts are looked up at every use, because
    LoRA puts others in their place.
    """

    name: str
    module: Any
    input_name: str
    activation_name: str
    output_name: str

    @property
    def input(self) -> Any:
        return getattr(self.module, self.input_name)

    @property
    def activation(self) -> Any:
        return getattr(self.module, self.activation_name)

    @property
    def output(self) -> Any:
        return getattr(self.module, self.output_name)

    @property
    def width(self) -> int:
        """How many activations a token has on this rank."""
        output = self.output
        return getattr(output, "input_size_per_partition", None) or output.input_size

    @property
    def gated(self) -> bool:
        """Whether ``input`` gives gate over up, which ``activation`` joins."""
        return bool(self.input.output_size == 2 * self.output.input_size)


def find_feed_forward(layer: DecoderLayer) -> FeedForward:
    """The one dense FFN of ``layer``.

    Raises ``PaceConfigError`` when there is none, several, or one whose activations no module
    returns whole.
    """
    found, seen = [], []
    # OPT has its FFN in the layer itself.
    if names := _parts(layer.module, whole=True):
        found.append(FeedForward(layer.name, layer.module, *names))
    for name, part in layer.module.named_children():
        names = _parts(part, whole=False)
        if names:
            found.append(FeedForward(f"{layer.name}.{name}", part, *names))
        elif any(isinstance(child, LinearBase) for child in part.children()):
            seen.append(f"{name} of {', '.join(sorted(dict(part.named_children())))}")
    if len(found) != 1:
        what = f"{len(found)} FFNs" if found else f"no FFN that fits ({'; '.join(seen) or 'none'})"
        known = ", ".join("/".join(names) for names in _PROJECTIONS)
        raise PaceConfigError(
            f"pacellm: layer {layer.index} has {what}; to remember activations it must have one of "
            f"{known} with one activation module between them: set site to output, or choose other "
            "layers."
        )
    _check_alone(layer, found[0])
    _check_activation(found[0])
    return found[0]


def output_projection(module: nn.Module) -> Any:
    """The output projection of ``module``, which is an FFN, whatever was attached to it."""
    [name] = [b for a, b in _PROJECTIONS if hasattr(module, a) and hasattr(module, b)]
    return getattr(module, name)


def _parts(module: nn.Module, whole: bool) -> tuple[str, str, str] | None:
    """The names of an FFN's input, activation and output in ``module``, if it is one.

    In a ``whole`` decoder layer there may be other parts that are no projections.
    """
    children = {
        name: child
        for name, child in module.named_children()
        if not isinstance(child, nn.Dropout | nn.Identity)
    }
    linear = {name for name, child in children.items() if isinstance(child, LinearBase)}
    activations = [name for name in _ACTIVATIONS if name in children]
    for input_name, output_name in _PROJECTIONS:
        fits = linear == {input_name, output_name} and len(activations) == 1
        if fits and (whole or len(children) == 3):
            return input_name, activations[0], output_name
    return None


def _check_alone(layer: DecoderLayer, ffn: FeedForward) -> None:
    """Refuse an FFN that is one of several whose results the layer adds up."""
    others = [
        name
        for name, part in layer.parts().items()
        if part is not ffn.module and any(parameter.ndim > 1 for parameter in part.parameters())
    ]
    if others and ffn.module is not layer.module:
        raise PaceConfigError(
            f"pacellm: layer {layer.index} has {', '.join(others)} beside {ffn.name}, so its FFN "
            "is more than what activations could be remembered of; choose other layers, or serve "
            "the model without pacellm."
        )


def _check_activation(ffn: FeedForward) -> None:
    """Refuse an FFN that multiplies gate and up outside of its activation.

    What the output projection reads is then nothing that the activation returns.
    """
    ranks = ffn.output.input_size // ffn.width
    probe = torch.zeros(1, ffn.input.output_size // ranks)
    if ffn.activation(probe).shape[-1] != ffn.width:
        raise PaceConfigError(
            f"pacellm: {ffn.name} ({type(ffn.module).__name__}) multiplies gate and up outside of "
            "its activation, so there is none to remember; set site to output."
        )


class PaceActivation:
    """Mixin: an activation module whose result passes through ``memory``.

    The FFN around it, whatever else it does, stays the base class's; and since its type is no
    longer vLLM's, no fused kernel of vLLM's takes its place
    (``model_executor/layers/fusion/fused_act_quant.py`` looks the exact type up).
    """

    memory: PaceMemory

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a: torch.Tensor = super().forward(x)  # type: ignore[misc]
        return self.memory(a)


def remember(ffn: FeedForward, memory: PaceMemory) -> None:
    """Make what the activation of ``ffn`` returns pass through ``memory``."""
    # vLLM hands one activation module to many layers. The copy shares parameters with it.
    act = copy.copy(ffn.activation)
    act._modules = dict(act._modules)
    base = type(act)
    act.__class__ = type(f"Pace{base.__name__}", (PaceActivation, base), {})
    act.memory = memory
    setattr(ffn.module, ffn.activation_name, act)


def check_shared_out(ffn: FeedForward, ranks: int) -> None:
    """Refuse an FFN that every one of several tensor parallel ranks holds whole."""
    if ranks > 1 and not isinstance(ffn.output, RowParallelLinear):
        raise PaceConfigError(
            f"pacellm: {ffn.name} is not shared out among tensor parallel ranks, which memory "
            "of activations counts on; set site to output, or --tensor-parallel-size to 1."
        )
