"""``pacellm eval niah | sweep``: what memory changes, measured."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pacellm_vllm import __version__
from pacellm_vllm.config import PaceConfigError
from pacellm_vllm.evals.records import EvalError, Records, write_whole
from pacellm_vllm.evals.settings import OFF, Setting, parse_object, parse_settings


def add_parser(subparsers: Any) -> None:
    """Register ``eval``; each measurement's ``run(args, rest)`` returns the exit status."""
    parser = subparsers.add_parser(
        "eval",
        help="measure what memory changes",
        description="Measure a model with and without memory, on the same items.",
        allow_abbrev=False,
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="WHAT")
    niah = kinds.add_parser(
        "niah",
        help="needles in a haystack: context lengths x depths",
        description="Hides needles in text of several lengths and depths and asks for one. "
        "Results go to OUT line by line; the same command continues an interrupted run.",
        allow_abbrev=False,
    )
    _add_grid(niah)
    niah.add_argument(
        "--configs",
        default="off,official",
        help="off, official, paper, or JSON of names to settings; all are compared to the "
        "first (%(default)s)",
    )
    niah.add_argument(
        "--base-url",
        action="append",
        metavar="[NAME=]URL",
        help="ask a running server (http://host:port/v1) instead of an engine in this process; "
        "NAME= for several servers, one per configuration",
    )
    niah.add_argument("--served-model-name", help="the server's name for the model (MODEL)")
    niah.add_argument("--api-key", default="none", help="of the server")
    niah.set_defaults(run=_guarded(_niah))

    sweep = kinds.add_parser(
        "sweep",
        help="which settings help: needles over many configurations",
        description="Tries settings one at a time (or their product) on one needle grid, chooses "
        "on one half of the items, confirms on the other, and writes a configuration file.",
        allow_abbrev=False,
    )
    _add_grid(sweep)
    sweep.add_argument(
        "--try",
        dest="tried",
        required=True,
        metavar="JSON",
        help='values by setting, such as \'{"layers": [[12], [26]], "alpha": [0.1, 0.2]}\'',
    )
    sweep.add_argument("--product", action="store_true", help="all combinations, not one at a time")
    sweep.set_defaults(run=_guarded(_sweep))


