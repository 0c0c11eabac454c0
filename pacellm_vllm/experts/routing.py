"""Which experts a token computes: a router made from the FFN's weights alone, without training.

The paper activates experts "conditionally during inference" (App. C.2, D.1.3) and says no more;
its published code does not. The rules here are ours, after the parameter centres of MoEfication
(Zhang et al., 2022): an expert answers to inputs that point along the mean of its gate rows.
"""

from collections.abc import Callable

import torch
from torch import nn

from pacellm_vllm.experts.errors import ExpertsError

# act(gate) * up on [tokens, 2 * width], gates first: vLLM's SiluAndMul and its like. Without a
# gate, act(up) on [tokens, width].
Activation = Callable[[torch.Tensor], torch.Tensor]

# Where a normal distribution is looked at, in standard deviations, and the weights of a sum.
_POINTS = (-1.5, -0.75, 0.0, 0.75, 1.5)
_WEIGHTS = tuple(torch.tensor(_POINTS).square().div(-2).softmax(dim=0).tolist())


class ExpertRouter(nn.Module):
    """Predicts how active each expert is and chooses the most active ones, token by token.

    A choice depends on the token's FFN input alone, not on other tokens. The buffers describe all
    K experts, also where a tensor parallel rank computes only some of them, so that ranks choose
    alike: ``centres`` [K, H] is the mean of an expert's gate rows, ``spreads`` [K] their standard
    deviation from it, per element, ``sizes`` [K] the root mean square of its up rows' elements.
    In an FFN without a gate, up's rows are the gate's and sizes are 1.

    Args:
        num_experts: K.
        hidden: H, width of the FFN's input.
        act: see ``Activation``.
        top_k: choose so many experts.
        mass: choose the fewest experts with at least this share of the predicted activation.
        gated: whether ``act`` takes gate and up.
        dtype: of the weights.
        device: theirs.
    """

    centres: torch.Tensor
    spreads: torch.Tensor
    sizes: torch.Tensor

    def __init__(
        self,
        num_experts: int,
        hidden: int,
        act: Activation,
        *,
        top_k: int | None = None,
        mass: float | None = None,
        gated: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.mass = num_experts, top_k, mass
        self.gated = gated
        # In a tuple, or it would be a submodule; it is the FFN's.
        self._act = (act,)
        # Not persistent: a checkpoint has none of them.
        centres = torch.zeros(num_experts, hidden, dtype=dtype, device=device)
        self.register_buffer("centres", centres, persistent=False)
        for name in ("spreads", "sizes"):
            values = torch.zeros(num_experts, dtype=torch.float32, device=device)
            self.register_buffer(name, values, persistent=False)

    def fill(self, gate: torch.Tensor, up: torch.Tensor | None = None) -> None:
        """Describe the experts of ``gate`` and ``up`` [D, H], whose neurons are in expert order.

        ``ExpertsError`` where vLLM loads weights again, for which it takes the buffers away and
        puts the old ones back.
        """
        if self.centres.is_meta:
            raise ExpertsError(
                "pacellm: an engine whose tokens choose among experts cannot load its weights "
                "again, as they would be chosen by the old ones; start it anew."
            )
        gates = gate.float().unflatten(0, (self.num_experts, -1))
        centres = gates.mean(dim=1, keepdim=True)
        self.centres.copy_(centres[:, 0])
        self.spreads.copy_((gates - centres).square().mean(dim=(1, 2)).sqrt())
        if up is None:
            self.sizes.fill_(1)
        else:
            ups = up.float().unflatten(0, (self.num_experts, -1))
            self.sizes.copy_(ups.square().mean(dim=(1, 2)).sqrt())

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """Mean gate of each expert before its activation, [tokens, K], for ``x`` [tokens, H]."""
        return torch.nn.functional.linear(x, self.centres).float()

    def expected_mass(self, x: torch.Tensor) -> torch.Tensor:
        """Predicted activation of each expert, [tokens, K] float32, up to a factor of the token's.

        The mean of ``|act(g)|`` times the size of up, where gates g of an expert's neurons are
        normally distributed about its score with ``spreads`` times the length of ``x``.
        """
        [act] = self._act
        mean = self.scores(x)
        deviation = self.spreads * x.float().norm(dim=-1, keepdim=True)
        expected = torch.zeros_like(mean)
        for point, weight in zip(_POINTS, _WEIGHTS, strict=True):
            gates = mean + point * deviation
            given = torch.cat([gates, torch.ones_like(gates)], dim=-1) if self.gated else gates
            expected += weight * act(given).abs()
        return expected * self.sizes

    def choose(self, x: torch.Tensor) -> torch.Tensor:
        """Which experts each token computes, [tokens, K] bool."""
        if self.top_k == self.num_experts or self.mass == 1:
            return torch.ones(x.shape[0], self.num_experts, dtype=torch.bool, device=x.device)
        scores = self.scores(x) if self.mass is None else self.expected_mass(x)
        return choose(scores, self.top_k, self.mass)


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
