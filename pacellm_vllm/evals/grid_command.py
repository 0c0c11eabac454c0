"""What ``pacellm eval niah`` and ``sweep`` share: a needle grid, asked and recorded."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pacellm_vllm import __version__
from pacellm_vllm.evals.arguments import (
    add_model,
    at_least,
    given,
    list_of,
    read_tokenizer,
    require_room,
)
from pacellm_vllm.evals.records import Records
from pacellm_vllm.evals.settings import Setting


def add_grid(parser: argparse.ArgumentParser) -> None:
    add_model(parser, batch=8)
    parser.add_argument("--lengths", type=list_of(int, 1), default=(4096, 8192, 16384, 32000))
    parser.add_argument("--depths", type=list_of(float, 0, 100), default=(0, 25, 50, 75, 100))
    parser.add_argument("--samples", type=at_least(1), default=5, help="items per cell (5)")
    parser.add_argument("--needles", type=at_least(1), default=1, help="one is asked for (1)")
    parser.add_argument("--digits", type=at_least(1), default=7, help="of the answer (7)")
    parser.add_argument("--haystack", type=Path, nargs="+", default=(), help="text files")
    parser.add_argument(
        "--needle-file", type=Path, help="JSON lines with needle, question and answer"
    )
    parser.add_argument("--chat", action="store_true", help="use the model's chat template")
    parser.add_argument("--max-tokens", type=at_least(1), default=16, help="of an answer (16)")


@contextmanager
def started(
    args: argparse.Namespace, settings: Sequence[Setting], **more: Any
) -> Iterator[tuple[Any, Any, Records, dict[str, Any]]]:
    """The grid, the tokenizer, the results so far and what they were measured with.

    ``more`` is part of the latter.
    """
    from pacellm_vllm.evals.answers import check_settings
    from pacellm_vllm.evals.niah import Grid

    # Before a model is loaded: pictures come last and must not be what fails.
    from pacellm_vllm.evals.plots import require_matplotlib
    from pacellm_vllm.evals.prompts import require_chat_template

    require_matplotlib()
    grid = Grid(
        lengths=args.lengths,
        depths=args.depths,
        samples=args.samples,
        needles=args.needles,
        digits=args.digits,
        seed=args.seed,
        chat=args.chat,
        max_tokens=args.max_tokens,
        haystack=tuple(args.haystack),
        needle_file=args.needle_file,
    )
    described = {
        "version": __version__,
        "model": args.model,
        "grid": grid.describe(),
        "configs": {setting.name: setting.memory for setting in settings},
        "engine": given(args, "engine"),
        "server": bool(getattr(args, "base_url", None)),
        **more,
    }
    tokenizer = read_tokenizer(args)
    check_settings(args.model, settings, described["engine"])
    if grid.chat:
        require_chat_template(tokenizer)
    with Records(args.out / "items.jsonl", described) as records:
        yield grid, tokenizer, records, described


def measure(
    args: argparse.Namespace,
    grid: Any,
    tokenizer: Any,
    records: Records,
    settings: Sequence[Setting],
    servers: Mapping[str, str],
) -> None:
    """Ask every configuration what the records lack of it."""
    from pacellm_vllm.evals.answers import answering
    from pacellm_vllm.evals.niah import run_grid

    engine = given(args, "engine")
    longest = max(grid.lengths)
    if not servers:
        what = f"a prompt of {longest} tokens (--lengths)"
        require_room(args.model, engine, longest + grid.max_tokens, what)
    engine.setdefault("max_model_len", longest + grid.max_tokens)
    engine.setdefault("seed", args.seed)
    for setting in settings:
        if sum(name == setting.name for name, _ in records.done) == grid.num_items:
            continue
        with answering(args, setting, engine, servers) as answerer:
            records.describe(setting.name, answerer.describe())
            run_grid(grid, tokenizer, setting.name, answerer, records, args.batch, not args.quiet)
