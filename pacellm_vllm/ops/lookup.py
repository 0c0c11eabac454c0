"""Enhance: look each token up in a committed bank and blend what it finds (paper Sec. 3.2.1)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from pacellm_vllm.ops.rules import MemoryRules

NORM_FLOOR = 1e-8
# A token is sound if its squared norm is a number up to this; see docs/architecture.md. Far enough
# from fp32's largest that no product, sum or norm of sound tokens is infinite.
MOST_SQUARE = 1e30
# Half-precision activations are widened this many elements at a time, which stay in the caches.
_WIDENED_ELEMENTS = 1 << 20

Reduce = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class LookUp:
    """What n tokens found in a bank of m valid slots.

    ``output`` [n, D] in the dtype of the activations; ``mean_top`` [n] fp32, the mean of the
    top-k similarities that decides the write, NaN for unsound tokens, which are of no kind;
    ``top`` [n, min(k, m)] int64 slot indices.
    """

    output: torch.Tensor
    mean_top: torch.Tensor
    top: torch.Tensor

    def high(self, rules: MemoryRules) -> torch.Tensor:
        """[n] bool: tokens that only confirm the slots they found."""
        return self.mean_top > rules.theta_high

    def mid(self, rules: MemoryRules) -> torch.Tensor:
        """[n] bool: tokens that are merged into the slots they found."""
        return (self.mean_top > rules.theta_low) & (self.mean_top <= rules.theta_high)

    def low(self, rules: MemoryRules) -> torch.Tensor:
        """[n] bool: tokens that ask for a slot of their own."""
        return self.mean_top <= rules.theta_low

    def sound(self) -> torch.Tensor:
        """[n] bool: tokens of any kind."""
        return ~self.mean_top.isnan()


def key_squares(keys: torch.Tensor) -> torch.Tensor:
    """Squared norms [m] of ``keys`` [m, D] fp32, equal exactly where keys are equal.

    Where different keys have one squared norm, all but the first are moved to the next free number.
    """
    squares = torch.linalg.vecdot(keys, keys)
    if len(squares.unique()) == len(keys):
        return squares
    owners: dict[float, torch.Tensor] = {}
    for key, square in zip(keys, squares, strict=True):
        while not torch.equal(owners.setdefault(float(square), key), key):
            square.copy_(square.nextafter(square.new_tensor(float("inf"))))
    return squares


def twins_of(squares: torch.Tensor) -> list[int] | None:
    """For each slot the first one of an equal key, by ``squares`` [m] of ``key_squares``.

    None if no two are equal. Slots that are merged together come to be equal, and then their
    products must be too, which a matrix product does not promise: what it adds up in which order
    depends on where in it a row lies, and on its shape.
    """
    # As integers they make faster sets; none is -0.
    bits = squares.view(torch.int32).tolist()
    if len(set(bits)) == len(bits):
        return None
    first: dict[int, int] = {}
    return [first.setdefault(square, slot) for slot, square in enumerate(bits)]


class Compared(NamedTuple):
    """Of n tokens and m slots: ``sims`` [n, m] fp32, their cosines, NaN for unsound tokens, and
    never above 1, where rounding would put a token that equals a slot above a threshold of 1;
    ``norms`` [n, 1] of tokens and ``key_norms`` [1, m] of keys, fp32; ``unsound`` [n, 1] bool.
    """

    sims: torch.Tensor
    norms: torch.Tensor
    key_norms: torch.Tensor
    unsound: torch.Tensor


def compare(
    a: torch.Tensor, keys: torch.Tensor, squares: torch.Tensor | None, reduce: Reduce | None
) -> Compared:
    """Every token with every slot.

    ``a`` [n, D] any float dtype, ``keys`` [m, D] fp32, ``squares`` [m] their ``key_squares`` if
    they are known. Under tensor parallelism D is this rank's shard and ``reduce`` sums over ranks:
    partial products and squared norms travel together, so every rank sees the same similarities
    and decides alike.
    """
    n, m = a.shape[0], keys.shape[0]
    parts = keys.new_empty(n + 1, m + 1)
    for tokens in _chunks(a):
        wide = a[tokens].float()
        torch.mm(wide, keys.t(), out=parts[:n][tokens, :m])
        # Of the ways to add up squares the one that makes no second [n, D] tensor.
        parts[:n][tokens, m] = torch.linalg.vector_norm(wide, dim=1).square_()
    parts[n, :m] = squares = key_squares(keys) if squares is None else squares
    twins = twins_of(squares)
    if twins is not None:
        parts[:n, :m] = parts[:n, twins]
    parts[n, m] = 0
    if reduce is not None:
        parts = reduce(parts)
    unsound = ~(parts[:n, m:] <= MOST_SQUARE)
    a_norm = parts[:n, m:].sqrt().clamp_min(NORM_FLOOR)
    key_norm = parts[n:, :m].sqrt().clamp_min(NORM_FLOOR)
    sims = (parts[:n, :m] / (a_norm * key_norm)).clamp_(-1, 1)
    return Compared(sims.masked_fill_(unsound, float("nan")), a_norm, key_norm, unsound)


def nearest_slots(keys: torch.Tensor, reduce: Reduce | None) -> list[tuple[int, float]]:
    """Of each of m slots the one most like it, and their cosine; (-1, 0) for a single one.

    ``keys`` [m, D] any float dtype; ``reduce`` as in ``compare``.
    """
    if len(keys) == 1:
        return [(-1, 0.0)]
    sims = compare(keys, keys.float(), None, reduce).sims
    best = sims.fill_diagonal_(float("-inf")).max(dim=1)
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def look_up(
    a: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rules: MemoryRules,
    reduce: Reduce | None = None,
    squares: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> LookUp:
    """Enhance n tokens with the m valid slots of one bank.

    ``a`` [n, D] any float dtype; ``keys``, ``values`` [m, D] any float dtype, m may be 0;
    ``squares`` [m] fp32 the keys' ``key_squares``, if known; ``out`` like ``a`` takes the output.
    Arithmetic is fp32. Ties go to the lower slot index.
    """
    n, m = a.shape[0], keys.shape[0]
    if out is None:
        out = torch.empty_like(a)
    sims, norms, key_norms, unsound = compare(a, keys.float(), squares, reduce)
    if m == 0:
        nothing = torch.where(unsound[:, 0], float("nan"), float("-inf"))
        none = torch.empty(n, 0, dtype=torch.int64, device=a.device)
        return LookUp(out.copy_(a), nothing, none)

    top = largest(sims, rules.top_k)
    top_sims = sims.gather(1, top)
    mean_top = top_sims.mean(dim=1)
    if not rules.alpha:
        return LookUp(out.copy_(a), mean_top, top)

    best = top_sims[:, 0]
    high = best > rules.theta_high
    mid = (best > rules.theta_low) & ~high
    zero = torch.zeros_like(best)
    top_weight = torch.where(high, rules.high_weight, torch.where(mid, rules.mid_weight, zero))
    self_weight = torch.where(high, 0.0, torch.where(mid, rules.mid_self_weight, zero + 1.0))
    weights = torch.zeros_like(sims).scatter_(
        1, top, (rules.alpha / top.shape[1] * top_weight)[:, None].expand_as(top)
    )
    if rules.negative_k and rules.noise:
        bottom = largest(-sims, rules.negative_k)
        share = torch.where(high | mid, rules.alpha * rules.noise / bottom.shape[1], zero)
        weights.scatter_add_(1, bottom, share[:, None].expand_as(bottom))
    if rules.clip:
        # An unsound token reads nothing, whatever its norm.
        weights *= (norms / key_norms).clamp_max_(1).masked_fill_(unsound, 0)
    # Exactly 1 for tokens that found nothing, so their activation passes through bit for bit.
    own = torch.where(high | mid, (1 - rules.alpha) + rules.alpha * self_weight, zero + 1.0)
    values = values.float()
    for tokens in _chunks(a):
        # In place where the output is fp32: another [n, D] tensor costs more than the product.
        part = out[tokens] if out.dtype is torch.float32 else values.new_empty(a[tokens].shape)
        torch.mul(a[tokens], own[tokens, None], out=part)
        part.addmm_(weights[tokens], values)
        if out.dtype is not torch.float32:
            out[tokens] = part
    return LookUp(out, mean_top, top)


def largest(sims: torch.Tensor, k: int) -> torch.Tensor:
    """Indices [n, min(k, m)] of the largest of ``sims`` [n, m] fp32, the first of them first.

    Of equal ones the lower index comes first, which ``torch.topk`` alone does not promise: here it
    ranks integers, no two of a row equal, that hold a similarity and behind it the index.
    """
    m = sims.shape[1]
    # Adding 0 turns -0 into 0. Negative floats read as integers fall where they should rise.
    bits = (sims + 0.0).view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    countdown = torch.arange(m - 1, -1, -1, device=sims.device)
    return (ordered * m + countdown).topk(min(k, m), dim=1).indices


def _chunks(a: torch.Tensor) -> Iterator[slice]:
    """All tokens at once in fp32; otherwise as many at a time as are cheaply widened."""
    size = len(a) if a.dtype is torch.float32 else max(1, _WIDENED_ELEMENTS // a.shape[1])
    for begin in range(0, len(a), size):
        yield slice(begin, min(begin + size, len(a)))
