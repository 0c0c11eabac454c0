"""pacify: the subclass of a vLLM decoder whose chosen FFNs carry memory, experts or both."""

import re
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import RowParallelLinear

from pacellm_vllm.config import PaceConfig, PaceConfigError
from pacellm_vllm.memory.layer import PaceMemory
from pacellm_vllm.memory.stage import StageWithoutMemory
from pacellm_vllm.models.experts import ModelExperts, RoutedExperts
from pacellm_vllm.models.settings import read_config

# What an FFN is made of, gated and plain.
_GATED = ("gate_up_proj", "act_fn", "down_proj")
_PLAIN = ("up_proj", "act_fn", "down_proj")
_FFN_NAME = re.compile(r"(?:^|\.)layers\.(\d+)\.mlp$")


class PaceMLPMixin:
    """The FFN ``down(memory(act(gate(x)) * up(x)))``; everything else is the base class's.

    Without ``memory`` it is left out of that; with ``experts`` each token computes some of them.
    """

    gate_up_proj: nn.Module
    act_fn: nn.Module
    down_proj: nn.Module
    memory: PaceMemory | None
    experts: RoutedExperts | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.experts is not None and self.memory is None:
            return self.experts.output(self, x)
        if self.experts is not None:
            a = self.experts.activations(self, x)
        else:
            gate_up, _ = self.gate_up_proj(x)
            a = self.act_fn(gate_up)
        out, _ = self.down_proj(a if self.memory is None else self.memory(a))
        return out


class PacePlainMLPMixin:
    """The FFN ``down(memory(act(up(x))))``; everything else is the base class's."""

    up_proj: nn.Module
    act_fn: nn.Module
    down_proj: nn.Module
    memory: PaceMemory

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, _ = self.up_proj(x)
        out, _ = self.down_proj(self.memory(self.act_fn(up)))
        return out


def prepare(mlp: Any, name: str, experts: bool) -> None:
    """Make ``mlp``, the FFN at ``name`` in its model, one that can carry memory and experts.

    Raises ``PaceConfigError`` when it is neither a gated nor, without ``experts``, a plain FFN.
    """
    children = {child for child, _ in mlp.named_children()}
    mixins = (
        {_GATED: PaceMLPMixin} if experts else {_GATED: PaceMLPMixin, _PLAIN: PacePlainMLPMixin}
    )
    fitting = [mixin for parts, mixin in mixins.items() if children == set(parts)]
    if not fitting:
        allowed = " or ".join(", ".join(parts) for parts in mixins)
        raise PaceConfigError(
            f"pacellm: {name} ({type(mlp).__name__}) is not an FFN for "
            f"{'experts' if experts else 'memory'} (it has "
            f"{', '.join(sorted(children)) or 'no parts'}; it must have {allowed}); choose other "
            "layers or serve the model without pacellm."
        )
    base = type(mlp)
    mlp.__class__ = type(f"Pace{base.__name__}", (fitting[0], base), {})
    mlp.memory, mlp.experts = None, None


def attach(mlp: nn.Module, config: PaceConfig, index: int, name: str) -> None:
    """Give the prepared ``mlp`` of layer ``index``, at ``name`` in its model, a memory."""
    down_proj = mlp.down_proj
    assert isinstance(down_proj, RowParallelLinear), type(down_proj)
    width = down_proj.input_size_per_partition
    mlp.memory = PaceMemory(config, index, width, prefix=f"{name}.memory")


def pacify(base: Any, name: str) -> type[nn.Module]:
    """Subclass a vLLM decoder so that the configured layers' FFNs carry memory and experts.

    Weight names, loaders, quantisation, LoRA and sharding stay those of ``base``.
    """

    def __init__(self: Any, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        base.__init__(self, vllm_config=vllm_config, prefix=prefix)
        config = read_config(vllm_config)
        total = vllm_config.model_config.get_total_num_hidden_layers()
        layers = config.resolve_layers(total)
        experts = ModelExperts(vllm_config, config.experts) if config.experts else None
        with_experts = experts.plan.layers if experts else ()
        ffns = [
            (path, int(found[1]), module)
            for path, module in self.named_modules()
            if (found := _FFN_NAME.search(path))
        ]
        for path, index, module in ffns:
            if index not in layers and index not in with_experts:
                continue
            name = f"{prefix}.{path}" if prefix else path
            prepare(module, name, index in with_experts)
            if index in layers:
                attach(module, config, index, name)
            if experts:
                experts.attach(module, index)
        if layers and ffns and not any(index in layers for _, index, _ in ffns):
            path, _, module = ffns[0]
            name = f"{prefix}.{path}" if prefix else path
            width = cast(Any, module).down_proj.input_size_per_partition
            StageWithoutMemory(vllm_config, config, width, f"{name}.stage")
        self._pace_experts = experts

    def load_weights(self: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        experts = self._pace_experts
        return base.load_weights(self, experts.reorder(weights) if experts else weights)

    body: dict[str, Any] = {
        "__init__": __init__,
        "load_weights": load_weights,
        "__module__": "pacellm_vllm.models",
    }
    return type(name, (base,), body)
