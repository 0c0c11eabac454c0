"""The experts that a mixture was trained with: which tokens go to them, and which are together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table
from tqdm import tqdm

from pacellm_vllm.experts.errors import ExpertsError
from pacellm_vllm.experts.report import WINDOW, answers
from pacellm_vllm.experts.settings import EXPERT_COUNTS

PAIRS = 5


@dataclass(frozen=True)
class MixtureReport:
    """One layer's routed experts on a text.

    ``shares``: by expert, how many of the tokens went there; they sum to ``per_token``, the number
    of experts that a token takes. ``used``: how many experts an even spread would need for the
    same entropy. ``together``: the pairs chosen together most above chance, as (expert, expert,
    times as often as if chosen apart). ``answers``: by expert, the tokens that it answers to, with
    how many times its even share of their weight they give it.
    """

    per_token: int
    shares: tuple[float, ...]
    used: float
    together: tuple[tuple[int, int, float], ...]
    answers: Mapping[int, Sequence[tuple[str, float]]]


def routed_experts(config: Any) -> int:
    """How many routed experts a model of this configuration has; 0 for one without."""
    text = config.get_text_config()
    return max((getattr(text, name, None) or 0 for name in EXPERT_COUNTS), default=0)


def measure_routing(
    chosen: torch.Tensor,
    weights: torch.Tensor,
    num_experts: int,
    tokens: torch.Tensor,
    names: Mapping[int, str],
) -> MixtureReport:
    """``chosen`` [T, k] are experts, with ``weights`` [T, k], of ``tokens`` [T]."""
    taken = torch.zeros(len(chosen), num_experts).scatter_(1, chosen, 1.0)
    mass = torch.zeros(len(chosen), num_experts).scatter_(1, chosen, weights.float().abs())
    shares = taken.double().mean(0)
    spread = shares / shares.sum()
    entropy = -(spread * spread.clamp_min(1e-30).log()).sum()
    both = taken.T.double() @ taken.double() / len(taken)
    lift = torch.triu(both / torch.outer(shares, shares).clamp_min(1e-30), diagonal=1)
    # Of pairs so rare that chance alone may have made them, nothing is said.
    lift[both * len(taken) < PAIRS] = 0
    best = lift.flatten().topk(min(PAIRS, lift.numel()))
    return MixtureReport(
        chosen.shape[1],
        tuple(shares.tolist()),
        float(entropy.exp()),
        tuple(
            (int(at) // num_experts, int(at) % num_experts, float(value))
            for value, at in zip(*best, strict=True)
            if value > 0
        ),
        answers(mass, tokens, names),
    )


def read_routing(
    model: Any, tokens: torch.Tensor, layers: Sequence[int] | None, progress: bool
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Experts [T, k] and weights [T, k] by layer of a transformers ``model`` reading ``tokens``.

    They are what its modules named ``experts`` are given: (states, experts, weights). Raises
    ``ExpertsError`` where there is none such.
    """
    kept: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def keep(layer: int) -> Any:
        def hook(module: Any, given: Any) -> None:
            if len(given) >= 3 and given[1].dtype in (torch.int32, torch.int64):
                kept.setdefault(layer, []).append((given[1].long(), given[2].detach()))

        return hook

    hooks = []
    for name, module in model.named_modules():
        parts = name.split(".")
        if parts[-1] == "experts" and "layers" in parts:
            layer = int(parts[parts.index("layers") + 1])
            if layers is None or layer in layers:
                hooks.append(module.register_forward_pre_hook(keep(layer)))
    try:
        with torch.inference_mode():
            for window in tqdm(tokens.split(WINDOW), "reading", disable=not progress):
                model(window[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if not kept:
        raise ExpertsError(
            f"pacellm: {type(model).__name__} of transformers does not hand its routing to its "
            f"experts{' in these layers' if layers else ''}, so nothing can be seen of it; "
            "inspect another model or other layers."
        )
    return {
        layer: (torch.cat([e for e, _ in parts]), torch.cat([w for _, w in parts]))
        for layer, parts in sorted(kept.items())
    }


def table(reports: Mapping[int, MixtureReport], title: str) -> Table:
    made = Table(title=title)
    for column in ("layer", "experts", "a token takes", "used evenly", "unused", "busiest"):
        made.add_column(column, justify="right")
    made.add_column("most together (times chance)")
    made.add_column("most selective expert: tokens (times its even share)")
    for layer, report in reports.items():
        busiest = max(range(len(report.shares)), key=report.shares.__getitem__)
        expert, tokens = max(
            report.answers.items(), key=lambda item: item[1][0][1] if item[1] else 0.0
        )
        made.add_row(
            str(layer),
            str(len(report.shares)),
            str(report.per_token),
            f"{report.used:.1f}",
            str(report.shares.count(0)),
            f"{busiest}: {100 * report.shares[busiest]:.1f} % of tokens",
            ", ".join(f"{a} and {b} {value:.1f}" for a, b, value in report.together[:2]),
            f"{expert}: " + ", ".join(f"{token!r} {value:.1f}" for token, value in tokens[:3]),
        )
    return made


def draw(reports: Mapping[int, MixtureReport], title: str, path: Path) -> None:
    """Write a PNG: the share of tokens of every expert in every layer, busiest first."""
    figure = Figure(figsize=(9, 1.5 + 0.25 * len(reports)), layout="constrained")
    axes = figure.subplots()
    rows = [sorted((100 * s for s in r.shares), reverse=True) for r in reports.values()]
    image = axes.imshow(rows, aspect="auto", cmap="viridis", vmin=0)
    axes.set_yticks(range(len(reports)), [str(layer) for layer in reports])
    axes.set(title=title, xlabel="experts, the busiest first", ylabel="layer")
    figure.colorbar(image, label="share of tokens (%)")
    figure.savefig(path, format="png", dpi=130)
