"""Which experts a token computes: a router made from the FFN's weights alone, without training.

The paper activates experts "conditionally during inference" (App. C.2, D.1.3) and says no more;
its published code does not. The rule here is ours: a few neurons of each expert are computed for
every token and stand for the others, which resemble them because they were clustered.
"""

from collections.abc import Callable

import torch
from torch import nn

# act(gate) * up on [tokens, 2 * width], gates first: vLLM's SiluAndMul and its like.
Activation = Callable[[torch.Tensor], torch.Tensor]

PROBES = 4


class ExpertRouter(nn.Module):
    """Predicts how active each expert is and chooses the most active ones, token by token.

    A choice depends on the token's FFN input alone, not on other tokens. The buffers hold probes
    of all K experts, also where a tensor parallel rank computes only some of them, so that ranks
    choose alike.

    Args:
        num_experts: K.
        hidden: H, width of the FFN's input.
        act: see ``Activation``.
        top_k: choose so many experts.
        mass: choose the fewest experts with at least this share of the predicted activation.
        probes: neurons per expert that are looked at.
        dtype, device: of the weights.
    """

    gate_up: torch.Tensor
    bias: torch.Tensor

    def __init__(
        self,
        num_experts: int,
        hidden: int,
        act: Activation,
        *,
        top_k: int | None = None,
        mass: float | None = None,
        probes: int = PROBES,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.mass = num_experts, top_k, mass
        self.probes = probes
        # Not a submodule: it belongs to the FFN.
        self._act = (act,)
        rows = torch.zeros(2 * num_experts * probes, hidden, dtype=dtype, device=device)
        self.register_buffer("gate_up", rows, persistent=False)

    def fill(self, gate: torch.Tensor, up: torch.Tensor) -> None:
        """Take the probes from ``gate`` and ``up`` [D, H], whose neurons are in expert order."""
        size = gate.shape[0] // self.num_experts
        inside = torch.linspace(0, size - 1, self.probes).round().long()
        rows = (torch.arange(self.num_experts)[:, None] * size + inside).flatten().to(gate.device)
        self.gate_up.copy_(torch.cat([gate[rows], up[rows]]))

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """Predicted activation of each expert, [tokens, K] float32, for ``x`` [tokens, H]."""
        [act] = self._act
        a = act(torch.nn.functional.linear(x, self.gate_up))
        return a.float().abs().unflatten(-1, (self.num_experts, self.probes)).mean(-1)

    def choose(self, x: torch.Tensor) -> torch.Tensor:
        """Which experts each token computes, [tokens, K] bool."""
        if self.top_k == self.num_experts or self.mass == 1:
            return torch.ones(x.shape[0], self.num_experts, dtype=torch.bool, device=x.device)
        return choose(self.scores(x), self.top_k, self.mass)


def choose(scores: torch.Tensor, top_k: int | None, mass: float | None) -> torch.Tensor:
    """The ``top_k`` experts, or the fewest that reach ``mass`` of the sum: [tokens, K] bool.

    Equal scores [tokens, K] go to the first expert.
    """
    ranked, order = scores.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        taken = torch.arange(scores.shape[-1], device=scores.device) < top_k
        taken = taken.expand_as(scores)
    else:
        assert mass is not None
        before = ranked.cumsum(-1) - ranked
        taken = before < mass * ranked.sum(-1, keepdim=True)
    return torch.zeros_like(taken).scatter(-1, order, taken)
