"""Does a memory of FFN states bring back what left the context? On real models, beside the engine.

A context is read and forgotten; then a question about it is asked alone. What was kept of the
context is one compressed FFN state a token, the token that followed, and, where passages are read
again, the tokens themselves. In this order, with D the data's folder, M a model's, W for results:

    PYTHONPATH=. python research/recall/recall.py dev M W --data D --task qa      # development
    PYTHONPATH=. python research/recall/recall.py dev-text M W --data D --task qa
    PYTHONPATH=. python research/recall/recall.py choose W --task qa              # the knobs
    PYTHONPATH=. python research/recall/recall.py ask M W --data D --task qa      # held-out items
    PYTHONPATH=. python research/recall/recall.py unneeded-qa M W --data D        # harm to answers
    PYTHONPATH=. python research/recall/recall.py lexical-gate M W --data D --task qa  # BM25's gate
    PYTHONPATH=. python research/recall/recall.py unneeded-lexical M W --data D
    PYTHONPATH=. python research/recall/recall.py unneeded-text M W --data D --task qa
    PYTHONPATH=. python research/recall/recall.py report W --task qa              # tables

``--task needles`` is the same for needles in real text. Each writes one JSON line an item and goes
on where it stopped. D has nq-open-oracle.jsonl.gz (nelson-liu/lost-in-the-middle) and
leval-natural_question.jsonl.gz (L-Eval).
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recall_items import (
    Item,
    bm25,
    coverage,
    encode,
    essays,
    needles,
    questions,
    subspan_match,
)
from recall_memory import (
    SOFTNESS,
    Compressor,
    Reader,
    Reading,
    Recall,
    Row,
    Site,
    random_projection,
    relevance,
    similarities,
)
from torch import Tensor
from transformers import AutoTokenizer

from pacellm_vllm.evals.bootstrap import paired_difference
from pacellm_vllm.evals.records import Records, write_whole

FIND_DEPTHS = (0.05, 0.15, 0.3, 0.5, 0.7, 0.85)
SAY_DEPTHS = (0.5, 0.6, 0.7, 0.8, 0.9)
WIDTHS = (64, 0)  # of a compressed key; 0: as it is
NARROW = (64, 128, 256)
TEMPERATURES = (0.02, 0.05)
THRESHOLDS = tuple(round(0.15 + 0.05 * i, 2) for i in range(15))
WEIGHTS = (0.1, 0.2, 0.3, 0.45, 0.6, 0.75, 0.9)
DEVELOPED = 120  # development items at most
CALIBRATION = 8  # development contexts that a state's mean is taken of
PASSAGES = 10
NEEDLE_TOKENS = 1500
LIMIT = {"qa": 20, "needles": 12}
# What a store of something else may cost on development items, in nats a token of text: of the
# memory that is always on, and of the one that is on only where a passage was found.
MAY_COST = {"token": 0.005, "focus": 0.05}
FALSE_ALARMS = 0.02  # of development items whose store has something else
GROUP = {"qa": 4, "needles": 8}
TEXT_PROMPT, TEXT_SCORED, TEXT_ASKED = 256, 128, 32


class Bench:
    """A model, its tokenizer and the items of a task."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.set_num_threads(1)
        self.task: str = getattr(args, "task", "qa")
        self.data: Path = args.data
        self.tokenizer: Any = AutoTokenizer.from_pretrained(args.model)
        self.reader = Reader(args.model)
        self.stop = {
            token for token in range(len(self.tokenizer)) if "\n" in self.tokenizer.decode([token])
        } | {self.tokenizer.eos_token_id}

    def items(self, held_out: bool, count: int) -> list[Item]:
        """The first ``count`` items of the task, of either half."""
        if self.task == "qa":
            return questions(self.tokenizer, self.data, held_out, count, PASSAGES)
        return needles(self.tokenizer, self.data, held_out, count, NEEDLE_TOKENS)

    def site(self, depth: float, kind: str) -> Site:
        """The layer at ``depth`` (0 to 1), and the kind."""
        return int(depth * self.reader.layers), kind

    def decode(self, tokens: Sequence[int]) -> str:
        """What was said, without the token that ended it."""
        return str(self.tokenizer.decode([t for t in tokens if t not in self.stop])).strip()

    def context(self, item: Item) -> tuple[Reading, slice]:
        """Read an item's context behind its head; where its stored states are.

        The first token is the attention's sink and resembles nothing; the last has no next one.
        """
        ids = item.head + item.context
        return self.reader.read(ids), slice(max(1, len(item.head)), len(ids) - 1)

    def means(self, sites: Sequence[Site]) -> dict[Site, Tensor]:
        """Each site's mean over development contexts: it looks at nothing of what is measured."""
        sums: dict[Site, Tensor] = {}
        tokens = 0
        for item in self.items(held_out=False, count=CALIBRATION):
            reading, stored = self.context(item)
            tokens += stored.stop - stored.start
            for site in sites:
                total = reading.states[site][stored].float().sum(0)
                sums[site] = sums[site] + total if site in sums else total
        return {site: total / tokens for site, total in sums.items()}


