"""Natural questions asked in a session, in the engine.

    PYTHONPATH=.:research/recall python research/recall/asked.py MODEL WORK --data D [--count 100]

(b) The passages of ``count`` held-out questions are each a request of one session. Then every
question is asked alone, in the session, and behind its own passage. (c) Questions whose passage the
session does not have are asked behind it, outside of the session and in it. D as in gate.py, whose
held-out half these are of. A line an item is written to WORK; the same command goes on.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

from gate import HELD_OUT, questions
from recall_items import subspan_match

from pacellm_vllm.evals.answers import Offline, offline_engine
from pacellm_vllm.evals.arguments import add_engine, given
from pacellm_vllm.evals.bootstrap import paired_difference
from pacellm_vllm.evals.records import Records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--skip", type=int, default=0, help="questions of the held-out half")
    add_engine(parser, '{"dtype": "bfloat16"}')
    args = parser.parse_args()
    file = args.data / "nq-open-oracle.jsonl.gz"
    golds = gold_answers(file)
    pairs = questions(file)[:HELD_OUT]
    random.Random(2).shuffle(pairs)
    pairs = pairs[args.skip :]
    told, others = pairs[: args.count], pairs[args.count : 2 * args.count]
    settings = {"experiment": "asked", "model": Path(args.model).name}
    settings |= {"count": args.count, "skip": args.skip}
    memory = {"layers": [], "session_tokens": 10**6}
    with (
        Records(args.out / "asked.jsonl", settings) as records,
        offline_engine(args.model, memory, given(args, "engine")) as llm,
    ):
        answerer = Offline(llm)

        def ask(text: str, session: str | None, tokens: int = 20) -> tuple[str, int]:
            own = {"pacellm_session": session, "pacellm_session_write": tokens == 1}
            prompt = llm.get_tokenizer().encode(text)
            extra = own if session else None
            [answer] = answerer.answer([prompt], tokens, ("\n",), extra_args=extra)
            return answer.text, answer.prompt_tokens - len(prompt)

        for _, passage in told:
            ask(f"{passage}\n\n", "asked", tokens=1)
        arms = [
            ("alone", told, lambda question, passage: question, None),
            ("session", told, lambda question, passage: question, "asked"),
            ("own passage", told, lambda question, passage: f"{passage}\n\n{question}", None),
            ("outside", others, lambda question, passage: f"{passage}\n\n{question}", None),
            ("inside", others, lambda question, passage: f"{passage}\n\n{question}", "asked"),
        ]
        for arm, items, prompt, session in arms:
            for number, (question, passage) in enumerate(items):
                if (arm, str(number)) in records.done:
                    continue
                text = prompt(f"Question: {question}?\nAnswer:", passage)
                said, read = ask(text, session)
                match = subspan_match(said, golds[passage])
                line = {"config": arm, "id": str(number), "said": said, "read": read}
                records.add(line | {"match": match})
            report(records)


def gold_answers(file: Path) -> dict[str, list[str]]:
    """By passage."""
    import gzip

    with gzip.open(file, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    return {row["ctxs"][0]["text"]: row["answers"] for row in reversed(rows)}


def report(records: Records) -> None:
    by_arm: dict[str, list[dict[str, Any]]] = {}
    for (arm, _), line in sorted(records.done.items(), key=lambda item: int(item[0][1])):
        by_arm.setdefault(arm, []).append(line)
    matches = {arm: [line["match"] for line in lines] for arm, lines in by_arm.items()}
    for arm, lines in by_arm.items():
        first = "outside" if arm == "inside" else "alone"
        read = sum(line["read"] > 0 for line in lines)
        difference = paired_difference(matches[first], matches[arm]) if arm != first else ""
        mean = sum(matches[arm]) / len(lines)
        print(f"{arm}: {mean:.3f} {difference}, {read} of {len(lines)} read", flush=True)


if __name__ == "__main__":
    main()
