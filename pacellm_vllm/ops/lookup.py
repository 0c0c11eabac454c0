"""Enhance: look each token up in a committed bank and blend what it finds (paper Sec. 3.2.1)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pacellm_vllm.ops.rules import MemoryRules

NORM_FLOOR = 1e-8

Reduce = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class LookUp:
    """What n tokens found in a bank of m valid slots.

    ``output`` [n, D] in the dtype of the activations; ``mean_top`` [n] fp32, the mean of the
    top-k similarities that decides the write; ``top`` [n, min(k, m)] int64 slot indices.
    """

    output: torch.Tensor
    mean_top: torch.Tensor
    top: torch.Tensor

    def high(self, rules: MemoryRules) -> torch.Tensor:
        """[n] bool: tokens that only confirm the slots they found."""
        return self.mean_top > rules.theta_high

    def low(self, rules: MemoryRules) -> torch.Tensor:
        """[n] bool: tokens that ask for a slot of their own."""
        return self.mean_top <= rules.theta_low


def similarities(
    a: torch.Tensor, keys: torch.Tensor, squares: torch.Tensor | None, reduce: Reduce | None
) -> torch.Tensor:
    """Cosine of every token with every slot.

    ``a`` [n, D] and ``keys`` [m, D] fp32, ``squares`` [m] the keys' squared norms if they are
    known; returns [n, m] fp32. Under tensor parallelism D is this rank's shard and ``reduce`` sums
    over ranks: partial products and squared norms travel together, so every rank sees the same
    similarities and decides alike.
    """
    n, m = a.shape[0], keys.shape[0]
    parts = a.new_empty(n + 1, m + 1)
    torch.mm(a, keys.t(), out=parts[:n, :m])
    parts[:n, m] = torch.linalg.vecdot(a, a)
    parts[n, :m] = torch.linalg.vecdot(keys, keys) if squares is None else squares
    parts[n, m] = 0
    if reduce is not None:
        parts = reduce(parts)
    a_norm = parts[:n, m:].sqrt().clamp_min(NORM_FLOOR)
    key_norm = parts[n:, :m].sqrt().clamp_min(NORM_FLOOR)
    return parts[:n, :m] / (a_norm * key_norm)


def look_up(
    a: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rules: MemoryRules,
    reduce: Reduce | None = None,
    squares: torch.Tensor | None = None,
) -> LookUp:
    """Enhance n tokens with the m valid slots of one bank.

    ``a`` [n, D] any float dtype; ``keys``, ``values`` [m, D] any float dtype, m may be 0;
    ``squares`` [m] fp32 the keys' squared norms, if known. Arithmetic is fp32. Ties
    go to the lower slot index.
    """
    n, m = a.shape[0], keys.shape[0]
    if m == 0:
        nothing = a.new_full((n,), float("-inf"), dtype=torch.float32)
        return LookUp(a, nothing, torch.empty(n, 0, dtype=torch.int64, device=a.device))

    a32 = a.float()
    sims = similarities(a32, keys.float(), squares, reduce)
    # torch.topk does not promise which of two equal entries it returns; a stable sort does.
    ranked, order = sims.sort(dim=1, descending=True, stable=True)
    top = order[:, : rules.top_k]
    mean_top = ranked[:, : rules.top_k].mean(dim=1)
    best = ranked[:, 0]

    high = best > rules.theta_high
    mid = (best > rules.theta_low) & ~high
    zero = torch.zeros_like(best)
    top_weight = torch.where(high, rules.high_weight, torch.where(mid, rules.mid_weight, zero))
    self_weight = torch.where(high, 0.0, torch.where(mid, rules.mid_self_weight, zero + 1.0))
    weights = torch.zeros_like(sims).scatter_(
        1, top, (rules.alpha / top.shape[1] * top_weight)[:, None].expand_as(top)
    )
    if rules.negative_k and rules.noise:
        bottom = sims.argsort(dim=1, stable=True)[:, : rules.negative_k]
        share = torch.where(high | mid, rules.alpha * rules.noise / bottom.shape[1], zero)
        weights.scatter_add_(1, bottom, share[:, None].expand_as(bottom))
    # Exactly 1 for tokens that found nothing, so their activation passes through bit for bit.
    own = torch.where(high | mid, (1 - rules.alpha) + rules.alpha * self_weight, zero + 1.0)
    output = torch.addcmul(weights @ values.float(), own[:, None], a32)
    return LookUp(output.to(a.dtype), mean_top, top)
