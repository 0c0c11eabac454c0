"""Benchmarks of lm-eval: which tasks a name stands for, their items and their scores."""

import difflib
import io
import logging
import random
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from pacellm_vllm.evals import questions
from pacellm_vllm.evals.data import DataDirectory
from pacellm_vllm.evals.records import EvalError
from pacellm_vllm.sentences import first_line

# Folders of lm-eval's tasks to look for a name first: reading all of them takes half a minute.
_FOLDERS = ("longbench", "infinitebench", "ruler", "mmlu/default")

# NVIDIA's name of each task of RULER, how many tokens are generated, and whether one of the
# expected answers is enough.
_RULER = {
    **{
        name: (name, 128, False)
        for name in (
            *(f"niah_{kind}_{i}" for kind in ("single", "multikey") for i in (1, 2, 3)),
            "niah_multiquery",
            "niah_multivalue",
        )
    },
    "ruler_vt": ("vt", 30, False),
    "ruler_cwe": ("cwe", 120, False),
    "ruler_fwe": ("fwe", 50, False),
    "ruler_qa_squad": ("qa_1", 32, True),
    "ruler_qa_hotpot": ("qa_2", 32, True),
}

# What lm-eval generates until it is long enough, and then does not fit.
_RULER_ENDLESS, _RULER_SHORTEST = ("ruler_cwe", "ruler_vt"), 4096


@dataclass(frozen=True)
class Category:
    """Tasks whose mean is reported: of tasks, or of all their items."""

    name: str
    tasks: tuple[str, ...]
    by_size: bool = False


@dataclass
class Item:
    """One document of a task; ``instances`` are lm-eval's requests about it.

    ``part`` splits a task's items where it has several lengths, else it is empty.
    """

    id: str
    part: str
    instances: list[Any] = field(repr=False)


class Messages(list[dict[str, str]]):
    """A chat that is not rendered yet, where lm-eval expects a prompt's text."""


class Library:
    """lm-eval's tasks, their data from ``data`` or, without it, from where lm-eval gets them.

    ``lengths`` are RULER's. Raises ``EvalError`` for what cannot be run.
    """

    def __init__(
        self,
        names: Sequence[str],
        model: str,
        data: DataDirectory | None = None,
        lengths: Sequence[int] = (),
    ) -> None:
        require_lm_eval()
        import lm_eval.tasks

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self._data, self._lengths = data, tuple(lengths)
        metadata = {"tokenizer": model, **({"max_seq_lengths": [*lengths]} if lengths else {})}
        root = Path(lm_eval.tasks.__file__).parent
        some = [root / folder for folder in _FOLDERS]
        self._manager = lm_eval.tasks.TaskManager(
            include_defaults=False, include_path=some, metadata=metadata
        )
        theirs = [name for name in names if not self._is_file(name)]
        if not all(name in self._manager.task_index for name in theirs):
            self._manager = lm_eval.tasks.TaskManager(metadata=metadata)
        for name in theirs:
            if name not in self._manager.task_index:
                near = difflib.get_close_matches(name, self._manager.all_tasks, 3)
                hint = f"; did you mean {' or '.join(near)}?" if near else "."
                raise EvalError(f"pacellm: lm-eval has no task or group {name!r}{hint}")

    def _is_file(self, name: str) -> bool:
        """Whether ``name`` is a task about a file of questions."""
        file = questions.file_of(name)
        return bool(file and self._data and self._data.has_questions(file))

    def expand(self, name: str) -> tuple[list[str], list[Category]]:
        """The tasks that ``name`` stands for, and it and the groups in it as categories."""
        if self._is_file(name) or name in self._manager.all_subtasks:
            return [name], []
        entry = self._manager.task_index[name]
        if name in self._manager.all_tags:
            tasks = sorted(entry.tags)
            return tasks, [Category(name, tuple(tasks))]
        tasks, inner = [], []
        for member in entry.cfg["task"]:
            if isinstance(member, dict):
                raise EvalError(
                    f"pacellm: lm-eval's group {name!r} changes its tasks; name tasks themselves."
                )
            found, categories = self.expand(member)
            tasks += found
            # A tag is how a group lists its tasks, not a part of it.
            inner += [c for c in categories if c.name in self._manager.all_groups]
        weighted = (entry.cfg.get("aggregate_metric_list") or [{}])[0].get("weight_by_size", False)
        return tasks, [Category(name, tuple(tasks), weighted), *inner]

    def load(self, name: str) -> Any:
        """The task ``name`` with its data, as an lm-eval ``ConfigurableTask``."""
        short = [length for length in self._lengths if length < _RULER_SHORTEST]
        if self._data is None and name in _RULER_ENDLESS and short:
            raise EvalError(
                f"pacellm: lm-eval never ends making {name} of {short[0]} tokens; ask for "
                f"--lengths of {_RULER_SHORTEST} or more, leave it out of --tasks, or give its "
                "files with --data."
            )
        # What lm-eval generates comes from these.
        random.seed(0)
        np.random.seed(0)
        index = self._manager.task_index
        spec: dict[str, Any] = {"task": name}
        if self._data is not None and name in _RULER:
            spec |= _ruler_config(name, self._data, self._lengths)
        elif self._data is not None and self._is_file(name):
            file, adapt = questions.file_of(name) or "", questions.reader_of(name)
            read = partial(self._data.questions, file, adapt)
            spec |= questions.task_config(name, partial(_ignoring, read))
        elif self._data is not None:
            config = index[name].cfg or {}
            read = partial(_ignoring, partial(self._data.splits, config))
            spec = {"group": "pacellm", "task": [{**spec, "custom_dataset": read}]}
        else:
            spec = {"group": "pacellm", "task": [spec]}
        try:
            with redirect_stderr(io.StringIO()), warnings.catch_warnings():
                # A package that one metric uses would be faster with another.
                warnings.filterwarnings("ignore", "Using slow pure-python")
                task = self._manager.load(spec)["tasks"][name]
        except ImportError as error:
            raise EvalError(f"pacellm: lm-eval's {name} cannot be loaded: {error}") from None
        except (OSError, ConnectionError) as error:
            raise EvalError(
                f"pacellm: the data of {name} cannot be read ({first_line(error)}); put its "
                "files in a directory and name it with --data (docs/evaluation.md)."
            ) from None
        _refuse(name, task)
        return task