def _add_grid(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="checkpoint directory or hub name")
    parser.add_argument("--out", type=Path, required=True, help="directory for the results")
    parser.add_argument("--lengths", type=_list_of(int, 1), default=(4096, 8192, 16384, 32768))
    parser.add_argument("--depths", type=_list_of(float, 0, 100), default=(0, 25, 50, 75, 100))
    parser.add_argument("--samples", type=_at_least(1), default=5, help="items per cell (5)")
    parser.add_argument("--needles", type=_at_least(1), default=1, help="one is asked for (1)")
    parser.add_argument("--digits", type=_at_least(1), default=7, help="of the answer (7)")
    parser.add_argument("--haystack", type=Path, nargs="+", default=(), help="text files")
    parser.add_argument(
        "--needle-file", type=Path, help="JSON lines with needle, question and answer"
    )
    parser.add_argument("--chat", action="store_true", help="use the model's chat template")
    parser.add_argument("--max-tokens", type=_at_least(1), default=16, help="of an answer (16)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=_at_least(1), default=8, help="prompts at once (8)")
    parser.add_argument(
        "--memory", default="", metavar="JSON", help="settings that all configurations share"
    )
    parser.add_argument(
        "--engine",
        default="",
        metavar="JSON",
        help='arguments of vllm.LLM, such as \'{"dtype": "float32", "max_model_len": 8192}\'',
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def _list_of(kind: type, low: float, high: float = float("inf")) -> Callable[[str], tuple]:
    def parse(text: str) -> tuple:
        try:
            values = tuple(kind(part) for part in text.split(","))
        except ValueError:
            values = ()
        if not values or not all(low <= v <= high for v in values) or len({*values}) < len(values):
            raise argparse.ArgumentTypeError(
                f"distinct numbers from {low:g} to {high:g} such as 25,50"
            )
        return values

    return parse


def _at_least(low: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"an integer of at least {low}")
        return int(text)

    return parse


def _guarded(run: Callable[[argparse.Namespace], int]) -> Callable[..., int]:
    def guarded(args: argparse.Namespace, rest: Sequence[str] | None = None) -> int:
        if rest:
            print(f"pacellm: unknown argument {rest[0]!r} of pacellm eval.", file=sys.stderr)
            return 2
        try:
            return run(args)
        except (EvalError, PaceConfigError) as error:
            print(error, file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("pacellm: interrupted; the same command continues.", file=sys.stderr)
            return 130

    return guarded


@contextmanager
def _started(
    args: argparse.Namespace, settings: Sequence[Setting]
) -> Iterator[tuple[Any, Any, Records, dict[str, Any]]]:
    """The grid, the tokenizer, the results so far and what they were measured with."""
    from transformers import AutoTokenizer

    from pacellm_vllm.evals.niah import Grid

    # Before a model is loaded: pictures come last and must not be what fails.
    from pacellm_vllm.evals.plots import require_matplotlib

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
        "engine": _given(args, "engine"),
        "server": bool(getattr(args, "base_url", None)),
    }
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise EvalError(
            f"pacellm: the tokenizer of {args.model!r} cannot be read ({reason}); MODEL must be a "
            "checkpoint directory or a hub name."
        ) from None
    with Records(args.out / "items.jsonl", described) as records:
        yield grid, tokenizer, records, described


def _measure(
    args: argparse.Namespace,
    grid: Any,
    tokenizer: Any,
    records: Records,
    settings: Sequence[Setting],
    servers: Mapping[str, str] | None = None,
) -> None:
    from pacellm_vllm.evals.answers import Offline, Server, offline_engine
    from pacellm_vllm.evals.niah import run_grid

    total = len(grid.lengths) * len(grid.depths) * grid.samples
    engine = _given(args, "engine")
    engine.setdefault("max_model_len", max(grid.lengths) + grid.max_tokens)
    engine.setdefault("seed", args.seed)
    for setting in settings:
        if sum(name == setting.name for name, _ in records.done) == total:
            continue
        rest = (grid, tokenizer, setting.name)
        if servers:
            name = args.served_model_name or args.model
            server = Server(servers[setting.name], name, args.api_key)
            run_grid(*rest, server, records, args.batch, not args.quiet)
            continue
        with offline_engine(args.model, setting.memory, engine) as llm:
            run_grid(*rest, Offline(llm), records, args.batch, not args.quiet)


def _given(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """The JSON object of flag ``--name``, empty without one."""
    text = getattr(args, name)
    return parse_object(text, f"--{name}") if text else {}


def _niah(args: argparse.Namespace) -> int:
    settings = parse_settings(args.configs, _given(args, "memory"))
    servers = _servers(args.base_url, [setting.name for setting in settings])
    with _started(args, settings) as (grid, tokenizer, records, described):
        _measure(args, grid, tokenizer, records, settings, servers)
        from pacellm_vllm.evals.report import as_markdown, write_report

        names = [setting.name for setting in settings]
        report = write_report(args.out, grid, names, records, described)
    print(as_markdown(report, names[0]), end="")
    return 0


def _servers(given: Sequence[str] | None, names: Sequence[str]) -> dict[str, str] | None:
    if not given:
        return None
    servers = {}
    for text in given:
        name, equals, url = text.partition("=")
        if equals and not name.startswith("http"):
            servers[name] = url
        elif len(names) == 1:
            servers[names[0]] = text
    if set(servers) != set(names):
        raise EvalError(
            f"pacellm: --base-url must give one server for each of {', '.join(names)}; write it "
            "as --base-url NAME=URL, or name one configuration in --configs."
        )
    return servers


def _sweep(args: argparse.Namespace) -> int:
    from pacellm_vllm.evals.sweep import choose, combinations

    if args.samples < 2:
        raise EvalError(
            f"pacellm: --samples {args.samples} leaves nothing to confirm a choice with; it must "
            "be at least 2."
        )
    tried = combinations(parse_object(args.tried, "--try"), _given(args, "memory"), args.product)
    settings = [Setting(OFF, None), *tried]
    with _started(args, settings) as (grid, tokenizer, records, _):
        _measure(args, grid, tokenizer, records, settings)
        from pacellm_vllm.evals.answers import architectures

        _, pace = architectures(args.model)
        served = {"model": args.model, "hf-overrides": json.dumps({"architectures": [pace]})}
        table, recommended = choose(records, tried, served)
    write_whole(args.out / "report.md", table)
    write_whole(args.out / "recommended.yaml", recommended)
    print(table + "\n" + recommended, end="")
    return 0