def places(item: Item) -> Tensor:
    """The passage of each stored token."""
    of = [i for i, passage in enumerate(item.passages) for _ in passage]
    return torch.tensor(of[0 if item.head else 1 : -1])


def following(item: Item) -> Tensor:
    """The token after each stored token."""
    return torch.tensor(item.context[1 if item.head else 2 :])


def target(logprobs: Tensor, answer: Sequence[int]) -> Tensor:
    """Log-probability of each token of ``answer``; row i of ``logprobs`` is what comes at i."""
    return logprobs[: len(answer)].gather(1, torch.tensor(list(answer))[:, None])[:, 0]


def candidates(
    bench: Bench, finds: Sequence[Site], says: Sequence[Site]
) -> dict[str, tuple[Site, Compressor]]:
    """Every way to make keys that is tried, by name; the sites are watched from now on."""
    sites = list(dict.fromkeys([*finds, *says]))
    bench.reader.watch(sites)
    means = bench.means(sites)
    made: dict[str, tuple[Site, Compressor]] = {}
    for site in sites:
        for centred in (True, False):
            if not centred and site not in finds:
                continue
            for width in WIDTHS:
                mean = means[site] if centred else torch.zeros_like(means[site])
                projection = random_projection(len(mean), width) if width else None
                name = f"{site[0]}-{site[1]}|{'centred' if centred else 'raw'}|{width}"
                made[name] = (site, Compressor(mean, projection))
    return made


