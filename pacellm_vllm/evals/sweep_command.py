"""``pacellm eval sweep``: which settings help, by needles over many configurations."""

import argparse
import json
from typing import Any

from pacellm_vllm.evals.arguments import given, trusted
from pacellm_vllm.evals.grid_command import add_grid, measure, started
from pacellm_vllm.evals.records import EvalError, write_whole
from pacellm_vllm.evals.settings import OFF, Setting, parse_object


def add_parser(kinds: Any) -> argparse.ArgumentParser:
    parser = kinds.add_parser(
        "sweep",
        help="which settings help: needles over many configurations",
        description="Tries settings one at a time (or their product) on one needle grid, chooses "
        "on one half of the items, confirms on the other, and writes a configuration file.",
        allow_abbrev=False,
    )
    add_grid(parser)
    parser.add_argument(
        "--try",
        dest="tried",
        required=True,
        metavar="JSON",
        help='values by setting, such as \'{"layers": [[12], [26]], "alpha": [0.1, 0.2]}\'',
    )
    parser.add_argument(
        "--product", action="store_true", help="all combinations, not one at a time"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    from pacellm_vllm.evals.answers import architectures
    from pacellm_vllm.evals.sweep import choose, combinations

    if args.samples < 2:
        raise EvalError(
            f"pacellm: --samples {args.samples} leaves nothing to confirm a choice with; it must "
            "be at least 2."
        )
    _, pace = architectures(args.model, trusted(args))
    tried = combinations(parse_object(args.tried, "--try"), given(args, "memory"), args.product)
    settings = [Setting(OFF, None), *tried]
    with started(args, settings) as (grid, tokenizer, records, _):
        measure(args, grid, tokenizer, records, settings, {})
        served = {"model": args.model, "hf-overrides": json.dumps({"architectures": [pace]})}
        table, recommended = choose(records, tried, served)
    write_whole(args.out / "report.md", table)
    write_whole(args.out / "recommended.yaml", recommended)
    print(table + "\n" + recommended, end="")
    return 0
