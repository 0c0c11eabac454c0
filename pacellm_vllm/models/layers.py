"""The decoder layers of a vLLM model, wherever they hang, perhaps beside those of an encoder."""

import re
from dataclasses import dataclass
from typing import Any

from torch import nn
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from pacellm_vllm.config import PaceConfigError

# vLLM's Transformers backend keeps its attention layers apart from the modules that call them, and
# Jamba has attention's projections in the layer itself.
_ATTENTION = re.compile(r"attn|attention|^qkv_proj$|^o_proj$", re.IGNORECASE)
# What layers of Gemma 3n and 4 have beside attention and FFN, and add to neither.
_BESIDE = ("altup", "laurel", "per_layer_input_gate", "per_layer_projection")


@dataclass(frozen=True)
class DecoderLayer:
    """Layer ``index``, ``module``, which hangs at ``name`` in the engine."""

    index: int
    name: str
    module: nn.Module

    def parts(self) -> dict[str, nn.Module]:
        """Its children by name that could be, or be part of, its FFN."""
        children: dict[str, Any] = dict(self.module.named_children())
        return {
            name: child
            for name, child in children.items()
            if name not in _BESIDE
            and not _holds_attention(child)
            and not _is_attention(name, child)
        }


class DecoderLayers:
    """All ``count`` decoder layers of ``model``, which hangs at ``prefix`` in the engine.

    Those of other pipeline stages are placeholders. Raises ``PaceConfigError`` when there is no
    such list of layers, or more than one.
    """

    def __init__(self, model: nn.Module, count: int, prefix: str = "") -> None:
        lists = [
            (path, module)
            for path, module in model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == count
        ]
        # An encoder of pictures or sounds has attention, too, but no KV cache.
        found = [(path, layers) for path, layers in lists if _holds_attention(layers)] or [
            (path, layers)
            for path, layers in lists
            if any(
                _is_attention(name, part)
                for layer in layers
                for name, part in layer.named_children()
            )
        ]
        if len(found) != 1:
            raise PaceConfigError(
                f"pacellm: this model has {len(found)} lists of {count} decoder layers with "
                "attention, so layers cannot be told by number; serve it without pacellm."
            )
        path, self._layers = found[0]
        self._name = f"{prefix}.{path}" if prefix else path

    def __getitem__(self, index: int) -> DecoderLayer:
        return DecoderLayer(index, f"{self._name}.{index}", self._layers[index])


def _holds_attention(module: nn.Module) -> bool:
    return any(isinstance(part, AttentionLayerBase) for part in module.modules())


def _is_attention(name: str, module: nn.Module) -> bool:
    return bool(_ATTENTION.search(name) or _ATTENTION.search(type(module).__name__))
