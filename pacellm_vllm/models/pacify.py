"""pacify: the subclass of a vLLM decoder whose chosen FFNs carry memory."""

import re
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import RowParallelLinear

from pacellm_vllm.config import PaceConfig, PaceConfigError
from pacellm_vllm.memory.layer import PaceMemory
from pacellm_vllm.models.settings import read_config

# What an FFN is made of, gated and plain.
_GATED = ("gate_up_proj", "act_fn", "down_proj")
_PLAIN = ("up_proj", "act_fn", "down_proj")
_FFN_NAME = re.compile(r"(?:^|\.)layers\.(\d+)\.mlp$")


class PaceMLPMixin:
    """The FFN ``down(memory(act(gate(x)) * up(x)))``; everything else is the base class's."""

    gate_up_proj: nn.Module
    act_fn: nn.Module
    down_proj: nn.Module
    memory: PaceMemory

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_up, _ = self.gate_up_proj(x)
        out, _ = self.down_proj(self.memory(self.act_fn(gate_up)))
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


def attach(mlp: nn.Module, config: PaceConfig, index: int, name: str) -> None:
    """Give ``mlp``, the FFN of layer ``index`` at ``name`` in its model, a memory.

    Raises ``PaceConfigError`` when it is neither a gated nor a plain FFN.
    """
    children = {child for child, _ in mlp.named_children()}
    if children not in (set(_GATED), set(_PLAIN)):
        raise PaceConfigError(
            f"pacellm: {name} ({type(mlp).__name__}) is not a dense FFN (it has "
            f"{', '.join(sorted(children)) or 'no parts'}; memory needs {', '.join(_GATED)} or "
            f"{', '.join(_PLAIN)}); choose other layers or serve the model without memory."
        )
    down_proj = mlp.down_proj
    assert isinstance(down_proj, RowParallelLinear), type(down_proj)
    base = type(mlp)
    mixin = PaceMLPMixin if children == set(_GATED) else PacePlainMLPMixin
    mlp.__class__ = type(f"Pace{base.__name__}", (mixin, base), {})
    width = down_proj.input_size_per_partition
    mlp.memory = PaceMemory(config, index, width, prefix=f"{name}.memory")


def pacify(base: type[nn.Module], name: str) -> type[nn.Module]:
    """Subclass a vLLM decoder so that the configured layers' FFNs carry memory.

    Weight names, loaders, quantisation, LoRA and sharding stay those of ``base``.
    """

    def __init__(self: nn.Module, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        base.__init__(self, vllm_config=vllm_config, prefix=prefix)
        config = read_config(vllm_config)
        total = vllm_config.model_config.get_total_num_hidden_layers()
        layers = config.resolve_layers(total)
        for path, module in list(self.named_modules()):
            found = _FFN_NAME.search(path)
            if found and int(found[1]) in layers:
                attach(module, config, int(found[1]), f"{prefix}.{path}" if prefix else path)

    body: dict[str, Any] = {"__init__": __init__, "__module__": "pacellm_vllm.models"}
    return type(name, (base,), body)
