"""An FFN of which each token computes some experts: the truth, and a grouped version."""

from dataclasses import dataclass

import torch

from pacellm_vllm.experts.routing import Activation


@dataclass(frozen=True)
class FfnWeights:
    """An FFN, or a tensor parallel rank's share of one, with its neurons in expert order.

    ``inputs`` is [2 D, H], the gate's rows before up's, or [D, H] where there is no gate; ``bias``
    [2 D] or [D] likewise. ``act`` maps [tokens, 2 n], or [tokens, n], to [tokens, n]. ``down`` is
    [H, D] and ``down_bias`` [H].
    """

    inputs: torch.Tensor
    down: torch.Tensor
    act: Activation
    bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    @property
    def halves(self) -> int:
        """2 with a gate, else 1."""
        return self.inputs.shape[0] // self.down.shape[1]


def masked(a: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The truth: activations ``a`` [tokens, D], zero in experts not ``chosen`` [tokens, K] bool."""
    kept = chosen.repeat_interleave(a.shape[-1] // chosen.shape[-1], dim=-1)
    return torch.where(kept, a, torch.zeros((), dtype=a.dtype, device=a.device))


def grouped_activations(x: torch.Tensor, w: FfnWeights, chosen: torch.Tensor) -> torch.Tensor:
    """As ``masked`` of the dense activations of ``x`` [tokens, H]; computes what is chosen only."""
    size = w.down.shape[1] // chosen.shape[1]
    a = x.new_zeros(x.shape[0], w.down.shape[1])
    for expert, tokens in _groups(chosen):
        a[tokens, expert * size : (expert + 1) * size] = _expert(x[tokens], w, expert, size)
    return a


def grouped_output(x: torch.Tensor, w: FfnWeights, chosen: torch.Tensor) -> torch.Tensor:
    """What the FFN makes of ``x`` [tokens, H] with the ``chosen`` [tokens, K] experts: [tokens, H].

    Summed in float32, expert by expert.
    """
    size = w.down.shape[1] // chosen.shape[1]
    out = torch.zeros(x.shape[0], w.down.shape[0], dtype=torch.float32, device=x.device)
    if w.down_bias is not None:
        out += w.down_bias
    for expert, tokens in _groups(chosen):
        a = _expert(x[tokens], w, expert, size)
        down = w.down[:, expert * size : (expert + 1) * size]
        out.index_add_(0, tokens, torch.nn.functional.linear(a, down).float())
    return out.to(x.dtype)


def _groups(chosen: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """Each expert that some token chose, with those tokens, ascending."""
    experts, tokens = chosen.T.nonzero(as_tuple=True)
    used, counts = experts.unique_consecutive(return_counts=True)
    return list(zip(used.tolist(), tokens.split(counts.tolist()), strict=True))


def _expert(x: torch.Tensor, w: FfnWeights, expert: int, size: int) -> torch.Tensor:
    """Activations [tokens, size] of one expert."""
    width = w.down.shape[1]
    parts = []
    for half in range(w.halves):
        rows = slice(half * width + expert * size, half * width + (expert + 1) * size)
        bias = None if w.bias is None else w.bias[rows]
        parts.append(torch.nn.functional.linear(x, w.inputs[rows], bias))
    return w.act(torch.cat(parts, dim=-1))
