"""Activations that vLLM's classes look up among ``torch.ops._C`` when a model is built.

On a CPU they then compute in PyTorch (``model_executor/layers/activation.py``); without the
operators a model with such an activation would not start. Each writes ``out`` from ``input`` of the
same shape.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_lib = torch.library.Library("_C", "FRAGMENT")


def _gelu_tanh(out: Tensor, input: Tensor) -> None:
    out.copy_(F.gelu(input, approximate="tanh"))


def _gelu_quick(out: Tensor, input: Tensor) -> None:
    out.copy_(input * torch.sigmoid(1.702 * input))


for _name, _function in (
    ("gelu_new", _gelu_tanh),
    ("gelu_fast", _gelu_tanh),
    ("gelu_quick", _gelu_quick),
):
    _lib.define(f"{_name}(Tensor(a0!) out, Tensor input) -> ()")
    _lib.impl(_name, _function, "CompositeExplicitAutograd")
