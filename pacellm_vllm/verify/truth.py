"""The plain truth: what a request's memory gives in one layer, in float64 and without pages.

Of ``ops`` only the settings are used: a fault there is to show.
"""

from dataclasses import dataclass

import torch

from pacellm_vllm.ops.rules import MemoryRules, UpdateRule

_FLOOR = 1e-8
_MOST_SQUARE = 1e30
# Of what tokens above theta_high recall, of what those below it do, and of these themselves.
_HIGH, _MID = 1.0, 0.5
_SELF = {UpdateRule.OFFICIAL: 0.0, UpdateRule.PAPER: 0.5}


@dataclass
class Truth:
    """Of T tokens: ``outputs`` [T, D] in the dtype of the activations, and ``gap`` [T] float64,
    how far each token's closest decision was from a tie; infinite where it decided nothing.
    """

    outputs: torch.Tensor
    gap: torch.Tensor


def true_outputs(a: torch.Tensor, rules: MemoryRules, stored: torch.dtype) -> Truth:
    """What memory makes of ``a`` [T, D], a request's activations from its first token on.

    ``stored`` is the dtype that slots are kept in.
    """
    outputs, gaps = [], []
    keys = values = torch.zeros(0, a.shape[1], dtype=torch.float64)
    usage: list[int] = []
    for segment in a.split(rules.segment_size):
        x = segment.double()
        sound = x.float().square().sum(dim=1) <= _MOST_SQUARE
        if len(keys):
            norms = x.norm(dim=1).clamp_min(_FLOOR)[:, None] * keys.norm(dim=1).clamp_min(_FLOOR)
            sims = x @ keys.T / norms
            ranked, order = sims.sort(dim=1, descending=True, stable=True)
            top = order[:, : rules.top_k]
            mean = ranked[:, : rules.top_k].mean(dim=1)
            o = _blend(x, keys, values, sims, ranked[:, 0], top, rules)
            o[~sound] = x[~sound]
            gaps.append(_gaps(ranked, mean, rules))
        else:
            top, mean = None, torch.full((len(x),), -torch.inf, dtype=torch.float64)
            o = x.clone()
            gaps.append(torch.full((len(x),), torch.inf, dtype=torch.float64))
        o = o.to(a.dtype)
        outputs.append(o)
        if len(segment) < rules.segment_size:
            break
        high = sound & (mean > rules.theta_high)
        mid = sound & ~high & (mean > rules.theta_low)
        low = (sound & ~high & ~mid).nonzero().flatten().tolist()
        paper = rules.update is UpdateRule.PAPER
        keys, values = keys.clone(), values.clone()
        if top is not None and mid.any():
            slots = top[mid].unique()
            if paper:
                key = value = x[sound].sum(dim=0) / rules.segment_size
            else:
                key, value = x[mid].mean(dim=0), o[mid].double().mean(dim=0)
            m = rules.momentum
            keys[slots] = (m * keys[slots] + (1 - m) * key).to(stored).double()
            values[slots] = (m * values[slots] + (1 - m) * value).to(stored).double()
            for slot in slots.tolist():
                usage[slot] += 1
        if top is not None and paper:
            for slot in top[high].flatten().tolist():
                usage[slot] += 1
        by_usage = sorted(range(len(usage)), key=usage.__getitem__)[: rules.max_insertions]
        free = rules.bank_size - len(keys)
        kept = [rows[low[:free]].to(stored).double() for rows in (segment, o)]
        for token, slot in zip(low[free:], by_usage, strict=False):
            keys[slot] = segment[token].to(stored).double()
            values[slot] = o[token].to(stored).double()
            usage[slot] = 1
        keys, values = torch.cat([keys, kept[0]]), torch.cat([values, kept[1]])
        usage += [1] * len(kept[0])
    return Truth(torch.cat(outputs), torch.cat(gaps))


def _blend(
    x: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    sims: torch.Tensor,
    best: torch.Tensor,
    top: torch.Tensor,
    rules: MemoryRules,
) -> torch.Tensor:
    limits = torch.ones_like(sims)
    if rules.clip:
        lengths = keys.norm(dim=1).clamp_min(_FLOOR)
        limits = (x.norm(dim=1).clamp_min(_FLOOR)[:, None] / lengths).clamp_max(1)

    def mean_of(slots: torch.Tensor) -> torch.Tensor:
        return (limits.gather(1, slots)[..., None] * values[slots]).mean(dim=1)

    recalled = mean_of(top)
    noise = torch.zeros_like(x)
    if rules.negative_k and rules.noise:
        bottom = sims.sort(dim=1, stable=True).indices[:, : rules.negative_k]
        noise = rules.noise * mean_of(bottom)
    high = _HIGH * recalled + noise
    mid = _MID * recalled + _SELF[rules.update] * x + noise
    found = torch.where((best > rules.theta_high)[:, None], high, mid)
    blended = (1 - rules.alpha) * x + rules.alpha * found
    return torch.where((best > rules.theta_low)[:, None], blended, x)


def _gaps(ranked: torch.Tensor, mean: torch.Tensor, rules: MemoryRules) -> torch.Tensor:
    """How near each token came to deciding otherwise, [T]: to a threshold, or a slot's rank."""
    near = [(ranked[:, 0] - t).abs() for t in (rules.theta_high, rules.theta_low)]
    near += [(mean - t).abs() for t in (rules.theta_high, rules.theta_low)]
    m = ranked.shape[1]
    if m > rules.top_k:
        near.append((ranked[:, rules.top_k - 1] - ranked[:, rules.top_k]).abs())
    if rules.noise and m > rules.negative_k > 0:
        near.append((ranked[:, -rules.negative_k] - ranked[:, -rules.negative_k - 1]).abs())
    return torch.stack(near).min(dim=0).values
