"""The report on experts as a picture and as a table."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from rich.table import Table

from pacellm_vllm.experts.report import SHARES, LayerReport


def draw(reports: Mapping[int, LayerReport], title: str, path: Path) -> None:
    """Write a PNG: how activation concentrates, and how neurons correlate, in every layer."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    figure.suptitle(title)
    left, middle, right = figure.subplots(1, 3)
    colours = matplotlib.colormaps["viridis"]
    last = max(len(reports) - 1, 1)
    for i, (layer, report) in enumerate(reports.items()):
        share = [100 * (n + 1) / report.num_experts for n in range(report.num_experts)]
        style = {"color": colours(0.9 * i / last), "linewidth": 1.3}
        held = [100 * value for value in report.curve]
        left.plot(share, held, label=f"layer {layer}" if len(reports) <= 8 else None, **style)
        randomly = [100 * value for value in report.curve_random]
        left.plot(share, randomly, linestyle=":", **style)
    left.plot([], [], color="grey", label="experts")
    left.plot([], [], color="grey", linestyle=":", label="random split")
    left.set(
        xlabel="most active experts of a token (%)",
        ylabel="share of its activation (%)",
        xlim=(0, 100),
        ylim=(0, 102),
    )
    left.legend(fontsize=8, loc="lower right")
    left.grid(alpha=0.3)

    places = range(len(reports))
    names = [str(layer) for layer in reports]
    step = max(1, len(names) // 14)
    width = 0.4
    for offset, label, values, colour in (
        (-width / 2, "experts", [r.needed[1] for r in reports.values()], "tab:blue"),
        (width / 2, "random split", [r.needed_random[1] for r in reports.values()], "lightgrey"),
    ):
        middle.bar([p + offset for p in places], [100 * v for v in values], width, color=colour)
        middle.bar([0], [0], color=colour, label=label)
    middle.set(xlabel="layer", ylabel=f"experts for {SHARES[1]:.0%} of activation (%)")
    middle.set_ylim(0, 118)
    middle.set_xticks(list(places)[::step], names[::step])
    middle.legend(fontsize=8, loc="upper right", ncols=2)

    right.plot(places, [r.within for r in reports.values()], "o-", label="within an expert")
    right.plot(places, [r.between for r in reports.values()], "s--", label="between experts")
    right.axhline(0, color="grey", linewidth=0.8)
    right.set(xlabel="layer", ylabel="mean correlation of two neurons' |activation|")
    right.set_xticks(list(places)[::step], names[::step])
    right.margins(y=0.25)
    right.legend(fontsize=8, loc="upper right")
    figure.savefig(path, format="png", dpi=130)


def table(reports: Mapping[int, LayerReport], title: str) -> Table:
    """The same as a table, with the tokens that the most selective expert of a layer answers to."""
    made = Table(title=title)
    made.add_column("layer", justify="right")
    for share in SHARES:
        made.add_column(f"experts for {share:.0%} (random)", justify="right")
    made.add_column("correlation inside / across", justify="right")
    made.add_column("most selective expert: tokens (times its even share)")
    for layer, report in reports.items():
        shares = [
            f"{100 * ours:.1f} % ({100 * other:.1f} %)"
            for ours, other in zip(report.needed, report.needed_random, strict=True)
        ]
        expert, tokens = max(
            report.answers.items(), key=lambda item: item[1][0][1] if item[1] else 0.0
        )
        said = ", ".join(f"{token!r} {value:.1f}" for token, value in tokens[:3])
        both = f"{report.within:.3f} / {report.between:.3f}"
        made.add_row(str(layer), *shares, both, f"{expert}: {said}")
    return made
