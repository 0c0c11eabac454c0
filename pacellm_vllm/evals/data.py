"""Benchmarks' own files in a directory, in place of a download."""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pacellm_vllm.evals.records import EvalError

Row = dict[str, Any]


def _as_it_is(row: Row) -> Row:
    return row


def _longbench(row: Row) -> Row:
    # lm-eval reads a copy of the dataset that has another name for it.
    question = row.get("question", row["input"])
    return {
        "question": question,
        "context": row["context"],
        "answers": [row["answers"]] if isinstance(row["answers"], str) else list(row["answers"]),
        "all_classes": row["all_classes"] or [],
    }


def _infinitebench(row: Row) -> Row:
    # Some tasks' files have one answer where others have a list, or numbers.
    answer, options = (
        [str(value) for value in (given if isinstance(given, list) else [given])]
        for given in (row["answer"], row["options"] or [])
    )
    texts = {name: str(row[name]) for name in ("context", "input")}
    return {"id": int(row["id"]), **texts, "answer": answer, "options": options}


def _ruler(row: Row) -> Row:
    # Older files have no answer prefix: it ends their input.
    prefix = row.get("answer_prefix") or ""
    outputs = [str(output) for output in row["outputs"]]
    return {"input": row["input"], "outputs": outputs, "gen_prefix": prefix.strip()}


@dataclass(frozen=True)
class Benchmark:
    """Where files lie under a data directory, what a line of them holds, and where to get them.

    ``paths`` are tried in order, their ``{config}`` and ``{split}`` filled in; ``adapt`` turns
    a row with all ``fields`` into what lm-eval's task reads, or raises ``ValueError``.
    """

    paths: tuple[str, ...]
    fields: tuple[str, ...]
    source: str
    adapt: Callable[[Row], Row] = _as_it_is

    def row(self, given: Row, where: str) -> Row:
        """``given``, adapted; ``EvalError`` for one that is not what it should be."""
        missing = [name for name in self.fields if name not in given]
        if missing:
            raise EvalError(f"pacellm: {where}, has no {missing[0]}; {_description(self)}")
        try:
            return self.adapt(given)
        except ValueError as error:
            raise EvalError(f"pacellm: {where}: {error}; {_description(self)}") from None


BENCHMARKS = {
    "Xnhyacinth/LongBench": Benchmark(
        ("LongBench/data/{config}.jsonl", "LongBench/{config}.jsonl"),
        ("input", "context", "answers", "all_classes"),
        "data.zip of huggingface.co/datasets/THUDM/LongBench, unpacked in DATA/LongBench",
        _longbench,
    ),
    "xinrongzhang2022/InfiniteBench": Benchmark(
        # lm-eval's names of the splits are not quite those of the files.
        ("InfiniteBench/{split}.jsonl", "InfiniteBench/{split}g.jsonl"),
        ("id", "context", "input", "answer", "options"),
        "huggingface.co/datasets/xinrongzhang2022/InfiniteBench, its files in DATA/InfiniteBench",
        _infinitebench,
    ),
    "cais/mmlu": Benchmark(
        ("mmlu/{config}/{split}.jsonl", "mmlu/{config}/{split}-*.parquet"),
        ("question", "choices", "answer"),
        "huggingface.co/datasets/cais/mmlu, its folders in DATA/mmlu",
    ),
}

_RULER = Benchmark(
    ("ruler/{length}/data/{task}/validation.jsonl", "ruler/{length}/{task}/validation.jsonl"),
    ("input", "outputs"),
    "scripts/data/prepare.py of github.com/NVIDIA/RULER, run for the model's tokenizer and each "
    "length, its save_dir in DATA/ruler/LENGTH; or let lm-eval make it: no --data",
    _ruler,
)

_QUESTIONS = Benchmark(
    ("qa/{name}.jsonl",),
    ("question", "context", "answers"),
    "your own questions: context is a text, and answers a list, each of which is right",
)


