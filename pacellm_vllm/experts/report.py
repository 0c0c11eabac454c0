"""What experts do on a text: measures of FFN activations, and running a model to get them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pacellm_vllm.experts.errors import ExpertsError

SHARES = (0.5, 0.9, 0.95)
WINDOW = 512
RANDOM_SPLITS = 3
# A token must occur so often before an expert can be said to answer to it.
OCCURRENCES = 3
# So many of those tokens are named.
ANSWERS = 5


@dataclass(frozen=True)
class LayerReport:
    """One layer's experts on a text.

    ``needed`` and ``needed_random``: the share of experts that hold 50, 90 and 95 % of the summed
    absolute activations, the most active ones of each token first, mean over tokens; the second
    for random splits of the same size. ``curve`` and ``curve_random``: the share of activation
    in the most active 1 .. K experts. ``within`` and ``between``: mean correlation, over tokens,
    of how active (absolute values) two neurons of one expert and of two experts are; ``dead``
    neurons, which never change, are left out. ``answers``: by expert, its tokens with how many
    times its even share of activation they give it, the strongest first.
    """

    num_experts: int
    needed: tuple[float, ...]
    needed_random: tuple[float, ...]
    curve: tuple[float, ...]
    curve_random: tuple[float, ...]
    within: float
    between: float
    dead: int
    answers: Mapping[int, Sequence[tuple[str, float]]]


def measure(
    activations: torch.Tensor, num_experts: int, tokens: torch.Tensor, names: Mapping[int, str]
) -> LayerReport:
    """Measure ``activations`` [T, D], neurons in expert order, of ``tokens`` [T].

    ``names`` gives the text of each token id. See ``LayerReport``.
    """
    a = activations.float()
    mass = _mass(a, num_experts)
    curve, needed = _concentration(mass)
    generator = torch.Generator().manual_seed(0)
    splits = [
        _concentration(_mass(a[:, torch.randperm(a.shape[1], generator=generator)], num_experts))
        for _ in range(RANDOM_SPLITS)
    ]
    within, between, dead = _correlations(a.abs(), num_experts)
    return LayerReport(
        num_experts,
        tuple(needed.tolist()),
        tuple(torch.stack([found for _, found in splits]).mean(0).tolist()),
        tuple(curve.tolist()),
        tuple(torch.stack([found for found, _ in splits]).mean(0).tolist()),
        within,
        between,
        dead,
        answers(mass, tokens, names),
    )


def _mass(a: torch.Tensor, num_experts: int) -> torch.Tensor:
    return a.abs().unflatten(1, (num_experts, -1)).sum(-1)


def _concentration(mass: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Share of activation in the most active 1 .. K experts, and of experts for each of SHARES."""
    ranked = mass.sort(dim=1, descending=True).values.double().cumsum(1)
    held = ranked / ranked[:, -1:].clamp_min(1e-30)
    needed = [((held < share).sum(1) + 1.0).mean() / mass.shape[1] for share in SHARES]
    return held.mean(0), torch.stack(needed)


def _correlations(a: torch.Tensor, num_experts: int) -> tuple[float, float, int]:
    """Mean correlation of pairs within and between experts, and the number of dead neurons."""
    centred = a - a.mean(0)
    length = centred.norm(dim=0)
    alive = length > 1e-6 * length.max().clamp_min(1e-30)
    z = torch.where(alive, centred / length.clamp_min(1e-30), torch.zeros(()))
    # The sum of all correlations within a group is the squared length of the sum of its z.
    counts = alive.unflatten(0, (num_experts, -1)).sum(1).double()
    sums = z.unflatten(1, (num_experts, -1)).sum(2).double()
    total = float(counts.sum())
    inside = float(sums.square().sum()) - total
    everything = float(sums.sum(1).square().sum()) - total
    pairs = float((counts * (counts - 1)).sum())
    others = total * (total - 1) - pairs
    return inside / max(pairs, 1), (everything - inside) / max(others, 1), int((~alive).sum())


def answers(
    mass: torch.Tensor, tokens: torch.Tensor, names: Mapping[int, str]
) -> dict[int, list[tuple[str, float]]]:
    """By expert, the ``ANSWERS`` tokens that give it most, in times its even share.

    ``mass`` [T, E] is what each of ``tokens`` [T] gives each expert; ``names`` as in ``measure``.
    """
    num_experts = mass.shape[1]
    share = num_experts * mass / mass.sum(1, keepdim=True).clamp_min(1e-30)
    ids, which, occurrences = tokens.unique(return_inverse=True, return_counts=True)
    mean = torch.zeros(len(ids), num_experts).index_add_(0, which, share) / occurrences[:, None]
    mean[occurrences < OCCURRENCES] = 0
    best = mean.topk(min(ANSWERS, len(ids)), dim=0)
    return {
        expert: [
            (names[int(ids[row])], float(value))
            for row, value in zip(
                best.indices[:, expert].tolist(), best.values[:, expert].tolist(), strict=True
            )
            if value > 0
        ]
        for expert in range(num_experts)
    }


def collect(
    model: Any, modules: Mapping[int, str], tokens: torch.Tensor, progress: bool
) -> dict[int, torch.Tensor]:
    """Activations [T, D] by layer of a transformers ``model`` reading ``tokens`` [T].

    ``modules`` names each layer's down projection, whose input they are. The text is read in
    windows of 512 tokens, kept in the model's dtype.
    """
    kept: dict[int, list[torch.Tensor]] = {layer: [] for layer in modules}

    def keep(layer: int) -> Any:
        return lambda module, inputs: kept[layer].append(inputs[0][0].detach())

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(keep(layer))
        for layer, name in modules.items()
    ]
    try:
        with torch.inference_mode():
            for window in tqdm(tokens.split(WINDOW), "reading", disable=not progress):
                model(window[None], use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: torch.cat(parts) for layer, parts in kept.items()}


def read_text(path: Path, tokenizer: Any, limit: int) -> torch.Tensor:
    """The first ``limit`` tokens of a text file; ``ExpertsError`` if it has fewer than 16."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ExpertsError(f"pacellm: the text {path} cannot be read: {error}.") from None
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][:limit])
    if len(tokens) < 16:
        raise ExpertsError(
            f"pacellm: {path} has {len(tokens)} tokens; correlations need at least 16, and some "
            "hundreds to mean anything."
        )
    return tokens
