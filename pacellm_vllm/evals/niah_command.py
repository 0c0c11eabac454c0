"""``pacellm eval niah``: needles in a haystack, context lengths x depths."""

import argparse
from typing import Any

from pacellm_vllm.evals.arguments import add_configs, given, servers_of
from pacellm_vllm.evals.grid_command import add_grid, measure, started
from pacellm_vllm.evals.settings import parse_settings


def add_parser(kinds: Any) -> argparse.ArgumentParser:
    parser = kinds.add_parser(
        "niah",
        help="needles in a haystack: context lengths x depths",
        description="Hides needles in text of several lengths and depths and asks for one. "
        "Results go to OUT line by line; the same command continues an interrupted run.",
        allow_abbrev=False,
    )
    add_grid(parser)
    add_configs(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    settings = parse_settings(args.configs, given(args, "memory"))
    names = [setting.name for setting in settings]
    servers = servers_of(args.base_url, names)
    with started(args, settings) as (grid, tokenizer, records, described):
        measure(args, grid, tokenizer, records, settings, servers)
        from pacellm_vllm.evals.report import as_markdown, write_report

        report = write_report(args.out, grid, names, records, described)
    print(as_markdown(report, names[0]), end="")
    return 0
