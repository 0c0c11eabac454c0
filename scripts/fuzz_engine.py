"""Builds random engines and holds every answer to the oracle, every pool to "all blocks back".

    python scripts/fuzz_engine.py --engines 200 --seed 0

Engine i is a function of seed S + i alone. A line for each says what it was; one that fails comes
with a command that repeats it, and the exit code is then 1. ``--break NAME`` puts a fault into the
package first, ``--plain`` runs the same engines without memory. An engine that fails in a
way that vLLM may is run without memory at once: faults that are there too are counted as vLLM's
own, and no failure.
Ctrl-C ends with the summary of what was done.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import fuzz
from fuzz.cases import FEATURES
from fuzz.children import verdicts, work
from fuzz.own import are_vllms, kind_of
from fuzz.verdict import Verdict

BREAKS = (
    "snapshot-of-a-segment",
    "commit-early",
    "settings-not-in-key",
    "page-not-refreshed",
    "snapshot-not-copied",
    "hit-on-top",
)
COUNTED = (
    "requests",
    "tokens compared",
    "tokens too near a tie",
    "hit tokens",
    "preemptions",
    "commits",
    "aborted",
    "resets",
    "drafts",
    "accepted",
    "refused",
)


def main() -> None:
    args = _arguments()
    if args.child:
        work(range(args.seed, args.seed + args.engines), args.models, args.broken, args.plain)
        return
    done: list[Verdict] = []
    with contextlib.suppress(KeyboardInterrupt), _folder(args.models) as models:
        options = ["--break", args.broken] if args.broken else []
        options += ["--plain"] if args.plain else []
        seeds = range(args.seed, args.seed + args.engines)
        for verdict in verdicts(seeds, models, options, args.per_process, args.patience):
            # Those that are surely ours first.
            verdict.faults.sort(key=lambda fault: kind_of(fault) is not None)
            if verdict.faults and kind_of(verdict.faults[0]) and not args.plain:
                alone = range(verdict.seed, verdict.seed + 1)
                [plain] = verdicts(alone, models, ["--plain"], 1, args.patience)
                verdict.vllms = are_vllms(verdict.faults, plain.faults)
            done.append(verdict)
            _say(verdict, len(done), options)
            if verdict.failed and args.first:
                break
    failed = _summary(done, args.engines)
    if args.json:
        args.json.write_text(json.dumps([verdict.as_dict() for verdict in done], indent=1))
    sys.exit(1 if failed or not done else 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--engines", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the first engine")
    parser.add_argument("--break", dest="broken", choices=BREAKS, help="a fault to put in first")
    parser.add_argument("--plain", action="store_true", help="without memory")
    parser.add_argument("--first", action="store_true", help="stop at the first engine that fails")
    parser.add_argument("--json", type=Path, help="where to write what is said of each engine")
    parser.add_argument("--per-process", type=int, default=15, help="engines in one process")
    parser.add_argument("--patience", type=float, default=180, help="seconds to wait for an engine")
    parser.add_argument("--models", type=Path, help="folder that keeps the checkpoints")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


@contextlib.contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


def _say(verdict: Verdict, number: int, options: list[str]) -> None:
    hits = verdict.counts.get("hit tokens", 0)
    requests = verdict.counts.get("requests", 0)
    print(
        f"{number:4d}  seed {verdict.seed}  {verdict.state}  {verdict.seconds:.1f} s  "
        f"{verdict.about}; {requests} requests, {hits} tokens hit",
        flush=True,
    )
    for fault in verdict.faults[:3]:
        print(f"      {fault}", flush=True)
    if len(verdict.faults) > 3:
        print(f"      and {len(verdict.faults) - 3} more", flush=True)
    if verdict.faults:
        again = " ".join(["--seed", str(verdict.seed), "--engines 1", *options])
        print(f"      again: .venv/bin/python {sys.argv[0]} {again}", flush=True)


def _summary(done: list[Verdict], wanted: int) -> int:
    failed = [verdict for verdict in done if verdict.failed]
    own = [verdict for verdict in done if verdict.vllms]
    counts: Counter[str] = Counter()
    features: Counter[str] = Counter()
    for verdict in done:
        counts.update(verdict.counts)
        features.update(verdict.features)
    seconds = sum(verdict.seconds for verdict in done)
    print(
        f"\n{len(done)} of {wanted} engines, {len(failed)} failed, {len(own)} vLLM's own, "
        f"{seconds:.0f} s"
    )
    print(", ".join(f"{name}: {counts[name]}" for name in COUNTED))
    print("engines with: " + ", ".join(f"{name} {features[name]}" for name in sorted(FEATURES)))
    for verdict in failed + own:
        print(f"seed {verdict.seed}: {verdict.state}: {verdict.faults[0]}")
    return len(failed)


if __name__ == "__main__":
    assert fuzz
    main()
