"""Held-out items, asked with each form of memory and without."""

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from recall_bench import Bench, score, target
from recall_items import Item, bm25, encode, subspan_match
from recall_memory import Reading, Recall, Row, Site
from recall_store import Memory

from pacellm_vllm.evals.records import Records

LIMIT = {"qa": 20, "needles": 12}
GROUP = {"qa": 4, "needles": 8}


class Question:
    """A question under several arms: each arm's loss of the answer, then its greedy answer."""

    def __init__(self, bench: Bench, say: Site, item: Item) -> None:
        self.bench, self.say, self.item = bench, say, item
        self.answer = encode(bench.tokenizer, " " + item.answers[0])
        self.losses: dict[str, float] = {}
        self.rows: dict[str, Row] = {}
        self.same: dict[str, str] = {}
        self.prompts: dict[tuple[int, ...], str] = {}

    def ask(self, arm: str, prompt: Sequence[int], behind: Reading | None = None) -> Reading:
        """Score the answer after ``prompt``, which stands behind what was read before if anything.

        An arm whose prompt another arm had is that arm.
        """
        cache = behind.cache if behind is not None else None
        reading = self.bench.reader.read(
            [*prompt, *self.answer], last=len(self.answer) + 1, cache=cache
        )
        reading.cache.crop(-len(self.answer))
        self.losses[arm] = -float(target(reading.logprobs, self.answer).sum())
        self.rows[arm] = Row(reading.cache, reading.logprobs[0])
        return reading

    def ask_once(self, arm: str, prompt: Sequence[int]) -> None:
        """``ask``, unless another arm had this prompt."""
        first = self.prompts.setdefault(tuple(prompt), arm)
        if first == arm:
            self.ask(arm, prompt)
        else:
            self.copy(arm, first)

    def copy(self, arm: str, of: str) -> None:
        """Make ``arm`` what another arm is."""
        self.same[arm], self.losses[arm] = of, self.losses[of]

    def mix(self, arm: str, reading: Reading, recall: Recall) -> None:
        """Score the answer with ``recall``, on a ``reading`` that ``ask`` returned."""
        rows = len(self.answer) + 1
        mixed = recall.mix(reading.states[self.say][-rows:], reading.logprobs)
        self.losses[arm] = -float(target(mixed, self.answer).sum())
        self.rows[arm] = Row(reading.cache, mixed[0], recall)

    def result(self) -> dict[str, Any]:
        """Losses in nats, matches and texts of all arms, for a line of results."""
        said = {arm: self.bench.decode(row.tokens) for arm, row in self.rows.items()}
        said |= {arm: said[of] for arm, of in self.same.items()}
        return {
            "loss": {arm: round(loss, 4) for arm, loss in self.losses.items()},
            "match": {arm: subspan_match(text, self.item.answers) for arm, text in said.items()},
            "said": said,
            "answers": self.item.answers,
            "answer_tokens": len(self.answer),
        }


def write_all(bench: Bench, asked: Sequence[Question]) -> None:
    """Greedy answers of all arms of some questions; short prompts together, and long ones."""
    rows = [row for question in asked for row in question.rows.values()]
    for long in (False, True):
        batch = [row for row in rows if (row.cache.get_seq_length() > 700) is long]
        if batch:
            bench.reader.write(batch, asked[0].say, LIMIT[bench.task], bench.stop)


def record(
    bench: Bench,
    records: Records,
    config: str,
    began: float,
    asked: Sequence[tuple[Question, dict[str, Any]]],
) -> None:
    """Greedy answers of some questions, asked since ``began``; a line of each with its facts."""
    write_all(bench, [question for question, _ in asked])
    seconds = round((time.perf_counter() - began) / len(asked), 2)
    for question, facts in asked:
        head = {"config": config, "id": question.item.id, "seconds": seconds}
        records.add(head | facts | question.result())
    print(asked[-1][0].item.id, seconds, flush=True)


def ask(args: argparse.Namespace) -> None:
    """Held-out questions whose context is gone, under every arm."""
    bench = Bench(args)
    memory = Memory(bench, args.out)
    settings = {
        "experiment": "ask",
        "task": bench.task,
        "model": Path(args.model).name,
        "knobs": memory.knobs,
    }
    with Records(args.out / f"{bench.task}-ask.jsonl", settings) as records:
        todo = [
            item
            for item in bench.items(held_out=True, count=args.count)
            if ("ask", item.id) not in records.done
        ]
        for group in groups(todo, GROUP[bench.task]):
            began = time.perf_counter()
            asked = [ask_about(bench, memory, item) for item in group]
            record(bench, records, "ask", began, asked)


def ask_about(bench: Bench, memory: Memory, item: Item) -> tuple[Question, dict[str, Any]]:
    """One held-out question under every arm, and what finding its passages took (microseconds)."""
    question = Question(bench, memory.sites["token"], item)
    reading, stored = bench.context(item)
    store = memory.store(reading, stored, item)
    tokens = len(item.context)
    question.ask("whole context", item.question, reading)
    alone = question.ask("alone", item.question)
    before = time.perf_counter()
    found, sure = store.find(alone.states[memory.sites["find"]][item.span])
    finding = time.perf_counter() - before
    site, spread = memory.sites["find"], memory.knobs["find"]["spread"]
    narrow = {}
    for width, compress in memory.narrow.items():
        keys = compress(reading.states[site][stored])
        scores, _ = score(compress(alone.states[site][item.span]), item, keys, spread)
        narrow[width] = scores.argsort(descending=True).tolist()[:5]
    lexical = bm25(item.asked, item.words)
    ranked = sorted(range(len(lexical)), key=lambda i: -lexical[i])
    question.mix("recall any token", alone, store.recall("token"))
    for count in (1, 2):
        question.mix(f"recall in found {count}", alone, store.recall("focus", found[:count]))
    recall = store.recall("token")
    state = alone.states[memory.sites["token"]][-1:]
    before = time.perf_counter()
    recall.look_up(state)
    looking = time.perf_counter() - before
    for name, order in (("found", found), ("BM25", ranked)):
        for count in (1, 2):
            part = item.part(order[:count])
            question.ask_once(f"read again {name} {count}", item.head + part + item.question)
    window = item.context[-len(item.part(found[:2])) :]
    question.ask_once("last tokens as many", item.head + window + item.question)
    question.ask_once("read again gold", item.head + item.part(item.gold) + item.question)
    facts = {
        "gold": sorted(item.gold),
        "found": found[:5],
        "narrow": narrow,
        "bm25": ranked[:5],
        "sure": round(sure, 5),
        "opens": store.opens(sure),
        "tokens": tokens,
        "again": {n: len(item.part(found[:n])) for n in (1, 2)},
        "find_us": round(finding * 1e6),
        "look_up_us": round(looking * 1e6),
    }
    return question, facts


def groups(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """``items`` in parts of ``size``."""
    for i in range(0, len(items), size):
        yield items[i : i + size]