def stay_offline() -> None:
    """Keep this process from asking a hub, or vLLM from counting its use."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", VLLM_NO_USAGE_STATS="1")
    # Its setting was read when it was imported.
    if (hub := sys.modules.get("huggingface_hub.constants")) is not None:
        hub.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


class DataDirectory:
    """``path`` holds benchmarks' files; ``EvalError`` says what a wrong one should be."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise EvalError(f"pacellm: --data {str(path)!r} is not a directory.")
        self.path = path

    def splits(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The ``datasets.Dataset`` of each split that an lm-eval task's ``config`` names."""
        fewshot = config.get("fewshot_config") or {}
        names = [config.get(f"{kind}_split") for kind in ("training", "validation", "test")]
        names += [config.get("fewshot_split"), fewshot.get("split")]
        values = {"config": config.get("dataset_name") or ""}
        benchmark = _benchmark(config["dataset_path"])
        return {
            name: _dataset(self._rows(benchmark, {**values, "split": name}))
            for name in dict.fromkeys(names)
            if name
        }

    def ruler(self, task: str, lengths: Sequence[int]) -> dict[str, Any]:
        """The test split of a task by NVIDIA's name, of all ``lengths`` or all that are there."""
        there = [int(p.name) for p in self.path.glob("ruler/*") if p.name.isdecimal()]
        rows = [
            {**row, "max_length": length}
            for length in lengths or sorted(there) or [4096]
            for row in self._rows(_RULER, {"task": task, "length": str(length)})
        ]
        return {"test": _dataset(rows)}

    def has_questions(self, name: str) -> bool:
        """Whether there is a file of questions about texts by that name."""
        return (self.path / "qa" / f"{name}.jsonl").is_file()

    def questions(self, name: str, adapt: Callable[[Row], Row]) -> dict[str, Any]:
        """The test split of such a file."""
        return {"test": _dataset(self._rows(replace(_QUESTIONS, adapt=adapt), {"name": name}))}

    def _rows(self, benchmark: Benchmark, values: Mapping[str, str]) -> list[Row]:
        paths = [path.format(**values) for path in benchmark.paths]
        for path in paths:
            if found := sorted(self.path.glob(path)):
                return [row for one in found for row in _read(one, benchmark)]
        other = f" (or {', or '.join(paths[1:])})" if paths[1:] else ""
        raise EvalError(
            f"pacellm: {self.path / paths[0]} is missing{other}; {_description(benchmark)}"
        )


def _benchmark(dataset: str) -> Benchmark:
    folder = dataset.rpartition("/")[2]
    return BENCHMARKS.get(dataset) or Benchmark(
        tuple(
            f"{folder}/{name}{end}"
            for name in ("{config}/{split}", "{split}", "data/{split}")
            for end in (".jsonl", ".json", "-*.parquet")
        ),
        (),
        f"huggingface.co/datasets/{dataset}, its files in DATA/{folder}",
    )


def _description(benchmark: Benchmark) -> str:
    fields = f"with {', '.join(benchmark.fields)}" if benchmark.fields else "of the dataset"
    return f"the file holds one JSON object per line {fields}; get it from {benchmark.source}."


def _read(path: Path, benchmark: Benchmark) -> list[Row]:
    rows = _parquet(path) if path.suffix == ".parquet" else _json(path, benchmark)
    if not rows:
        raise EvalError(f"pacellm: {path} is empty; {_description(benchmark)}")
    return [benchmark.row(row, f"{path}, row {number}") for number, row in enumerate(rows, 1)]


def _json(path: Path, benchmark: Benchmark) -> list[Row]:
    """An array, or one object per line."""
    text = path.read_text(encoding="utf-8")
    try:
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("not all are objects")
    except ValueError as error:
        raise EvalError(
            f"pacellm: {path} cannot be read ({error}); {_description(benchmark)}"
        ) from None
    return rows


def _parquet(path: Path) -> list[Row]:
    from pyarrow import parquet

    return parquet.read_table(path).to_pylist()


def _dataset(rows: list[Row]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(rows)