def require_lm_eval() -> None:
    """Raise ``EvalError`` where lm-eval is not installed."""
    if find_spec("lm_eval") is None:
        raise EvalError("pacellm: benchmarks need lm-eval; pip install 'pacellm-vllm[eval]'.")


def _ignoring(read: Any, **_: Any) -> Any:
    """lm-eval hands a dataset's settings to what replaces it."""
    return read()


def _ruler_config(name: str, data: DataDirectory, lengths: Sequence[int]) -> dict[str, Any]:
    """RULER on files: lm-eval's own tasks fetch and generate even to be loaded."""
    from lm_eval.tasks.ruler.common_utils import process_results, process_results_part

    theirs, tokens, one_is_enough = _RULER[name]
    return {
        "custom_dataset": partial(_ignoring, partial(data.ruler, theirs, lengths)),
        "dataset_path": "",
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{input}}",
        "doc_to_target": "{{outputs}}",
        "gen_prefix": "{{gen_prefix}}",
        "process_results": process_results_part if one_is_enough else process_results,
        "metric_list": [{"metric": "score", "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": {"max_gen_toks": tokens, "until": []},
        "metadata": {"version": "files"},
    }


def _refuse(name: str, task: Any) -> None:
    wrong = None
    if getattr(task, "UNSAFE_CODE", False):
        wrong = "runs code that a model wrote"
    elif getattr(task, "MULTIMODAL", False):
        wrong = "is not of text alone"
    elif task.OUTPUT_TYPE == "loglikelihood_rolling":
        wrong = "scores whole documents"
    elif (task.config.repeats or 1) > 1:
        wrong = "asks each item several times, and greedy answers are the same every time"
    if wrong:
        raise EvalError(f"pacellm: lm-eval's {name} {wrong}, which pacellm eval suite does not.")


def build_items(
    task: Any, limit: int | None, fewshot: int | None, chat: bool, seed: int
) -> list[Item]:
    """Items of a loaded task, at most ``limit`` of each part, their prompts in ``instances``.

    With ``chat`` a prompt is ``Messages``, else text. ``fewshot`` None leaves the task's own.
    """
    if fewshot is not None:
        task.set_config("num_fewshot", fewshot)
    task.set_fewshot_seed(seed)
    parts: dict[str, list[int]] = {}
    for number, doc in enumerate(task.eval_docs):
        parts.setdefault(str(doc.get("max_length", "")) if _is_ruler(task) else "", []).append(
            number
        )
    chosen = {number: part for part, all_ in parts.items() for number in all_[:limit]}
    numbers = sorted(chosen)
    with redirect_stderr(io.StringIO()):
        task.build_all_requests(
            samples=numbers,
            apply_chat_template=chat,
            chat_template=_unrendered if chat else None,
        )
    items: dict[int, Item] = {}
    for instance in task.instances:
        number = numbers[instance.doc_id]
        id_ = f"{task.config.task}/{number}"
        items.setdefault(number, Item(id_, chosen[number], [])).instances.append(instance)
    return list(items.values())


def _unrendered(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> Messages:
    return Messages(messages)


def score(task: Any, item: Item, outputs: Sequence[Any]) -> dict[str, float]:
    """Scores of one item by metric, from what was answered to each of its instances."""
    for instance, output in zip(item.instances, outputs, strict=True):
        instance.resps, instance.filtered_resps = [output], {}
    # lm-eval filters the answers that a task holds.
    task._instances = item.instances
    task.apply_filters()
    name = next(iter(item.instances[0].filtered_resps))
    answers = [instance.filtered_resps[name] for instance in item.instances]
    found = task.process_results(item.instances[0].doc, answers)
    if _is_ruler(task):
        # By length, and -1 for all other lengths.
        return {"score": float(found[item.part])}
    return {k: float(v) for k, v in found.items() if isinstance(v, int | float | np.number)}


def metric_of(task: Any) -> str:
    """The metric that counts: the first whose mean over items is the task's result."""
    from lm_eval.api.metrics import mean

    if _is_ruler(task):
        return "score"
    for name, how in task.aggregation().items():
        if how is mean and task.higher_is_better()[name]:
            return name
    raise EvalError(
        f"pacellm: no metric of lm-eval's {task.config.task} is a mean over items, higher is "
        "better, so configurations cannot be compared item by item; leave that task out."
    )


def _is_ruler(task: Any) -> bool:
    return task.config.task in _RULER


def generation(instance: Any) -> tuple[int, list[str]]:
    """Tokens to generate and texts to stop at; sampling settings are passed over: greedy."""
    settings: Mapping[str, Any] = instance.args[1]
    until = settings.get("until") or []
    return int(settings.get("max_gen_toks", 256)), [until] if isinstance(until, str) else [*until]
