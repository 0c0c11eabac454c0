"""``pacellm eval sessions``: needles in text that has left the context, lengths x depths."""

import argparse
from typing import Any

from pacellm_vllm.evals.arguments import at_least, given, read_tokenizer
from pacellm_vllm.evals.grid_command import add_grid, started
from pacellm_vllm.evals.records import EvalError
from pacellm_vllm.evals.settings import Setting


def add_parser(kinds: Any) -> argparse.ArgumentParser:
    parser = kinds.add_parser(
        "sessions",
        help="needles in text that earlier requests of a session have brought",
        description="Feeds text of several lengths to a session, piece by "
        "piece, and asks for one needle of each depth: alone, behind the last of the text "
        "that the window holds, and in the session. Results go to OUT line by line; the same "
        "command continues an interrupted run.",
        allow_abbrev=False,
    )
    add_grid(parser)
    parser.add_argument(
        "--piece", type=at_least(1), default=1024, help="tokens of a request that feeds (1024)"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    from pacellm_vllm.evals.answers import Offline, offline_engine
    from pacellm_vllm.evals.sessions import ARMS, Asked, run_sessions, tokens_kept

    if args.needles != 1:
        raise EvalError("pacellm: --needles: sessions hide one needle at each depth; drop it.")
    empty = Asked(read_tokenizer(args), args.chat).prompt(())
    kept = tokens_kept(max(args.lengths), args.piece, len(empty))
    memory = {"layers": [], "session_tokens": 2 * kept, **given(args, "memory")}
    # What is no number is refused with the other settings.
    if isinstance(memory["session_tokens"], int) and memory["session_tokens"] < kept:
        raise EvalError(
            f"pacellm: session_tokens = {memory['session_tokens']} in --memory keeps no text of "
            f"{max(args.lengths)} tokens fed in pieces of {args.piece}; it must be at least {kept}."
        )
    setting = Setting("session", memory)
    with started(args, [setting], piece=args.piece) as (grid, tokenizer, records, described):
        engine = given(args, "engine")
        engine.setdefault("seed", args.seed)
        with offline_engine(args.model, memory, engine) as llm:
            answerer = Offline(llm)
            for arm in ARMS:
                records.describe(arm, answerer.describe())
            run_sessions(grid, tokenizer, answerer, records, args.piece, not args.quiet)
        from pacellm_vllm.evals.report import as_markdown, write_report

        report = write_report(args.out, grid, ARMS, records, described)
    print(as_markdown(report, ARMS[0]), end="")
    return 0
