"""What a needle run found: tables, intervals and pictures."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from pacellm_vllm.evals.bootstrap import Difference, paired_difference, warned
from pacellm_vllm.evals.niah import Grid, cell_means
from pacellm_vllm.evals.plots import heat_map
from pacellm_vllm.evals.records import Records, write_whole

SCORES = ("exact", "rouge_l")


def scores_of(
    records: Records, name: str, score: str, length: int | None = None, parity: int | None = None
) -> list[float]:
    """Scores of one configuration in item order: all, or of one length, or of every other item."""
    results = sorted((id_, r) for (config, id_), r in records.done.items() if config == name)
    return [
        r[score]
        for _, r in results
        if (length is None or r["length"] == length)
        and (parity is None or r["sample"] % 2 == parity)
    ]


def write_report(
    out: Path, grid: Grid, names: Sequence[str], records: Records, settings: dict[str, Any]
) -> dict[str, Any]:
    """``report.json``, ``report.md``, a heat map per configuration and one per difference.

    Differences are to the first configuration, on the same items.
    """
    first, *others = names
    report: dict[str, Any] = {
        "settings": settings,
        "engines": {name: records.engines[name] for name in names},
        "configs": {},
        "differences": {},
    }
    for name in names:
        cells = {score: cell_means(records.done, name, grid, score) for score in SCORES}
        report["configs"][name] = {
            **{score: fmean(scores_of(records, name, score)) for score in SCORES},
            **_endings_of(records, name),
            "by_length": {
                str(n): fmean(scores_of(records, name, "exact", n)) for n in grid.lengths
            },
            "cells": cells,
        }
        title = f"needle found (exact match): {name}"
        heat_map(out / f"heat-{name}.png", cells["exact"], grid.lengths, grid.depths, title)
    for name in others:
        lengths: list[int | None] = [None, *grid.lengths]
        found = {n: compare(records, first, name, n) for n in lengths}
        report["differences"][name] = {
            "all" if n is None else str(n): vars(difference) for n, difference in found.items()
        }
        a, b = (report["configs"][c]["cells"]["exact"] for c in (first, name))
        rows = [[y - x for x, y in zip(*pair, strict=True)] for pair in zip(a, b, strict=True)]
        path = out / f"difference-{name}-{first}.png"
        heat_map(path, rows, grid.lengths, grid.depths, f"{name} minus {first}", difference=True)
    write_whole(out / "report.json", json.dumps(report, indent=1) + "\n")
    write_whole(out / "report.md", as_markdown(report, first))
    return report


def compare(
    records: Records, first: str, name: str, length: int | None = None, parity: int | None = None
) -> Difference:
    """``name`` minus ``first`` in exact match."""
    return paired_difference(
        scores_of(records, first, "exact", length, parity),
        scores_of(records, name, "exact", length, parity),
    )


def as_markdown(report: dict[str, Any], first: str) -> str:
    grid = report["settings"]["grid"]
    lengths = [str(n) for n in grid["lengths"]]
    lines = [
        f"Exact match by context length (tokens), {grid['samples']} items for each of "
        f"{len(grid['depths'])} depths; differences to `{first}` with paired bootstrap 95 % "
        "intervals." + warned(grid["samples"] * len(grid["depths"]), "items a length"),
        "",
        "| | all | " + " | ".join(lengths) + " | ROUGE-L recall |",
        "|---" * (len(lengths) + 3) + "|",
    ]
    for name, config in report["configs"].items():
        cells = [config["exact"], *config["by_length"].values(), config["rouge_l"]]
        lines.append(f"| {name} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
    for name, by_length in report["differences"].items():
        cells = [str(Difference(**by_length[n])) for n in ["all", *lengths]]
        lines.append(f"| {name} - {first} | " + " | ".join(cells) + " | |")
    for name, config in report["configs"].items():
        lines += endings(f"`{name}`", config["cut"], config["empty"], config["answers"])
    lines += unchecked(report["engines"])
    return "\n".join(lines) + "\n"


def _endings_of(records: Records, name: str) -> dict[str, int]:
    mine = [result for (config, _), result in records.done.items() if config == name]
    ended = Counter(result.get("ended") for result in mine)
    return {"answers": len(mine), "cut": ended["cut"], "empty": ended["empty"]}


def endings(where: str, cut: int, empty: int, answers: int) -> list[str]:
    """A sentence about answers that say little of what a model knows; none where all are whole."""
    said = [
        f"{count} were {what}"
        for count, what in ((cut, "cut at the limit"), (empty, "empty"))
        if count
    ]
    if not said:
        return []
    return [
        f"\nOf {answers} answers of {where}, {' and '.join(said)}: a model that thinks first needs "
        "more tokens to come to its answer."
    ]


def unchecked(engines: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence for each configuration whose server did not say what it runs."""
    return [
        f"\nThat the server runs configuration `{name}` was not checked: it has no "
        "/plugins/pacellm/memory route (`pacellm serve` adds it)."
        for name, engine in engines.items()
        if engine.get("checked") is False
    ]
