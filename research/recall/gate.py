"""How often the gate of sessions opens, for questions that a session can answer and for others.

    PYTHONPATH=. python research/recall/gate.py --data D

D has Natural Questions with their passages (nelson-liu/lost-in-the-middle, the file
nq-open-oracle.jsonl.gz). No model is asked. The limit was set on the development half; the other
half is what it is tried on.
"""

import argparse
import gzip
import json
import random
from pathlib import Path

import numpy as np

from pacellm_vllm.sessions.finder import Finder
from pacellm_vllm.sessions.reading import SURE

HELD_OUT = 1300
STORES = {
    1: 300,
    3: 300,
    10: 250,
    30: 200,
    100: 150,
    300: 100,
    600: 80,
}  # pages of a session: sessions tried
TEXT_WORDS = 24


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
) -> dict[str, list[float]]:
    """Of questions about one of a session's pages, of other questions, and of other texts."""
    sure: dict[str, list[float]] = {"asked about": [], "another question": [], "another text": []}
    for _ in range(tries):
        mixed = rng.sample(pairs, pages + 3)
        inside, (one, two, three) = mixed[:pages], mixed[pages:]
        finder = Finder()
        finder.add({i: passage for i, (_, passage) in enumerate(inside)})
        words = three[1].split()
        start = rng.randrange(max(1, len(words) - TEXT_WORDS))
        for kind, asked in (
            ("asked about", rng.choice(inside)[0]),
            ("another question", one[0]),
            ("another question", two[0]),
            ("another text", " ".join(words[start : start + TEXT_WORDS])),
        ):
            found = finder.find(asked)
            sure[kind].append(found[0].sure if found else 0.0)
    return sure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    args = parser.parse_args()
    pairs = questions(args.data / "nq-open-oracle.jsonl.gz")
    for half, part in (("development", pairs[HELD_OUT:]), ("held out", pairs[:HELD_OUT])):
        print(f"\n{half}, {len(part)} questions; opens for")
        rng = random.Random(1)
        for pages, tries in STORES.items():
            kinds = sureness(part, pages, tries, rng)
            shares = [f"{kind} {np.mean(np.array(of) > SURE):.3f}" for kind, of in kinds.items()]
            print(f"{pages} pages: {', '.join(shares)}")


if __name__ == "__main__":
    main()
