"""Pictures of results, as PNG files."""

from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pacellm_vllm.evals.records import EvalError


def require_matplotlib() -> None:
    """Raise ``EvalError`` where it is not installed."""
    if find_spec("matplotlib") is None:
        raise EvalError("pacellm: pictures need matplotlib; pip install 'pacellm-vllm[eval]'.")


def _new(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def heat_map(
    path: Path,
    rows: Sequence[Sequence[float]],
    lengths: Sequence[int],
    depths: Sequence[float],
    title: str,
    difference: bool = False,
) -> None:
    """Rows are depths, columns context lengths; red 0 to green 1, or -1 to 1 for a difference."""
    figure = _new(1.6 + 0.75 * len(lengths), 1.5 + 0.42 * len(depths))
    axes = figure.subplots()
    low, high = (-1, 1) if difference else (0, 1)
    image = axes.imshow(rows, cmap="RdYlGn", vmin=low, vmax=high, aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
    axes.set_yticks(range(len(depths)), [f"{d:g}" for d in depths])
    axes.set_xlabel("context length (tokens)")
    axes.set_ylabel("depth (%)")
    axes.set_title(title, fontsize=10)
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            text = f"{value:+.2f}" if difference else f"{value:.2f}"
            axes.text(x, y, text, ha="center", va="center", fontsize=8)
    figure.colorbar(image)
    figure.savefig(path, dpi=90)


def curves(
    path: Path, lines: dict[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str
) -> None:
    """One line per name over a logarithmic x axis."""
    figure = _new(6, 3.6)
    axes = figure.subplots()
    for name, (xs, ys) in lines.items():
        axes.plot(xs, ys, marker="o", markersize=3, label=name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=90)


def memory_map(
    path: Path,
    layers: dict[int, tuple[Any, Any, Any, Sequence[str]]],
) -> None:
    """Per layer: slots as dots coloured by usage, current tokens as crosses, in two dimensions.

    Slots that speak for one token are named once, with their number.

    ``layers`` maps an index to (slots [m, 2], usage [m], current [n, 2], the slots' tokens).
    """
    figure = _new(5.6 * len(layers), 4.8)
    panels = figure.subplots(1, len(layers), squeeze=False)[0]
    for axes, (index, (slots, usage, current, words)) in zip(panels, layers.items(), strict=True):
        axes.scatter(current[:, 0], current[:, 1], marker="x", s=14, c="0.6", label="current")
        dots = axes.scatter(slots[:, 0], slots[:, 1], s=26, c=usage, cmap="viridis", label="stored")
        for word, count in Counter(words).items():
            said = word.strip() or repr(word)
            axes.annotate(
                f"{said} x {count}" if count > 1 else said,
                slots[words.index(word)],
                fontsize=7,
                alpha=0.8,
            )
        axes.set_title(f"layer {index}", fontsize=10)
        axes.legend(fontsize=7, loc="upper right")
        figure.colorbar(dots, label="usage")
    figure.savefig(path, dpi=90)


def slot_history(path: Path, layers: dict[int, Sequence[dict[str, Any]]]) -> None:
    """Per layer, by segment: what became of slots, how alike they are, and the usage of each.

    ``layers`` maps an index to commits as ``serving.recorder.BankRecorder`` notes them.
    """
    figure = _new(5.6 * len(layers), 6.4)
    panels = figure.subplots(2, len(layers), squeeze=False)
    for (upper, lower), (index, commits) in zip(panels.T, layers.items(), strict=True):
        segments = [commit["segment"] for commit in commits]
        for name in ("valid", "merged", "replaced", "dropped"):
            upper.plot(segments, [commit[name] for commit in commits], label=name)
        upper.set_title(f"layer {index}", fontsize=10, pad=20)
        upper.set_ylabel("slots (dropped: tokens)")
        upper.legend(fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
        upper.xaxis.get_major_locator().set_params(integer=True)
        alike = upper.twinx()
        cosines = [float("nan") if c["cosine"] is None else c["cosine"] for c in commits]
        alike.plot(segments, cosines, color="0.4", linestyle=":")
        alike.set_ylim(-1, 1)
        alike.set_ylabel("mean cosine of two slots (dotted)", fontsize=8)
        height = max(commit["valid"] for commit in commits)
        rows = [
            [
                commit["usage"][slot] if slot < commit["valid"] else float("nan")
                for commit in commits
            ]
            for slot in range(height)
        ]
        image = lower.imshow(
            rows,
            aspect="auto",
            interpolation="nearest",
            extent=(segments[0] - 0.5, segments[-1] + 0.5, height - 0.5, -0.5),
        )
        lower.xaxis.get_major_locator().set_params(integer=True)
        lower.set_xlabel("segment")
        lower.set_ylabel("slot")
        figure.colorbar(image, label="usage")
    figure.savefig(path, dpi=90)
