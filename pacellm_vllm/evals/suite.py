"""Asking every item of some tasks, and what is recorded of the answers."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from tqdm import tqdm

from pacellm_vllm.evals.answers import Answer, Answerer
from pacellm_vllm.evals.prompts import Fitted, Fitter
from pacellm_vllm.evals.protocol import Ask
from pacellm_vllm.evals.records import Records
from pacellm_vllm.evals.tasks import Item, Library, build_items, generation, metric_of, score


@dataclass(frozen=True)
class Loaded:
    """A task, what is asked of it, its items and the metric that counts."""

    ask: Ask
    task: Any
    items: list[Item]
    metric: str

    def describe(self) -> dict[str, Any]:
        """As JSON, with a hash of all prompts: other data is another measurement."""
        digest = hashlib.sha256()
        for item in self.items:
            for instance in item.instances:
                digest.update(repr((item.id, instance.args)).encode())
        given = asdict(self.ask)
        version = (self.task.config.metadata or {}).get("version")
        return {
            **{name: given[name] for name in ("max_length", "chat", "fewshot")},
            "metric": self.metric,
            "lm_eval_version": version,
            "items": len(self.items),
            "sha256": digest.hexdigest()[:16],
        }


def load(
    library: Library, asks: Sequence[Ask], limit: int | None, seed: int, progress: bool
) -> list[Loaded]:
    """Every task with its items; ``EvalError`` for data that is missing or unfit."""
    loaded = []
    for ask in tqdm(asks, desc="tasks", unit="task", disable=not progress):
        task = library.load(ask.task)
        metric = metric_of(task)
        loaded.append(
            Loaded(ask, task, build_items(task, limit, ask.fewshot, ask.chat, seed), metric)
        )
    return loaded


def longest_generation(loaded: Sequence[Loaded]) -> int:
    """Tokens that an answer may take, at most, over all tasks."""
    return max(_room_for_answer(task.items[0]) for task in loaded)


def missing(loaded: Sequence[Loaded], name: str, records: Records) -> int:
    """How many items of configuration ``name`` are not in ``records``."""
    return sum((name, item.id) not in records.done for task in loaded for item in task.items)


def run_tasks(
    loaded: Sequence[Loaded],
    tokenizer: Any,
    name: str,
    answerer: Answerer,
    records: Records,
    batch: int,
    *,
    render: bool,
    progress: bool,
) -> None:
    """Answer what ``records`` lacks of configuration ``name``, ``batch`` items at a time.

    Unless ``render``, chats go to the answerer as messages.
    """
    total = sum(len(task.items) for task in loaded)
    with closing(tqdm(total=total, desc=name, disable=not progress, unit="item")) as bar:
        bar.update(total - missing(loaded, name, records))
        for task in loaded:
            fitter = Fitter(tokenizer, task.ask.max_length)
            waiting = [item for item in task.items if (name, item.id) not in records.done]
            for begin in range(0, len(waiting), batch):
                items = waiting[begin : begin + batch]
                for item, fitted, outputs in _ask(items, fitter, answerer, render):
                    said = [o.text if isinstance(o, Answer) else o for o in outputs]
                    records.add(
                        {
                            "config": name,
                            "id": item.id,
                            "part": item.part,
                            "tokens": max(len(f.ids) for f in fitted),
                            "cut": max(f.cut for f in fitted),
                            "prompt": _hash(fitted),
                            "target": task.task.doc_to_target(item.instances[0].doc),
                            "output": said,
                            "ended": [_ended(output) for output in outputs],
                            "scores": score(task.task, item, said),
                        }
                    )
                    bar.update()


def _ask(
    items: Sequence[Item], fitter: Fitter, answerer: Answerer, render: bool
) -> Iterator[tuple[Item, list[Fitted], list[Any]]]:
    """Each item with its prompts, one for each of its requests, and what was answered."""
    instances = [instance for item in items for instance in item.instances]
    outputs: Sequence[Any]
    room = answerer.max_model_len - _room_for_answer(items[0])
    if instances[0].request_type == "generate_until":
        max_tokens, until = generation(instances[0])
        fitted = [fitter.fit(instance.args[0], room) for instance in instances]
        outputs = answerer.answer(
            [f.ids if render or f.messages is None else f.messages for f in fitted],
            max_tokens,
            until,
        )
    else:
        pairs = [
            fitter.fit_pair(instance.args[0], instance.args[1], room) for instance in instances
        ]
        fitted = [f for f, _ in pairs]
        outputs = answerer.loglikelihood([(f.ids, n) for f, n in pairs])
    at = 0
    for item in items:
        end = at + len(item.instances)
        yield item, fitted[at:end], list(outputs[at:end])
        at = end


def _ended(output: Any) -> str:
    """How an answer ended; what was scored and not said is whole."""
    return output.ended if isinstance(output, Answer) else "whole"


def _room_for_answer(item: Item) -> int:
    first = item.instances[0]
    return generation(first)[0] if first.request_type == "generate_until" else 1


def _hash(fitted: Sequence[Fitted]) -> str:
    text = json.dumps([f.ids for f in fitted])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def by_label(
    loaded: Sequence[Loaded], records: Records, names: Sequence[str]
) -> dict[str, dict[str, list[Mapping[str, Any]]]]:
    """Results in item order, by task (and part, as TASK@PART) and configuration."""
    found: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for task in loaded:
        for item in task.items:
            label = f"{task.ask.task}@{item.part}" if item.part else task.ask.task
            rows = found.setdefault(label, {name: [] for name in names})
            for name in names:
                rows[name].append(records.done[name, item.id])
    return found
