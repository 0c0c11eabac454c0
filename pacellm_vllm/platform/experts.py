"""Routed experts in PyTorch: the ``torch.ops._C`` operators of vLLM's CPU mixtures of experts.

Importing this module registers them. Names, schemas and meaning are those of
csrc/cpu/torch_bindings.cpp and csrc/cpu/cpu_fused_moe.cpp; the caller is
model_executor/layers/fused_moe/experts/cpu_moe.py, which also routes in PyTorch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pacellm_vllm.platform.operators import operator

# Of the gated OpenAI activation.
_SLOPE, _LIMIT = 1.702, 7.0


@operator("prepack_moe_weight(Tensor weight, Tensor(a1!) packed_weight, str isa) -> ()")
def _prepack(weight: Tensor, output: Tensor, isa: str) -> None:
    """Copy as it is: PyTorch needs no packing."""
    output.copy_(weight)


def _join(hidden: Tensor, activation: str) -> Tensor:
    """Gate and up, [tokens, 2 D], joined: [tokens, D]."""
    if activation == "swigluoai":
        # Gate and up by turns, as in gpt-oss' checkpoints.
        gate, up = hidden[:, ::2].clamp(max=_LIMIT), hidden[:, 1::2].clamp(-_LIMIT, _LIMIT)
        return (up + 1) * gate * torch.sigmoid(_SLOPE * gate)
    gate, up = hidden.chunk(2, dim=-1)
    if activation == "silu":
        return F.silu(gate) * up
    if activation in ("gelu", "gelu_tanh"):
        return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up
    raise NotImplementedError(
        f"Experts with activation {activation} are not implemented on the torch CPU platform."
    )


@operator(
    "cpu_fused_moe(Tensor(a0!) output, Tensor input, Tensor w13, Tensor w2, Tensor? w13_bias, "
    "Tensor? w2_bias, Tensor topk_weights, Tensor topk_id, bool skip_weighted, str act, "
    "str isa) -> ()"
)
def _fused_moe(
    output: Tensor,
    input: Tensor,
    w13: Tensor,
    w2: Tensor,
    w13_bias: Tensor | None,
    w2_bias: Tensor | None,
    topk_weights: Tensor,
    topk_id: Tensor,
    skip_weighted: bool,
    act: str,
    isa: str,
) -> None:
    """Write the weighted sum of each token's experts.

    output and input ``[tokens, H]``, w13 ``[experts, 2 D, H]``, w2 ``[experts, H, D]``, biases
    ``[experts, 2 D]`` and ``[experts, H]``, topk_weights float32 and topk_id int32
    ``[tokens, k]``. ``skip_weighted``: the input has been weighted already. A token's result does
    not depend on the others: every expert's tokens are computed one matrix at a time, and summed
    in the order of the token's own experts.
    """
    tokens, top_k = topk_id.shape
    parts = torch.zeros(tokens, top_k, input.shape[-1], dtype=torch.float32)
    for expert in topk_id.unique().tolist():
        if expert < 0:
            # Another rank's.
            continue
        token, place = (topk_id == expert).nonzero(as_tuple=True)
        hidden = F.linear(input[token], w13[expert], None if w13_bias is None else w13_bias[expert])
        result = F.linear(
            _join(hidden, act), w2[expert], None if w2_bias is None else w2_bias[expert]
        )
        parts[token, place] = result.float()
    if not skip_weighted:
        parts *= topk_weights.unsqueeze(-1)
    output.copy_(parts.sum(dim=1))
