"""What is asked: questions about passages, needles in real text, plain text, and how answers count.

Nothing here knows of a model except a tokenizer's ``encode`` and ``decode``.
"""

import gzip
import json
import math
import random
import re
import string
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEAD = (
    "Write a high-quality answer for the given question using only the provided search results "
    "(some of which might be irrelevant).\n\n"
)
DEV_QUESTIONS = 400  # of the shuffled questions, the first; the rest is held out
DEV_TEXTS = 6  # of the long texts, the first
CITIES = (
    "Accra",
    "Athens",
    "Baku",
    "Bogota",
    "Cairo",
    "Dublin",
    "Hanoi",
    "Kabul",
    "Lagos",
    "Lima",
    "London",
    "Madrid",
    "Manila",
    "Minsk",
    "Nairobi",
    "Oslo",
    "Paris",
    "Quito",
    "Rome",
    "Tokyo",
)
NEEDLES = 4
BLOCK = 128  # tokens of a passage where a text has none of its own
MARGIN = 16  # tokens read again on either side of such a passage


@dataclass
class Item:
    """A context in passages, and a question about it; all token ids are of one tokenizer.

    ``passages`` joined are the context, ``head`` stands before it in a prompt. ``question`` is what
    stands behind it, with the question's own words at ``span``. ``margin`` is how many tokens on
    either side of a passage are read again with it.
    """

    id: str
    head: list[int]
    passages: list[list[int]]
    words: list[str]
    question: list[int]
    span: slice
    asked: str
    answers: list[str]
    gold: set[int]
    margin: int = 0

    @property
    def context(self) -> list[int]:
        """The tokens of all passages."""
        return [token for passage in self.passages for token in passage]

    def part(self, chosen: Collection[int]) -> list[int]:
        """The tokens of the ``chosen`` passages with their margins, in the text's order."""
        context, begin = self.context, 0
        kept: set[int] = set()
        for index, passage in enumerate(self.passages):
            end = begin + len(passage)
            if index in chosen:
                kept.update(
                    range(max(0, begin - self.margin), min(len(context), end + self.margin))
                )
            begin = end
        return [context[i] for i in sorted(kept)]


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a gzipped JSON-lines file."""
    with gzip.open(path, "rt") as file:
        for line in file:
            yield json.loads(line)


def questions(
    tokenizer: Any, data: Path, held_out: bool, count: int, passages: int, seed: int = 0
) -> list[Item]:
    """Natural Questions, the gold passage at a random place among others' passages.

    Development and held-out items share neither questions nor passages; ``count`` are drawn at
    random from either.
    """
    unique = {row["ctxs"][0]["text"]: row for row in lines(data / "nq-open-oracle.jsonl.gz")}
    rows = list(unique.values())
    random.Random(seed).shuffle(rows)
    rows = rows[DEV_QUESTIONS:] if held_out else rows[:DEV_QUESTIONS]
    rng = random.Random(seed + 1)
    items = []
    for number, row in enumerate(rows[:count]):
        drawn = rng.sample([other for other in rows if other is not row], passages - 1)
        place = rng.randrange(passages)
        drawn.insert(place, row)
        texts = [
            f"Document [{i + 1}](Title: {d['ctxs'][0]['title']}) {d['ctxs'][0]['text']}\n"
            for i, d in enumerate(drawn)
        ]
        opening = encode(tokenizer, "\nQuestion:")
        asked = encode(tokenizer, " " + row["question"])
        items.append(
            Item(
                id=f"{'held' if held_out else 'dev'}-{number}",
                head=encode(tokenizer, HEAD),
                passages=[encode(tokenizer, text) for text in texts],
                words=[f"{d['ctxs'][0]['title']} {d['ctxs'][0]['text']}" for d in drawn],
                question=opening + asked + encode(tokenizer, "\nAnswer:"),
                span=slice(len(opening), len(opening) + len(asked)),
                asked=row["question"],
                answers=row["answers"],
                gold={place},
            )
        )
    return items


def essays(tokenizer: Any, data: Path, held_out: bool) -> list[list[int]]:
    """Long Wikipedia articles, without markup; development and held-out ones are different."""
    rows = list(lines(data / "leval-natural_question.jsonl.gz"))
    unique = list(dict.fromkeys(re.sub(r"<[^>]*>|\s+", " ", row["input"]) for row in rows))
    unique = [re.sub(" +", " ", text) for text in unique]
    chosen = unique[DEV_TEXTS:] if held_out else unique[:DEV_TEXTS]
    return [encode(tokenizer, text) for text in chosen]


def needles(
    tokenizer: Any, data: Path, held_out: bool, count: int, tokens: int, seed: int = 0
) -> list[Item]:
    """One of ``NEEDLES`` sentences in ``tokens`` tokens of real text is asked about.

    Even items hide five digits, odd ones an exact string of six letters and digits.
    """
    texts = essays(tokenizer, data, held_out)
    rng = random.Random(seed + 2 + held_out)
    items = []
    for number in range(count):
        text = rng.choice(texts)
        begin = rng.randrange(len(text) - tokens)
        kind = "magic number" if number % 2 == 0 else "access code"
        letters = string.digits if number % 2 == 0 else string.ascii_lowercase + string.digits
        cities = rng.sample(CITIES, NEEDLES)
        values = ["".join(rng.choice(letters) for _ in range(5 + number % 2)) for _ in cities]
        places = sorted(rng.sample(range(1, tokens), NEEDLES))
        context: list[int] = []
        before, where = 0, []
        for place, city, value in zip(places, cities, values, strict=True):
            context += text[begin + before : begin + place]
            context += encode(tokenizer, f"\nThe {kind} of {city} is")
            coded = encode(tokenizer, f" {value}")
            where.append((len(context), len(context) + len(coded)))
            context += coded + encode(tokenizer, ".\n")
            before = place
        context += text[begin + before : begin + tokens]
        blocks = [context[i : i + BLOCK] for i in range(0, len(context), BLOCK)]
        wanted = rng.randrange(NEEDLES)
        first, last = where[wanted]
        opening = encode(tokenizer, "\n\nQuestion:")
        asked = f"What is the {kind} of {cities[wanted]}?"
        span = encode(tokenizer, " " + asked)
        items.append(
            Item(
                id=f"{'held' if held_out else 'dev'}-{number}",
                head=[],
                passages=blocks,
                words=[tokenizer.decode(block) for block in blocks],
                question=opening
                + span
                + encode(tokenizer, f"\nAnswer: The {kind} of {cities[wanted]} is"),
                span=slice(len(opening), len(opening) + len(span)),
                asked=asked,
                answers=[values[wanted]],
                gold={first // BLOCK, (last - 1) // BLOCK},
                margin=MARGIN,
            )
        )
    return items


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of ``text`` and nothing around them."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def bm25(query: str, texts: Sequence[str], k1: float = 1.5, b: float = 0.75) -> list[float]:
    """Okapi BM25 of ``query`` for each text, the rarity of words taken from ``texts``."""
    bags = [Counter(terms(text)) for text in texts]
    mean = sum(bag.total() for bag in bags) / len(bags)
    scores = [0.0] * len(bags)
    for term, rarity in rarities(query, bags).items():
        for i, bag in enumerate(bags):
            norm = k1 * (1 - b + b * bag.total() / mean)
            scores[i] += rarity * bag[term] * (k1 + 1) / (bag[term] + norm)
    return scores


def coverage(query: str, texts: Sequence[str], k1: float = 1.5) -> float:
    """The best BM25 of ``texts``, as a share of what a text of the query's words alone nears."""
    most = sum(rarities(query, [Counter(terms(text)) for text in texts]).values()) * (k1 + 1)
    return max(bm25(query, texts, k1)) / most if most else 0.0


def rarities(query: str, bags: Sequence[Counter[str]]) -> dict[str, float]:
    """How rare each of the query's words is among ``bags``."""
    having = {term: sum(term in bag for bag in bags) for term in sorted(set(terms(query)))}
    return {term: math.log(1 + (len(bags) - n + 0.5) / (n + 0.5)) for term, n in having.items()}


def terms(text: str) -> list[str]:
    """Words of ``text``, in lower case."""
    return re.findall(r"\w+", text.lower())


def subspan_match(answer: str, golds: Sequence[str]) -> float:
    """1.0 where ``answer`` contains one of ``golds``, both without case, articles, punctuation."""
    return float(any(plain(gold) in plain(answer) for gold in golds))


def plain(text: str) -> str:
    """``text`` as it is compared."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())