def develop(args: argparse.Namespace) -> None:
    """Every candidate on development items, so that choosing needs no second run."""
    bench = Bench(args)
    finds = [bench.site(depth, kind) for depth in FIND_DEPTHS for kind in ("ffn", "in")]
    says = [bench.site(depth, "ffn") for depth in SAY_DEPTHS]
    compressors = candidates(bench, finds, says)
    unrelated = text_for_development(bench)
    before: tuple[Item, dict[str, Tensor]] | None = None
    settings = {"experiment": "dev", "task": bench.task, "model": Path(args.model).name}
    with Records(args.out / f"{bench.task}-dev.jsonl", settings) as records:
        for number, item in enumerate(bench.items(held_out=False, count=args.count)):
            if ("dev", item.id) in records.done:
                continue
            started = time.perf_counter()
            reading, stored = bench.context(item)
            keys = {
                name: compress(reading.states[site][stored])
                for name, (site, compress) in compressors.items()
            }
            answer = encode(bench.tokenizer, " " + item.answers[0])
            alone = bench.reader.read(item.question + answer, last=len(answer) + 1)
            prompt = item.head + item.part(item.gold) + item.question
            beside = bench.reader.read(prompt + answer, last=len(answer) + 1)
            shift = len(prompt) - len(item.question)
            inside = slice(item.span.start + shift, item.span.stop + shift)
            ids = unrelated[number]
            text = bench.reader.read(ids, last=len(ids) // 2 + 1)
            result: dict[str, Any] = {"config": "dev", "id": item.id, "gold": sorted(item.gold)}
            result["find"] = {}
            for name, (site, compress) in compressors.items():
                if site not in finds:
                    continue
                asked = compress(alone.states[site][item.span])
                again = compress(beside.states[site][inside])
                for spread in (False, True):
                    scores, level = score(asked, item, keys[name], spread)
                    found = {
                        "rank": int((scores > max(scores[i] for i in item.gold)).sum()),
                        "own": [float(scores.max()) / len(asked), level],
                    }
                    if before is not None:
                        other = before[1][name]
                        for key, query in (("other", asked), ("prompt", again)):
                            scores, level = score(query, before[0], other, spread)
                            found[key] = [float(scores.max()) / len(asked), level]
                    result["find"][f"{name}|{'spread' if spread else 'plain'}"] = found
            result["bm25"] = rank_of_gold(bm25(item.asked, item.words), item.gold)
            rows = slice(len(item.question) - 1, len(item.question) - 1 + len(answer))
            after = slice(len(ids) // 2 - 1, len(ids) - 1)
            result["alone"] = rounded(target(alone.logprobs, answer).exp())
            result["text"] = rounded(target(text.logprobs, ids[len(ids) // 2 :]).exp())
            result["say"] = {}
            follow, where = following(item), places(item)
            in_gold = torch.tensor([int(i) in item.gold for i in where])
            for name, (site, compress) in compressors.items():
                if site not in says or "|raw|" in name:
                    continue
                tried: dict[str, Any] = {}
                for scope, states, wanted, kept in (
                    ("token", alone.states[site][rows], answer, None),
                    ("focus", alone.states[site][rows], answer, in_gold),
                    ("text", text.states[site][after], ids[len(ids) // 2 :], None),
                    ("text-focus", text.states[site][after], ids[len(ids) // 2 :], where == 0),
                ):
                    tried[scope] = {}
                    for temperature in TEMPERATURES:
                        part = slice(None) if kept is None else kept
                        recall = Recall(
                            compress, keys[name][part], follow[part], temperature, 0.0, 0.0
                        )
                        tokens, shares, best = recall.look_up(states)
                        hit = (shares * (tokens == torch.tensor(wanted)[:, None])).sum(1)
                        tried[scope]["best"] = rounded(best)
                        tried[scope][str(temperature)] = rounded(hit)
                result["say"][name] = tried
            before = (item, keys)
            result["seconds"] = round(time.perf_counter() - started, 2)
            records.add(result)
            print(item.id, result["seconds"], flush=True)


def develop_text(args: argparse.Namespace) -> None:
    """How relevant stores seem to texts that have nothing to do with them."""
    bench = Bench(args)
    finds = [bench.site(depth, kind) for depth in FIND_DEPTHS for kind in ("ffn", "in")]
    compressors = candidates(bench, finds, ())
    texts = text_for_development(bench)
    settings = {"experiment": "dev-text", "task": bench.task, "model": Path(args.model).name}
    with Records(args.out / f"{bench.task}-dev-text.jsonl", settings) as records:
        for item, ids in zip(bench.items(False, args.count), texts, strict=False):
            if ("dev-text", item.id) in records.done:
                continue
            reading, stored = bench.context(item)
            text = bench.reader.read(ids)
            found = {}
            for name, (site, compress) in compressors.items():
                keys = compress(reading.states[site][stored])
                asked = compress(text.states[site][-TEXT_ASKED:])
                for spread in (False, True):
                    scores, level = score(asked, item, keys, spread)
                    found[f"{name}|{'spread' if spread else 'plain'}"] = [
                        float(scores.max()) / len(asked),
                        level,
                    ]
            records.add({"config": "dev-text", "id": item.id, "find": found})


def text_for_development(bench: Bench) -> list[list[int]]:
    """Texts about nothing that is in the stores of development items, 256 tokens each."""
    if bench.task == "qa":
        source = [token for text in essays(bench.tokenizer, bench.data, False) for token in text]
    else:
        asked = questions(bench.tokenizer, bench.data, False, 2 * DEVELOPED, 2)
        source = [token for item in asked for token in item.part(item.gold)]
    step = (len(source) - 256) // DEVELOPED
    return [source[i * step : i * step + 256] for i in range(DEVELOPED)]


def score(query: Tensor, item: Item, keys: Tensor, spread: bool) -> tuple[Tensor, float]:
    """Relevance of each passage, and how alike the query's tokens are to the most relevant."""
    best = similarities(query, keys, places(item), len(item.passages))
    scores = relevance(best, spread)
    return scores, float(best[scores.argmax()].mean())


def rank_of_gold(scores: Sequence[float], gold: set[int]) -> int:
    """How many passages are before the first gold one; those as good are before it."""
    best = max(gold, key=lambda i: scores[i])
    return sum(s >= scores[best] for i, s in enumerate(scores) if i not in gold)


def rounded(values: Tensor) -> list[float]:
    """As numbers for a line of results."""
    return [round(v, 6) for v in values.tolist()]


def choose(args: argparse.Namespace) -> None:
    """Freeze where passages and tokens are looked up, how, and from where on it counts."""
    rows = read_lines(args.out / f"{args.task}-dev.jsonl")
    tables = []
    for name in rows[0]["find"]:
        first = sum(row["find"][name]["rank"] == 0 for row in rows) / len(rows)
        third = sum(row["find"][name]["rank"] < 3 for row in rows) / len(rows)
        for which, kind in enumerate(("margin", "level")):
            found = [row["find"][name] for row in rows if "other" in row["find"][name]]
            own = [cell["own"][which] for cell in found]
            other = [cell[key][which] for cell in found for key in ("other", "prompt")]
            limit = float(np.quantile(other, 1 - FALSE_ALARMS))
            opened = sum(value > limit for value in own) / len(own)
            tables.append((first, third, opened, name, kind, limit))
    close = [t for t in tables if t[0] >= max(u[0] for u in tables) - 0.02]
    taken = max(close, key=lambda t: (t[2] + t[0], t[1]))
    narrow = [t for t in tables if "|64|" in t[3]]
    print(f"{len(rows)} items; the best of all, the best narrow ones, and the chosen:")
    for entry in sorted(tables, reverse=True)[:8] + sorted(narrow, reverse=True)[:4] + [taken]:
        print("@1 {:.3f} @3 {:.3f} opens {:.3f} {} {} {:.4f}".format(*entry))
    ranks = [row["bm25"] for row in rows]
    print(
        f"BM25 @1 {np.mean([r == 0 for r in ranks]):.3f} @3 {np.mean([r < 3 for r in ranks]):.3f}"
    )
    name, centring, width, weighting = taken[3].split("|")
    # The gate is to stay shut for questions and for text.
    which = ("margin", "level").index(taken[4])
    seen = [
        r["find"][taken[3]][which] for r in read_lines(args.out / f"{args.task}-dev-text.jsonl")
    ]
    threshold = max(taken[5], float(np.quantile(seen, 1 - FALSE_ALARMS)))
    own = [row["find"][taken[3]]["own"][which] for row in rows]
    print(f"threshold {threshold:.4f}, opens {np.mean([o > threshold for o in own]):.3f}")
    knobs: dict[str, Any] = {
        "find": {
            "site": parse_site(name),
            "centred": centring == "centred",
            "width": int(width),
            "spread": weighting == "spread",
        },
        "gate": {"score": taken[4], "threshold": threshold},
    }
    # Both ways of reading tokens share one site, so that a token has one key for them.
    chosen: dict[str, list[tuple[float, float, float, float, float]]] = {}
    for say in rows[0]["say"]:
        chosen[say] = [
            min(tried for tried in attempts(rows, say, scope, harm) if tried[1] <= MAY_COST[scope])
            for scope, harm in (("token", "text"), ("focus", "text-focus"))
        ]
        print(say, chosen[say])
    say = min(
        (say for say in chosen if say.endswith("|64")), key=lambda s: sum(t[0] for t in chosen[s])
    )
    for scope, (gain, cost, temperature, threshold, weight) in zip(
        ("token", "focus"), chosen[say], strict=True
    ):
        print(f"{scope}: {gain:+.3f} nats an answer, {cost:+.4f} a token of other text; {say}")
        knobs[scope] = {
            "site": parse_site(say.split("|")[0]),
            "width": int(say.split("|")[2]),
            "temperature": temperature,
            "threshold": threshold,
            "weight": weight,
        }
    write_whole(args.out / f"{args.task}-knobs.json", json.dumps(knobs, indent=1) + "\n")


def attempts(
    rows: Sequence[dict[str, Any]], say: str, scope: str, harm: str
) -> Iterator[tuple[float, float, float, float, float]]:
    """Nats an answer, nats a token of other text, temperature, threshold and weight."""
    for temperature in TEMPERATURES:
        for threshold in THRESHOLDS:
            for weight in WEIGHTS:
                knobs = (temperature, threshold, weight)
                gain, _ = loss_change(rows, say, scope, "alone", *knobs)
                _, cost = loss_change(rows, say, harm, "text", *knobs)
                yield (gain, cost, *knobs)


def parse_site(name: str) -> list[Any]:
    """Layer and kind of a site, from its name."""
    layer, kind = name.split("-")
    return [int(layer), kind]


def loss_change(
    rows: Sequence[dict[str, Any]],
    say: str,
    scope: str,
    base: str,
    temperature: float,
    threshold: float,
    weight: float,
) -> tuple[float, float]:
    """What a mixture adds to the loss: nats an item, nats a token."""
    model = np.array([p for row in rows for p in row[base]])
    hit = np.array([p for row in rows for p in row["say"][say][scope][str(temperature)]])
    best = np.array([p for row in rows for p in row["say"][say][scope]["best"]])
    share = weight / (1 + np.exp(-(best - threshold) / SOFTNESS))
    mixed = (1 - share) * model + share * hit
    total = float((np.log(model.clip(1e-9)) - np.log(mixed.clip(1e-9))).sum())
    return total / len(rows), total / len(model)


class Memory:
    """The chosen compressors and gate of a task, for a model."""

    def __init__(self, bench: Bench, out: Path) -> None:
        self.knobs = json.loads((out / f"{bench.task}-knobs.json").read_text())
        self.sites: dict[str, Site] = {
            use: (self.knobs[use]["site"][0], self.knobs[use]["site"][1])
            for use in ("find", "token", "focus")
        }
        if self.sites["token"] != self.sites["focus"]:
            raise ValueError("both ways of reading tokens need one site")
        sites = sorted(set(self.sites.values()))
        bench.reader.watch(sites)
        means = bench.means(sites)
        self.compress: dict[str, Compressor] = {}
        # What finding would be with keys of fewer numbers; nothing else uses these.
        self.narrow: dict[int, Compressor] = {}
        for use, site in self.sites.items():
            mean, width = means[site], self.knobs[use]["width"]
            projection = random_projection(len(mean), width) if width else None
            if not self.knobs[use].get("centred", True):
                mean = torch.zeros_like(mean)
            self.compress[use] = Compressor(mean, projection)
            if use == "find":
                for fewer in NARROW:
                    projection = random_projection(len(mean), fewer)
                    self.narrow[fewer] = Compressor(mean, projection)

    def store(self, reading: Reading, stored: slice, item: Item) -> "Store":
        """Of what ``Bench.context`` read: keys as they would lie in bfloat16."""
        keys = {
            use: compress(reading.states[self.sites[use]][stored]).bfloat16().float()
            for use, compress in self.compress.items()
        }
        return Store(self, item, keys)


class Store:
    """What is kept of one item's context."""

    def __init__(self, memory: Memory, item: Item, keys: dict[str, Tensor]) -> None:
        self.memory, self.item, self.keys = memory, item, keys
        self.follow, self.where = following(item), places(item)

    def find(self, states: Tensor) -> tuple[list[int], float]:
        """Passages, the most relevant to the states ``[m, D]`` first; how sure that is."""
        knobs = self.memory.knobs
        query = self.memory.compress["find"](states)
        scores, level = score(query, self.item, self.keys["find"], knobs["find"]["spread"])
        sure = level if knobs["gate"]["score"] == "level" else float(scores.max()) / len(query)
        return scores.argsort(descending=True).tolist(), sure

    def opens(self, sure: float) -> bool:
        """Whether the gate is open for a relevance of ``sure``."""
        return sure > self.memory.knobs["gate"]["threshold"]

    def recall(self, use: str, passages: Sequence[int] | None = None) -> Recall:
        """What recalls tokens, from ``passages`` alone if any are named."""
        knobs = self.memory.knobs[use]
        keys, follow = self.keys[use], self.follow
        if passages is not None:
            inside = torch.isin(self.where, torch.tensor(list(passages)))
            keys, follow = keys[inside], follow[inside]
        return Recall(
            self.memory.compress[use],
            keys,
            follow,
            knobs["temperature"],
            knobs["threshold"],
            knobs["weight"],
        )


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
            started = time.perf_counter()
            asked, results = [], []
            for item in group:
                question, facts = ask_about(bench, memory, item)
                asked.append(question)
                results.append(facts)
            write_all(bench, asked)
            seconds = (time.perf_counter() - started) / len(group)
            for item, question, facts in zip(group, asked, results, strict=True):
                records.add(
                    {"config": "ask", "id": item.id, "seconds": round(seconds, 2)}
                    | facts
                    | question.result()
                )
            print(group[-1].id, round(seconds, 2), flush=True)


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
            begun = time.perf_counter()
            chosen = numbers[start : start + 8]
            other = unrelated(items, chosen)
            reading, stored = bench.context(other)
            store = memory.store(reading, stored, other)
            asked, results = [], []
            for n in chosen:
                question, facts = ask_unneeded(bench, memory, store, items[n])
                asked.append(question)
                results.append(facts)
            write_all(bench, asked)
            seconds = (time.perf_counter() - begun) / len(chosen)
            for n, question, facts in zip(chosen, asked, results, strict=True):
                records.add(
                    {
                        "config": "unneeded-qa",
                        "id": items[n].id,
                        "seconds": round(seconds, 2),
                    }
                    | facts
                    | question.result()
                )
            print(items[chosen[-1]].id, round(seconds, 2), flush=True)


def unrelated(items: Sequence[Item], chosen: Sequence[int]) -> Item:
    """The first item after the ``chosen`` ones that has none of their passages."""
    words = {text for n in chosen for text in items[n].words}
    return next(item for item in items[chosen[-1] + 1 :] if not words & {*item.words})


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


def beside(item: Item) -> list[int]:
    """The gold passage and one more: a prompt that has what its question needs."""
    spare = next(i for i in range(len(item.passages)) if i not in item.gold)
    return item.part({*item.gold, spare})


def passages_of_questions(bench: Bench, number: int) -> Item:
    """Passages of Natural Questions as a store for a model that was tuned on needles."""
    return questions(bench.tokenizer, bench.data, True, number + 1, 10)[number]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The results of a file of ``Records``, in order."""
    return [line for line in map(json.loads, path.open()) if "id" in line]


ARMS_COMPARED = (
    ("read again found 1", "read again BM25 1"),
    ("read again found 2", "read again BM25 2"),
    ("read again found 2", "last tokens as many"),
    ("read again found 2", "whole context"),
    ("read again found 2", "read again gold"),
    ("recall in found 1", "recall any token"),
    ("recall in found 1", "whole context"),
)


def report(args: argparse.Namespace) -> None:
    """Print the tables of what was measured."""
    limit = json.loads((args.out / f"{args.task}-knobs.json").read_text())["gate"]["threshold"]
    for name, base in (
        (f"{args.task}-ask", "alone"),
        ("unneeded-qa", "off"),
        (f"{args.task}-unneeded-text", "off"),
    ):
        path = args.out / f"{name}.jsonl"
        if not path.exists():
            continue
        rows = read_lines(path)
        for row in rows:
            row["opens"] = row["sure"] > limit
        print(f"\n{name}: {len(rows)} items, gate open in {sum(r['opens'] for r in rows)}\n")
        if base == "off":
            if name == "unneeded-qa":
                add_lexical(rows, args.out)
            print(table(rows, base))
            continue
        lexical = args.out / f"{args.task}-lexical.jsonl"
        if lexical.exists():
            lines = read_lines(lexical)
            opens = {line["id"]: line["opens"] for line in lines if line["config"] == "own"}
            other = [line["opens"] for line in lines if line["config"] == "other"]
            for row in rows:
                row["lexical"] = opens[row["id"]]
            print(f"BM25's gate: open in {sum(row['lexical'] for row in rows)} of {len(rows)}")
            print(f"with another item's store in {sum(other)} of {len(other)}\n")
        rows = [gated(row) for row in rows]
        print(table(rows, base), finding(rows), comparisons(rows), sep="\n\n")
        print("\n" + costs(rows))
        if args.task == "needles":
            for kind, odd in (("five digits", 0), ("six letters and digits", 1)):
                part = [row for row in rows if int(row["id"].split("-")[1]) % 2 == odd]
                print(f"\n{kind}: {len(part)} items\n\n{table(part, base)}")


def add_lexical(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Add BM25's gated arm to questions that do not need it, where it was measured."""
    if (out / "unneeded-lexical.jsonl").exists():
        opened = {line["id"]: line for line in read_lines(out / "unneeded-lexical.jsonl")}
        for row in rows:
            for kind in ("match", "loss"):
                own = opened.get(row["id"])
                value = own[kind]["read again BM25 2"] if own else row[kind]["off"]
                row[kind]["read again BM25 2, gated"] = value


def gated(row: dict[str, Any]) -> dict[str, Any]:
    """With more arms, which are the question alone unless the gate was open."""
    for arm in ("recall in found 1", "read again found 1", "read again found 2"):
        for kind in ("match", "loss"):
            row[kind][f"{arm}, gated"] = row[kind][arm if row["opens"] else "alone"]
    if "lexical" in row:
        for arm in ("read again BM25 1", "read again BM25 2"):
            for kind in ("match", "loss"):
                row[kind][f"{arm}, gated"] = row[kind][arm if row["lexical"] else "alone"]
    return row


def comparisons(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: pairs of arms on the same items."""
    lines = ["| arm - other arm | match | loss |", "|---|---|---|"]
    for arm, other in ARMS_COMPARED:
        cells = [
            str(paired_difference([r[kind][other] for r in rows], [r[kind][arm] for r in rows]))
            for kind in ("match", "loss")
        ]
        lines.append(f"| {arm} - {other} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def costs(rows: Sequence[dict[str, Any]]) -> str:
    """What was read again, and how long the median look-up took."""
    middle = {key: np.median([row[key] for row in rows]) for key in ("find_us", "look_up_us")}
    tokens = np.mean([row["tokens"] for row in rows])
    again = [np.mean([row["again"][n] for row in rows]) for n in ("1", "2")]
    return (
        f"{tokens:.0f} tokens a context, {again[0]:.0f} and {again[1]:.0f} read again; finding "
        f"{middle['find_us']:.0f} us a question, a look-up {middle['look_up_us']:.0f} us (median)"
    )


def table(rows: Sequence[dict[str, Any]], base: str) -> str:
    """Markdown: each arm's mean match and loss, and what it adds to ``base``, with intervals."""
    lines = [
        f"| arm | match | match - {base} | loss | loss - {base} |",
        "|---|---|---|---|---|",
    ]
    for arm in rows[0]["match"]:
        cells = []
        for kind in ("match", "loss"):
            own = [row[kind][arm] for row in rows]
            difference = paired_difference([row[kind][base] for row in rows], own)
            cells += [f"{np.mean(own):.3f}", str(difference) if arm != base else ""]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def finding(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: how often a gold passage is among the first of either order."""
    lines = ["| passages | @1 | @2 | @3 |", "|---|---|---|---|"]
    orders = {"found": [row["found"] for row in rows], "BM25": [row["bm25"] for row in rows]}
    for width in rows[0]["narrow"]:
        orders[f"found with keys of {width}"] = [row["narrow"][width] for row in rows]
    hits = {
        name: [
            [float(bool({*row["gold"]} & {*o[:n]})) for row, o in zip(rows, order, strict=True)]
            for n in (1, 2, 3)
        ]
        for name, order in orders.items()
    }
    for name, own in hits.items():
        lines.append(f"| {name} | " + " | ".join(f"{np.mean(cell):.3f}" for cell in own) + " |")
    pairs = zip(hits["BM25"], hits["found"], strict=True)
    lines.append("| found - BM25 | " + " | ".join(str(paired_difference(*p)) for p in pairs) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    experiments: dict[str, tuple[Callable[[argparse.Namespace], None], int]] = {
        "dev": (develop, 80),
        "dev-text": (develop_text, 80),
        "ask": (ask, 200),
        "unneeded-qa": (unneeded_questions, 216),
        "lexical-gate": (lexical_gate, 216),
        "unneeded-lexical": (unneeded_lexical, 216),
        "unneeded-text": (unneeded_text, 200),
    }
    for name, (function, count) in experiments.items():
        command = commands.add_parser(name)
        command.add_argument("model")
        command.add_argument("out", type=Path)
        command.add_argument("--data", type=Path, required=True)
        command.add_argument("--count", type=int, default=count, help="items")
        if not name.startswith("unneeded-") or name == "unneeded-text":
            command.add_argument("--task", choices=("qa", "needles"), required=True)
        if name not in ("dev", "dev-text", "ask", "unneeded-text"):
            command.add_argument("--skip", type=int, default=600, help="held-out items before")
        command.set_defaults(function=function)
    for name, function in (("choose", choose), ("report", report)):
        command = commands.add_parser(name)
        command.add_argument("out", type=Path)
        command.add_argument("--task", choices=("qa", "needles"), required=True)
        command.set_defaults(function=function)
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
