"""What a benchmark run found: scores and intervals by task and category."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from pacellm_vllm.evals.bootstrap import grouped_difference
from pacellm_vllm.evals.questions import LOGPROB
from pacellm_vllm.evals.records import EvalError, Records, write_whole
from pacellm_vllm.evals.report import endings, unchecked
from pacellm_vllm.evals.suite import Loaded, by_label
from pacellm_vllm.evals.tasks import Category

Scores = dict[str, list[float]]


def write_report(
    out: Path,
    loaded: Sequence[Loaded],
    categories: Sequence[Category],
    names: Sequence[str],
    records: Records,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """``report.json`` and ``report.md``; differences are to the first configuration.

    ``EvalError`` where configurations were not asked the same prompts.
    """
    metrics = {task.ask.task: task.metric for task in loaded}
    found = by_label(loaded, records, names)
    tasks: dict[str, Any] = {}
    scores: dict[str, Scores] = {}
    for label, rows in found.items():
        task = label.partition("@")[0]
        _same_prompts(label, rows)
        scores[label] = {
            name: [row["scores"][metrics[task]] for row in rows[name]] for name in names
        }
        tokens = [row["tokens"] for row in rows[names[0]]]
        tasks[label] = {
            "metric": metrics[task],
            "cut": sum(row["cut"] > 0 for row in rows[names[0]]),
            "endings": {
                name: {
                    how: sum(how in row.get("ended", ()) for row in rows[name])
                    for how in ("cut", "empty")
                }
                for name in names
            },
            "tokens": {"median": sorted(tokens)[len(tokens) // 2], "most": max(tokens)},
            **_compared([scores[label]], names, by_size=False),
        }
    report = {
        "settings": dict(settings),
        "engines": {name: records.engines[name] for name in names},
        "tasks": tasks,
        "categories": {
            title: _compared([scores[label] for label in labels], names, by_size)
            for title, labels, by_size in _groups(categories, tasks)
        },
    }
    write_whole(out / "report.json", json.dumps(report, indent=1) + "\n")
    write_whole(out / "report.md", as_markdown(report))
    return report


def _groups(
    categories: Sequence[Category], labels: Mapping[str, Any]
) -> list[tuple[str, list[str], bool]]:
    """Title, labels and weighting of each category, one for each length where tasks have some."""
    groups = []
    for category in categories:
        mine = [label for label in labels if label.partition("@")[0] in category.tasks]
        for part in dict.fromkeys(label.partition("@")[2] for label in mine):
            title = f"{category.name}@{part}" if part else category.name
            chosen = [label for label in mine if label.partition("@")[2] == part]
            groups.append((title, chosen, category.by_size))
    return groups


def _same_prompts(label: str, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    first, *others = rows
    for other in others:
        for a, b in zip(rows[first], rows[other], strict=True):
            if a["prompt"] != b["prompt"]:
                raise EvalError(
                    f"pacellm: {first} and {other} were asked different prompts in {label} "
                    f"(first in {a['id']}), so they cannot be compared; give both engines one "
                    "max_model_len, or set --max-length."
                )


def _compared(tasks: Sequence[Scores], names: Sequence[str], by_size: bool) -> dict[str, Any]:
    first, *others = names
    items = sum(len(task[first]) for task in tasks)
    differences = {}
    for name in others:
        found = grouped_difference([(task[first], task[name]) for task in tasks], by_size)
        differences[name] = {**vars(found), "verdict": found.verdict}
    means = {
        name: fmean([s for task in tasks for s in task[name]])
        if by_size
        else fmean(fmean(task[name]) for task in tasks)
        for name in names
    }
    return {"items": items, "scores": means, "differences": differences}


def as_markdown(report: Mapping[str, Any]) -> str:
    settings, engines = report["settings"], report["engines"]
    names = list(settings["configs"])
    first, *others = names
    lines = [
        f"# {settings['model']}: {', '.join(names)}",
        "",
        "Scores are points of 100, but nats where the metric is `logprob`. "
        f"Differences are to `{first}` on the same items, with paired "
        "bootstrap 95 % intervals. `better`: the interval is above 0; `no worse`: it does not "
        "reach down to -0.6 points (-0.006 nats); `worse`: it is below 0. `equal on every "
        "item` does not say that there is no difference, only that these items show none.",
        "",
    ]
    for kind, column in (("categories", "category"), ("tasks", "task")):
        if not report[kind]:
            continue
        titles = [column, "items", *names]
        titles += [f"{name} - {first}" for name in others]
        lines += ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
        for label, row in report[kind].items():
            cells = [label, str(row["items"])]
            scale, digits = (1, 4) if row.get("metric") == LOGPROB else (100, 2)
            cells += [f"{scale * row['scores'][name]:.{digits}f}" for name in names]
            cells += [_difference(row["differences"][name], scale, digits) for name in others]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    room = min(engine["engine"]["max_model_len"] for engine in engines.values())
    lines += _how(settings, report["tasks"], room)
    lines += ["## Engines", ""]
    for name in names:
        memory = settings["configs"][name]
        lines.append(f"- `{name}`: {'off' if memory is None else _json(memory)}; engine:")
        lines.append(f"  {_json(engines[name])}")
    return "\n".join([*lines, *unchecked(engines)]) + "\n"


def _difference(found: Mapping[str, Any], scale: int, digits: int) -> str:
    mean, low, high = (f"{scale * found[name]:+.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}] {found['verdict']}"


def _at_most(max_length: int | None, room: int) -> str:
    """The limit of a prompt's text, and the engine's where that is what cuts."""
    if max_length is None:
        return f"the model's {room}"
    return str(max_length) if max_length < room else f"{max_length}, but the model has {room}"


def _how(settings: Mapping[str, Any], tasks: Mapping[str, Any], room: int) -> list[str]:
    versions = ", ".join(f"{name} {value}" for name, value in settings["versions"].items())
    lines = [
        "## How it was measured",
        "",
        f"Greedy, seed {settings['seed']}, {settings['batch']} items at once, "
        f"{'a running server' if settings['server'] else 'in one process'}, protocol "
        f"{settings['protocol'] or 'of the flags'}, data from {settings['data']}. {versions}.",
        "Prompts that are too long lose their middle.",
        "",
        "| task | metric | lm-eval's version | examples | chat template | prompt tokens at most | "
        "median | longest | cut |",
        "|---" * 9 + "|",
    ]
    for label, row in tasks.items():
        ask = settings["tasks"][label.partition("@")[0]]
        cells = [
            label,
            row["metric"],
            ask["lm_eval_version"],
            "the task's" if ask["fewshot"] is None else ask["fewshot"],
            "yes" if ask["chat"] else "no",
            _at_most(ask["max_length"], room),
            row["tokens"]["median"],
            row["tokens"]["most"],
            f"{row['cut']} of {row['items']}",
        ]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    for label, row in tasks.items():
        for name, ended in row["endings"].items():
            where = f"{label}, `{name}`"
            lines += endings(where, ended["cut"], ended["empty"], row["items"])
    return [*lines, ""]


def _json(value: Any) -> str:
    return f"`{json.dumps(value)}`"
