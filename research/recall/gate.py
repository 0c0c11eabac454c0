"""How often the gate of sessions opens, for questions that a session can answer and for others.

    PYTHONPATH=. python research/recall/gate.py --data D --tokenizer MODEL

D has Natural Questions with their passages (nelson-liu/lost-in-the-middle, the file
nq-open-oracle.jsonl.gz). The limit was set on the development half; the other half is what it is
tried on. No model is asked. With ``--haystack FILE ...`` instead of ``--data`` it is the needles of
``pacellm eval sessions``: how often what is read has the answer, and how often the model says so
that reads it. No text is fed to an engine for that, so it takes minutes.
"""

import argparse
import gzip
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pacellm_vllm.evals.niah import Grid
from pacellm_vllm.evals.sessions import make_text
from pacellm_vllm.sessions.finder import Finder, queries
from pacellm_vllm.sessions.reading import SURE, SessionReader
from pacellm_vllm.sessions.store import SessionStore

HELD_OUT = 1300
# Pages of a session, and how many such sessions are tried.
STORES = {1: 300, 3: 300, 10: 250, 30: 200, 100: 150, 300: 100, 600: 80}
# Of texts with needles.
LENGTHS, SAMPLES = (8192, 16384, 32768, 65536, 131072, 200000), 3
DEPTHS = tuple(float(depth) for depth in range(0, 101, 10))
FED_TOKENS = 1024
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


def new_session(tokenizer: Any) -> tuple[SessionStore, SessionReader]:
    store = SessionStore(10**6, lambda ids: tokenizer.decode(ids, skip_special_tokens=True))
    return store, SessionReader(store, tokenizer)


def opens_behind(pairs: list[tuple[str, str]], tokenizer: Any, pages: int, count: int) -> float:
    """The share of questions behind their own passage that a session without it is read for."""
    store, reader = new_session(tokenizer)
    for _, passage in pairs[:pages]:
        store.add(b"", tokenizer.encode(f"{passage}\n\n"), [])
    asked = [f"{own}\n\nQuestion: {ask}?\nAnswer:" for ask, own in pairs[pages : pages + count]]
    read = [reader.read(b"", tokenizer.encode(text), 10**6, "auto") for text in asked]
    return float(np.mean([bool(each.tokens) for each in read]))


def needles_found(
    grid: Grid, tokenizer: Any, model: Any, length: int, sample: int
) -> dict[str, int]:
    """Of a text's needles: read for their question, behind whatever gate or none; answered."""
    told = make_text(grid, tokenizer, length, sample)
    store, reader = new_session(tokenizer)
    for start in range(0, len(told.text), FED_TOKENS):
        store.add(b"", told.text[start : start + FED_TOKENS], [])
    counts = dict.fromkeys(("read", "read always", "answered"), 0)
    for needle, question in zip(told.needles, told.questions, strict=True):
        always = reader.read(b"", question, 10**6, "always")
        read = reader.read(b"", question, 10**6, "auto")
        counts["read always"] += needle.answer in tokenizer.decode(list(always.tokens))
        counts["read"] += needle.answer in tokenizer.decode(list(read.tokens))
        prompt = torch.tensor([[*question[: read.place], *read.tokens, *question[read.place :]]])
        said = model.generate(prompt, max_new_tokens=grid.max_tokens, do_sample=False)
        counts["answered"] += needle.answer in tokenizer.decode(said[0, prompt.shape[1] :])
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--data", type=Path)
    asked.add_argument("--haystack", type=Path, nargs="+")
    parser.add_argument("--tokenizer", required=True, help="a model, whose tokens pages are cut in")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    if args.haystack:
        model = AutoModelForCausalLM.from_pretrained(args.tokenizer, dtype=torch.float32)
        grid = Grid((), DEPTHS, digits=5, haystack=tuple(args.haystack))
        for length in LENGTHS:
            found: Counter[str] = Counter()
            for sample in range(SAMPLES):
                found.update(needles_found(grid, tokenizer, model, length, sample))
            print(f"{length} tokens, of {SAMPLES * len(DEPTHS)}: {dict(found)}", flush=True)
        return
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
