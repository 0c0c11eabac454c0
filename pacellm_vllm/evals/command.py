"""``pacellm eval loss | niah | suite | sweep``: what memory changes, measured."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from pacellm_vllm.config import PaceConfigError
from pacellm_vllm.evals import loss_command, niah_command, suite_command, sweep_command
from pacellm_vllm.evals.records import EvalError


def add_parser(subparsers: Any) -> None:
    """Register ``eval``; each measurement's ``run(args, rest)`` returns the exit status."""
    parser = subparsers.add_parser(
        "eval",
        help="measure what memory changes",
        description="Measure a model with and without memory, on the same items.",
        allow_abbrev=False,
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="WHAT")
    for command in (loss_command, niah_command, suite_command, sweep_command):
        kind = command.add_parser(kinds)
        kind.set_defaults(run=_guarded(command.run))


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
