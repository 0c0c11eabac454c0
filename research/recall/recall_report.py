"""The tables of what was measured."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from recall_bench import read_lines

from pacellm_vllm.evals.bootstrap import paired_difference

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
