"""Every way to make and read keys, on development items, and the choice among them."""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recall_bench import (
    TEXT_ASKED,
    Bench,
    following,
    places,
    read_lines,
    score,
    target,
    text_for_development,
)
from recall_items import Item, bm25, encode
from recall_memory import SOFTNESS, Compressor, Recall, Site, random_projection
from torch import Tensor

from pacellm_vllm.evals.records import Records, write_whole

FIND_DEPTHS = (0.05, 0.15, 0.3, 0.5, 0.7, 0.85)
SAY_DEPTHS = (0.5, 0.6, 0.7, 0.8, 0.9)
WIDTHS = (64, 0)  # of a compressed key; 0: as it is
TEMPERATURES = (0.02, 0.05)
THRESHOLDS = tuple(round(0.15 + 0.05 * i, 2) for i in range(15))
WEIGHTS = (0.1, 0.2, 0.3, 0.45, 0.6, 0.75, 0.9)
# What a store of something else may cost on development items, in nats a token of text: of the
# memory that is always on, and of the one that is on only where a passage was found.
MAY_COST = {"token": 0.005, "focus": 0.05}
FALSE_ALARMS = 0.02  # of development items whose store has something else


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
