"""How often the gate of sessions opens, for questions that a session can answer and for others.

    PYTHONPATH=. python research/recall/gate.py --data D --tokenizer MODEL

D has Natural Questions with their passages (nelson-liu/lost-in-the-middle, the file
nq-open-oracle.jsonl.gz). No model is asked. The limit was set on the development half; the other
half is what it is tried on.
"""

import argparse
import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from pacellm_vllm.sessions.finder import Finder, queries
from pacellm_vllm.sessions.reading import SURE, SessionReader
from pacellm_vllm.sessions.store import SessionStore

HELD_OUT = 1300
# Pages of a session, and how many such sessions are tried.
STORES = {1: 300, 3: 300, 10: 250, 30: 200, 100: 150, 300: 100, 600: 80}
TEXT_WORDS = 24
FORMS = {
    "plain": "{}?",
    "prompt": "Question: {}?\nAnswer:",
    "polite": "Please answer briefly: {}? Thanks!",
    "wordy": "Hi, I have one more thing to ask you about what I sent before. Could you tell me {}? "
    "Keep your answer short please.",
}


def questions(file: Path) -> list[tuple[str, str]]:
    """(question, passage) pairs in random order, no passage twice."""
    passages = {}
    with gzip.open(file, "rt") as lines:
        for row in map(json.loads, lines):
            passages.setdefault(row["ctxs"][0]["text"], row["question"])
    pairs = [(question, passage) for passage, question in passages.items()]
    random.Random(0).shuffle(pairs)
    return pairs


def sureness(
    pairs: list[tuple[str, str]], pages: int, tries: int, rng: random.Random
) -> dict[str, dict[str, list[float]]]:
    """By how it is asked: of questions about one of a session's pages, and of other questions."""
    sure: dict[str, dict[str, list[float]]] = {form: {"asked": [], "other": []} for form in FORMS}
    for _ in range(tries):
        mixed = rng.sample(pairs, pages + 2)
        finder = Finder()
        finder.add({i: passage for i, (_, passage) in enumerate(mixed[:pages])})
        questions = [("asked", rng.choice(mixed[:pages])[0])]
        questions += [("other", question) for question, _ in mixed[pages:]]
        for form, text in FORMS.items():
            for kind, question in questions:
                found = [finder.find(query) for query in queries(text.format(question))[0]]
                sure[form][kind].append(max((each[0].sure for each in found if each), default=0.0))
    return sure


def opens_behind(pairs: list[tuple[str, str]], tokenizer: Any, pages: int, count: int) -> float:
    """The share of questions behind their own passage that a session without it is read for."""
    store = SessionStore(10**6, lambda ids: tokenizer.decode(ids, skip_special_tokens=True))
    reader = SessionReader(store, tokenizer)
    for _, passage in pairs[:pages]:
        store.add(b"", tokenizer.encode(f"{passage}\n\n"), [])
    asked = [f"{own}\n\nQuestion: {ask}?\nAnswer:" for ask, own in pairs[pages : pages + count]]
    read = [reader.read(b"", tokenizer.encode(text), 10**6, "auto") for text in asked]
    return float(np.mean([bool(each.tokens) for each in read]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True, help="a model's, which passages are cut with")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    pairs = questions(args.data / "nq-open-oracle.jsonl.gz")
    for half, part in (("development", pairs[HELD_OUT:]), ("held out", pairs[:HELD_OUT])):
        print(f"\n{half}, {len(part)} questions; opens for")
        rng = random.Random(1)
        for pages, tries in STORES.items():
            for form, kinds in sureness(part, pages, tries, rng).items():
                shares = {kind: np.mean(np.array(of) > SURE) for kind, of in kinds.items()}
                print(f"{pages} pages, {form}: {shares['asked']:.3f}, others {shares['other']:.3f}")

        for pages in (10, 100, 600):
            share = opens_behind(part, tokenizer, pages, 400)
            print(f"{pages} pages, 400 questions behind their own passage: {share:.3f}")


if __name__ == "__main__":
    main()
