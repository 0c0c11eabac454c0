"""``pacellm eval loss | niah | sessions | suite | sweep``: what memory changes, measured."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from pacellm_vllm.evals import (
    loss_command,
    niah_command,
    sessions_command,
    suite_command,
    sweep_command,
)
from pacellm_vllm.evals.arguments import guarded


def add_parser(subparsers: Any) -> None:
    """Register ``eval``; each measurement's ``run(args)`` returns the exit status."""
    parser = subparsers.add_parser(
        "eval",
        help="measure what memory changes",
        description="Measure a model with and without memory, on the same items.",
        allow_abbrev=False,
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="WHAT")
    for command in (loss_command, niah_command, sessions_command, suite_command, sweep_command):
        kind = command.add_parser(kinds)
        kind.set_defaults(run=guarded(_resumable(command.run)))


def _resumable(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    def resumable(args: argparse.Namespace) -> int:
        try:
            return run(args)
        except KeyboardInterrupt:
            print("pacellm: interrupted; the same command continues.", file=sys.stderr)
            return 130

    return resumable
