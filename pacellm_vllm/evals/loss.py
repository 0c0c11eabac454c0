"""Loss by position: what memory changes in every token of the same texts."""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from pacellm_vllm.evals.answers import Offline
from pacellm_vllm.evals.arguments import given_text
from pacellm_vllm.evals.bootstrap import Difference, paired_difference, warned
from pacellm_vllm.evals.plots import curves
from pacellm_vllm.evals.records import EvalError, Records, write_whole
from pacellm_vllm.evals.text import sentences


@dataclass(frozen=True)
class Text:
    """The first tokens of one text; ``id`` names it and what it says."""

    id: str
    ids: list[int] = field(repr=False)


def read_texts(
    files: Sequence[Path], count: int, tokens: int, tokenizer: Any, seed: int
) -> list[Text]:
    """The first ``tokens`` of each of ``files``, or of ``count`` built-in texts without any.

    Raises ``EvalError`` for a file that cannot be read or is shorter.
    """
    texts = []
    for path in files:
        words = given_text(path)
        ids = tokenizer(words).input_ids
        if len(ids) < tokens:
            raise EvalError(
                f"pacellm: --text {str(path)!r} has {len(ids)} tokens, fewer than --tokens "
                f"{tokens}; drop it or lower --tokens."
            )
        # A fingerprint, so that an edited file is another text.
        digest = hashlib.sha256(words.encode()).hexdigest()[:12]
        texts.append(Text(f"{path.name}/{digest}", ids[:tokens]))
    for number in range(0 if files else count):
        source = sentences(random.Random(seed + number))
        words = " ".join(next(source) for _ in range(tokens // 8 + 1))
        texts.append(Text(f"built in/{seed + number}", tokenizer(words).input_ids[:tokens]))
    return texts


def measure(
    texts: Sequence[Text], name: str, answerer: Offline, records: Records, batch: int
) -> None:
    """Score what ``records`` lack of configuration ``name``.

    Raises ``EvalError`` where a token's loss is no number, as at positions that a model has none
    for.
    """
    missing = [text for text in texts if (name, text.id) not in records.done]
    for begin in range(0, len(missing), batch):
        some = missing[begin : begin + batch]
        for text, losses in zip(some, answerer.losses([t.ids for t in some]), strict=True):
            broken = next((at for at, loss in enumerate(losses, 1) if not isfinite(loss)), None)
            if broken is not None:
                raise EvalError(
                    f"pacellm: with {name} the token at position {broken} of {text.id} has a loss "
                    "that is no number; where the model's own context ends before it, lower "
                    "--tokens, or give --engine its hf_overrides for a longer one."
                )
            rounded = [round(loss, 5) for loss in losses]
            records.add({"config": name, "id": text.id, "loss": rounded})


def ranges(tokens: int, step: int, acts: int) -> list[tuple[int, int]]:
    """Positions ``step`` at a time; last, all that memory can change: those from ``acts`` on."""
    found = [(begin, min(begin + step, tokens)) for begin in range(0, tokens, step)]
    return [*found, (acts, tokens)] if acts < tokens else found


def write_report(
    out: Path,
    names: Sequence[str],
    texts: Sequence[Text],
    positions: Sequence[tuple[int, int]],
    records: Records,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """``report.json``, ``report.md`` and ``loss.png``; differences are to the first name."""
    first, *others = names
    # The token at position p is predicted by those before it; the first one has no loss.
    means = {
        name: [
            [fmean(records.done[name, text.id]["loss"][max(0, a - 1) : b - 1]) for text in texts]
            for a, b in positions
        ]
        for name in names
    }
    report: dict[str, Any] = {
        "settings": dict(settings),
        "engines": {name: records.engines[name] for name in names},
        "texts": [text.id for text in texts],
        "positions": [list(pair) for pair in positions],
        "loss": {name: [fmean(by_text) for by_text in means[name]] for name in names},
        "differences": {
            name: [
                vars(paired_difference(a, b))
                for a, b in zip(means[first], means[name], strict=True)
            ]
            for name in others
        },
    }
    steps = [end for _, end in positions]
    # Up to the first that ends the texts; behind it may be one that spans others.
    count = steps.index(max(steps)) + 1
    lines: dict[str, tuple[Sequence[float], Sequence[float]]] = {
        name: (steps[:count], report["loss"][name][:count]) for name in names
    }
    curves(out / "loss.png", lines, "up to position (tokens)", "loss (nats per token)")
    write_whole(out / "report.json", json.dumps(report, indent=1) + "\n")
    write_whole(out / "report.md", as_markdown(report, first))
    return report


def as_markdown(report: Mapping[str, Any], first: str) -> str:
    others = list(report["differences"])
    lines = [
        f"Loss (nats per token) of {len(report['texts'])} texts by position; differences to "
        f"`{first}` with paired bootstrap 95 % intervals over texts."
        + warned(len(report["texts"]), "texts"),
        "",
        "| positions | " + " | ".join([first, *(f"{name} - {first}" for name in others)]) + " |",
        "|---" * (len(others) + 2) + "|",
    ]
    for i, (begin, end) in enumerate(report["positions"]):
        cells = [f"{report['loss'][first][i]:.3f}"]
        for name in others:
            found = Difference(**report["differences"][name][i])
            cells.append(f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]")
        lines.append(f"| {begin} to {end} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
