"""Routed FFNs on a GPU: vLLM's fused MoE kernel for the inputs, one of ours for the output.

An FFN in expert order is a mixture of experts whose weights need no copy: the rows of gate and up
are 2 K experts of the grouped product, and an expert's activations land where the dense FFN's
would be, so that a memory may follow. All shapes depend on the number of tokens alone and nothing
is read on the host, so graphs can hold it.
"""

import torch
from torch.nn.functional import linear

from pacellm_vllm.compat import grouped_product, grouped_product_tiles, register_custom_op
from pacellm_vllm.experts.ffn import FfnWeights, masked

# Up to here the output reads the chosen experts' columns only. With more tokens some token chose
# almost every expert, and a sum over experts of [tokens, K, H] costs what it saves.
FEW_TOKENS = 16


def fused_activations(x: torch.Tensor, w: FfnWeights, chosen: torch.Tensor) -> torch.Tensor:
    """As ``ffn.grouped_activations``; ``chosen`` [tokens, K] bool on the device of ``x``."""
    before = x.new_zeros(x.shape[0], w.inputs.shape[0])
    size = w.down.shape[1] // chosen.shape[1]
    torch.ops.vllm.pacellm_expert_inputs(x, w.inputs, w.bias, chosen, size, before)
    a = w.act(before)
    # With a gate zeros stay zeros, because up is zero.
    return a if w.halves == 2 else masked(a, chosen)


def fused_output(x: torch.Tensor, w: FfnWeights, chosen: torch.Tensor) -> torch.Tensor:
    """As ``ffn.grouped_output``; where there are many tokens, a dense product of zeros, too."""
    a = fused_activations(x, w, chosen)
    out = x.new_empty(x.shape[0], w.down.shape[0])
    torch.ops.vllm.pacellm_expert_outputs(a, w.down, w.down_bias, chosen, out)
    return out


def by_expert(chosen: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pairs of token and expert in the order of experts, each expert's padded to whole tiles.

    Returns ``pairs`` [n] int32, where token t and expert e of ``chosen`` [tokens, K] are the pair
    t K + e and the padding is tokens K; ``experts`` [n / tile] int32, the expert of each tile; and
    ``count`` [1] int32, how many of the pairs are in use. n depends on shapes alone.
    """
    tokens, experts = chosen.shape
    length = -(-experts * (tokens + tile - 1) // tile) * tile
    padded = (chosen.sum(dim=0) + tile - 1) // tile * tile
    ends = padded.cumsum(0)
    place = chosen.cumsum(0) - 1 + (ends - padded)
    numbers = torch.arange(tokens * experts, dtype=torch.int32, device=chosen.device)
    # One place more, for the pairs that were not chosen.
    pairs = numbers.new_full((length + 1,), tokens * experts)
    pairs.scatter_(0, torch.where(chosen, place, length).flatten(), numbers)
    tiles = torch.arange(0, length, tile, device=chosen.device)
    of_tile = torch.searchsorted(ends, tiles, right=True).clamp(max=experts - 1)
    return pairs[:-1], of_tile.to(torch.int32), ends[-1:].to(torch.int32)


def _inputs_op(
    x: torch.Tensor,
    inputs: torch.Tensor,
    bias: torch.Tensor | None,
    chosen: torch.Tensor,
    size: int,
    out: torch.Tensor,
) -> None:
    """Write the chosen experts' part of ``x inputs^T`` into ``out`` [tokens, halves K size]."""
    experts = inputs.shape[0] // size
    # Gate and up of an expert lie apart, so each is an expert of its own.
    each = chosen.repeat(1, experts // chosen.shape[1])
    tiles = grouped_product_tiles(len(x), experts, size, x.shape[1])
    grouped_product(
        x,
        inputs.view(experts, size, -1),
        out.view(len(x), experts, size),
        by_expert(each, tiles["BLOCK_SIZE_M"]),
        None if bias is None else bias.view(experts, size),
        tiles,
    )


def _outputs_op(
    a: torch.Tensor,
    down: torch.Tensor,
    bias: torch.Tensor | None,
    chosen: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Write ``a down^T + bias`` into ``out`` [tokens, H]; ``a`` is zero where not ``chosen``."""
    # In here, not around it: a compiled model decides once for all numbers of tokens.
    if len(a) > FEW_TOKENS:
        out.copy_(linear(a, down, bias))
        return
    # Triton is there wherever this runs, and not everywhere this is imported.
    from pacellm_vllm.experts.kernels import expert_outputs

    parts = torch.empty(chosen.shape[1], *out.shape, dtype=torch.float32, device=a.device)
    expert_outputs(a, down, chosen, parts)
    total = parts.sum(dim=0)
    out.copy_(total if bias is None else total + bias)


register_custom_op("pacellm_expert_inputs", _inputs_op, mutates=["out"])
register_custom_op("pacellm_expert_outputs", _outputs_op, mutates=["out"])
