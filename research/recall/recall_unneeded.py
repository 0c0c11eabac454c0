"""What memory does where it is not needed: to answers and to text."""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recall_ask import Question, record, write_all
from recall_bench import (
    TEXT_ASKED,
    TEXT_PROMPT,
    TEXT_SCORED,
    Bench,
    beside,
    passages_of_questions,
    read_lines,
    target,
    text_for_development,
    unrelated,
)
from recall_choose import FALSE_ALARMS
from recall_items import Item, bm25, coverage, encode, essays
from recall_store import Memory, Store

from pacellm_vllm.evals.records import Records


def unneeded_questions(args: argparse.Namespace) -> None:
    """Questions whose passage is in the prompt, with a store of another item's passages."""
    bench = Bench(args)
    memory = Memory(bench, args.out)
    items = bench.items(held_out=True, count=args.skip + args.count + 20)[args.skip :]
    settings = {
        "experiment": "unneeded-qa",
        "model": Path(args.model).name,
        "knobs": memory.knobs,
        "skip": args.skip,
    }
    with Records(args.out / "unneeded-qa.jsonl", settings) as records:
        numbers = [n for n in range(args.count) if ("unneeded-qa", items[n].id) not in records.done]
        for start in range(0, len(numbers), 8):
            began = time.perf_counter()
            chosen = numbers[start : start + 8]
            other = unrelated(items, chosen)
            reading, stored = bench.context(other)
            store = memory.store(reading, stored, other)
            asked = [ask_unneeded(bench, memory, store, items[n]) for n in chosen]
            record(bench, records, "unneeded-qa", began, asked)


def ask_unneeded(
    bench: Bench, memory: Memory, store: Store, item: Item
) -> tuple[Question, dict[str, Any]]:
    """One question whose passage is in its prompt, beside a ``store`` of something else."""
    question = Question(bench, memory.sites["token"], item)
    body = beside(item)
    prompt = item.head + body + item.question
    off = question.ask("off", prompt)
    shift = len(prompt) - len(item.question)
    span = slice(item.span.start + shift, item.span.stop + shift)
    found, sure = store.find(off.states[memory.sites["find"]][span])
    opens = store.opens(sure)
    question.mix("recall any token", off, store.recall("token"))
    question.mix("recall in found 2, always", off, store.recall("focus", found[:2]))
    part = store.item.part(found[:2])
    question.ask("read again found 2, always", item.head + part + body + item.question)
    for arm in ("recall in found 2", "read again found 2"):
        question.copy(arm, f"{arm}, always" if opens else "off")
        question.same[arm] = question.same.get(question.same[arm], question.same[arm])
    return question, {"sure": round(sure, 5), "opens": opens}


