"""The ``pacellm`` command."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from pacellm_vllm import __version__
from pacellm_vllm.evals.command import add_parser as add_eval
from pacellm_vllm.evals.inspect import add_parser as add_inspect_memory
from pacellm_vllm.experts.command import add_parser as add_cluster
from pacellm_vllm.experts.inspect import add_parser as add_inspect_experts
from pacellm_vllm.flags import add_settings, given_settings
from pacellm_vllm.sentences import PaceError
from pacellm_vllm.verify.command import add_parser as add_verify


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status, 2 for what was asked wrongly."""
    parser = argparse.ArgumentParser(
        prog="pacellm",
        description="Serve decoder LLMs with an activation memory on vLLM.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"pacellm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_serve(commands)
    add_cluster(commands)
    add_eval(commands)
    _add_inspect(commands)
    add_verify(commands)
    words = list(sys.argv[1:] if argv is None else argv)
    # After a flag of vLLM's, which is unknown here, its value would be taken for the model.
    if words[:1] == ["serve"] and words[1:2] not in (["-h"], ["--help"]):
        first = next(iter(words[1:]), "-")
        if first.startswith("-"):
            parser.exit(2, "pacellm: MODEL comes first after `pacellm serve`, before any flag.\n")
    args, rest = parser.parse_known_args(words)
    try:
        if args.command == "serve":
            return _serve(args, rest)
        if rest:
            raise PaceError(f"pacellm: unknown argument {rest[0]!r} of pacellm {args.command}.")
        return args.run(args) or 0
    except PaceError as error:
        print(error, file=sys.stderr)
        return 2


def _add_serve(commands: Any) -> None:
    serve = commands.add_parser(
        "serve",
        help="vllm serve, with memory",
        usage="pacellm serve MODEL [--layers 12,26] [memory flags] [any vllm serve flag]",
        description="Runs `vllm serve` with memory on, after printing the command it runs. "
        "Every flag not listed here goes to vllm serve.",
        allow_abbrev=False,
    )
    serve.add_argument("model", metavar="MODEL", help="checkpoint directory or hub name")
    add_settings(serve)


def _add_inspect(commands: Any) -> None:
    inspect = commands.add_parser("inspect", help="look into a model", allow_abbrev=False)
    things = inspect.add_subparsers(dest="thing", required=True, metavar="WHAT")
    add_inspect_experts(things)
    add_inspect_memory(things)


def _serve(args: argparse.Namespace, rest: list[str]) -> int:
    # vLLM takes seconds to import: not for --help or a typo.
    from pacellm_vllm.platform import check_platform
    from pacellm_vllm.serving.command import (
        all_plugins,
        as_typed,
        check_plugins,
        run_vllm,
        serve_arguments,
    )

    arguments = serve_arguments(args.model, given_settings(args), rest)
    check_platform()
    named = os.environ.get("VLLM_PLUGINS")
    if named is not None:
        check_plugins(named)
    plugins = all_plugins() if named is None else None
    print(as_typed(arguments, plugins), flush=True)
    if plugins:
        os.environ["VLLM_PLUGINS"] = plugins
    run_vllm(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
