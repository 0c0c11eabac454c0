"""Activations that vLLM's classes look up among ``torch.ops._C`` when a model is built.

On a CPU they then compute in PyTorch (``model_executor/layers/activation.py``); without the
operators a model with such an activation would not start. Each writes ``out`` from ``input`` of the
same shape.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pacellm_vllm.platform.operators import operator


@operator("gelu_new(Tensor(a0!) out, Tensor input) -> ()")
@operator("gelu_fast(Tensor(a0!) out, Tensor input) -> ()")
def _gelu_tanh(out: Tensor, input: Tensor) -> None:
    out.copy_(F.gelu(input, approximate="tanh"))


@operator("gelu_quick(Tensor(a0!) out, Tensor input) -> ()")
def _gelu_quick(out: Tensor, input: Tensor) -> None:
    out.copy_(input * torch.sigmoid(1.702 * input))