def unneeded_text(args: argparse.Namespace) -> None:
    """Text that goes on, with a store of another text's passages."""
    bench = Bench(args)
    memory = Memory(bench, args.out)
    pieces = [text for text in essays(bench.tokenizer, bench.data, True) if len(text) > 4000]
    stores = bench.items(held_out=True, count=200)
    settings = {
        "experiment": "unneeded-text",
        "task": bench.task,
        "model": Path(args.model).name,
        "knobs": memory.knobs,
    }
    find, say = memory.sites["find"], memory.sites["token"]
    store = None
    with Records(args.out / f"{bench.task}-unneeded-text.jsonl", settings) as records:
        for number in range(args.count):
            if ("text", f"text-{number}") in records.done:
                continue
            begun = time.perf_counter()
            text = pieces[number % len(pieces)]
            rows = args.count // len(pieces) + 1
            begin = (number // len(pieces)) * ((len(text) - 512) // rows)
            ids = text[begin : begin + TEXT_PROMPT + TEXT_SCORED]
            if store is None or number % 8 == 0:
                other = stores[number // 8]
                if bench.task == "needles":
                    other = passages_of_questions(bench, number // 8)
                store = memory.store(*bench.context(other), other)
            after = ids[TEXT_PROMPT:]
            off = bench.reader.read(ids, last=TEXT_SCORED + 1)
            asked = slice(TEXT_PROMPT - TEXT_ASKED, TEXT_PROMPT)
            found, sure = store.find(off.states[find][asked])
            states = off.states[say][TEXT_PROMPT - 1 :]
            mixed = {
                "off": off.logprobs,
                "recall any token": store.recall("token").mix(states, off.logprobs),
                "recall in found 2, always": store.recall("focus", found[:2]).mix(
                    states, off.logprobs
                ),
            }
            again = bench.reader.read(
                [*store.item.part(found[:2]), *encode(bench.tokenizer, "\n\n"), *ids],
                last=TEXT_SCORED + 1,
            )
            mixed["read again found 2, always"] = again.logprobs
            opens = store.opens(sure)
            for arm in ("recall in found 2", "read again found 2"):
                mixed[arm] = mixed[f"{arm}, always" if opens else "off"]
            records.add(
                {
                    "config": "text",
                    "id": f"text-{number}",
                    "sure": round(sure, 5),
                    "opens": opens,
                    "loss": {
                        arm: round(-float(target(logprobs, after).mean()), 5)
                        for arm, logprobs in mixed.items()
                    },
                    "match": {
                        arm: float((logprobs[:-1].argmax(1) == torch.tensor(after)).float().mean())
                        for arm, logprobs in mixed.items()
                    },
                    "seconds": round(time.perf_counter() - begun, 2),
                }
            )
            if number % 8 == 7:
                print(number, round(time.perf_counter() - begun, 2), flush=True)


def lexical_gate(args: argparse.Namespace) -> None:
    """The same gate for BM25: set on development items, tried on held-out ones.

    The questions are those of ``ask`` and ``unneeded-qa``, the stores too.
    """
    bench = Bench(args)
    dev = bench.items(held_out=False, count=80)
    negative = [coverage(a.asked, b.words) for a, b in zip(dev[1:], dev[:-1], strict=True)]
    texts = [bench.tokenizer.decode(ids[-TEXT_ASKED:]) for ids in text_for_development(bench)]
    negative_text = [coverage(text, a.words) for text, a in zip(texts, dev, strict=False)]
    limit = max(float(np.quantile(n, 1 - FALSE_ALARMS)) for n in (negative, negative_text))
    settings = {"experiment": "lexical-gate", "task": bench.task, "threshold": limit}
    with Records(args.out / f"{bench.task}-lexical.jsonl", settings) as records:
        held_out = bench.items(held_out=True, count=args.skip + args.count + 20)
        asked = [(item, item) for item in held_out[: args.count]]
        if bench.task == "qa":
            later = held_out[args.skip :]
            for start in range(0, args.count, 8):
                chosen = range(start, min(start + 8, args.count))
                asked += [(later[n], unrelated(later, chosen)) for n in chosen]
        for item, store in asked:
            own = item is store
            key = ("own" if own else "other", item.id)
            if key not in records.done:
                sure = coverage(item.asked, store.words)
                records.add(
                    {"config": key[0], "id": item.id, "sure": round(sure, 5), "opens": sure > limit}
                )


def unneeded_lexical(args: argparse.Namespace) -> None:
    """What BM25's two passages do to questions of ``unneeded-qa`` for which its gate was open."""
    bench = Bench(args)
    say = bench.site(0.5, "ffn")
    bench.reader.watch([say])
    later = bench.items(held_out=True, count=args.skip + args.count + 20)[args.skip :]
    lines = read_lines(args.out / "qa-lexical.jsonl")
    opened = {line["id"] for line in lines if line["config"] == "other" and line["opens"]}
    settings = {"experiment": "unneeded-lexical", "model": Path(args.model).name}
    with Records(args.out / "unneeded-lexical.jsonl", settings) as records:
        for start in range(0, args.count, 8):
            chosen = range(start, min(start + 8, args.count))
            store = unrelated(later, chosen)
            for item in (later[n] for n in chosen):
                if item.id not in opened or ("lexical", item.id) in records.done:
                    continue
                question = Question(bench, say, item)
                scores = bm25(item.asked, store.words)
                ranked = sorted(range(len(scores)), key=lambda i: -scores[i])
                body = beside(item)
                question.ask("off", item.head + body + item.question)
                again = item.head + store.part(ranked[:2]) + body + item.question
                question.ask("read again BM25 2", again)
                write_all(bench, [question])
                records.add({"config": "lexical", "id": item.id} | question.result())
