"""``pacellm verify MODEL``: engines against the plain truth, and a block for a bug report."""

import argparse
import json
import os
import platform
import random
from importlib.metadata import PackageNotFoundError
from itertools import islice
from pathlib import Path
from typing import Any

from pacellm_vllm import __version__
from pacellm_vllm.evals.arguments import add_engine, given, guarded, read_model, token_room
from pacellm_vllm.evals.records import EvalError, version_of, write_whole
from pacellm_vllm.flags import add_settings, given_settings
from pacellm_vllm.platform import SWITCH

_PACKAGES = ("vllm", "torch", "transformers", "triton")
# Of prompts, in segments: one that has no bank to read, and some that end within one.
_LENGTHS = (0.6, 1.5, 2.3, 3.4)


def add_parser(commands: Any) -> None:
    """Register ``verify``; its ``run(args)`` returns the exit status."""
    parser = commands.add_parser(
        "verify",
        help="whether this installation computes what it should, on your model",
        description="Runs MODEL with memory in one engine after another: alone, in chunks and "
        "batches, preempted, from the prefix cache, with graphs. All must say the same, and the "
        "memory's own arithmetic must be what float64 gives. Ends in a block for a bug report; "
        "the exit status is 1 if something is wrong.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint directory or hub name")
    parser.add_argument(
        "--device",
        choices=["auto", "cpu"],
        default="auto",
        help="cpu: the package's PyTorch CPU platform",
    )
    add_engine(parser, '{"dtype": "bfloat16"}')
    parser.add_argument("--seed", type=int, default=0, help="of the text that is read (0)")
    parser.add_argument(
        "--long",
        metavar="TOKENS",
        type=lambda text: [int(n) for n in text.split(",")],
        default=[],
        help="also answer one request of each of these lengths, such as 131072,200000",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="for the results")
    add_settings(parser)
    parser.set_defaults(run=guarded(_verify))


def _verify(args: argparse.Namespace) -> int:
    """Returns 1 for a fault, else 0."""
    # Recordings are made in this process.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if args.device == "cpu":
        os.environ[SWITCH] = "1"
    engine = given(args, "engine")
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        if engine.get(name, 1) != 1:
            raise EvalError(
                f"pacellm: verify runs in one process and cannot have {name}; drop it, or compare "
                "engines yourself."
            )
    from pacellm_vllm.verify.engines import Check, Verification

    prompts = _prompts(args)

    def tell(check: Check) -> None:
        print(f"{check.verdict:<18} {check.name}: {check.detail}", flush=True)

    done = Verification(args.model, given_settings(args), engine, prompts, tell, args.long)
    done.run()
    print(f"\n{done.overhead_table()}\n")
    failed = [check for check in done.checks if check.failed]
    print(_bug_report(args.model, done))
    if args.json:
        found = {
            "checks": [vars(check) for check in done.checks],
            "overhead": done.overhead,
            "about": done.about,
        }
        write_whole(args.json, json.dumps(found, indent=1) + "\n")
    if failed:
        print(f"\npacellm: {len(failed)} of {len(done.checks)} checks found a fault.")
        return 1
    missed = [check.name for check in done.checks if check.verdict == "not reached"]
    print(f"\npacellm: no fault found{'; not reached: ' + ', '.join(missed) if missed else ''}.")
    return 0


def _prompts(args: argparse.Namespace) -> list[list[int]]:
    """Token ids of plain English, of some segments each.

    ``EvalError`` where there is no memory to verify, or no room for such texts.
    """
    from pacellm_vllm.evals.text import sentences
    from pacellm_vllm.verify.engines import ANSWER

    tokenizer, config = read_model(args)
    if not config.layers:
        raise EvalError(
            "pacellm: no layer of this model has memory, so there is nothing to verify; give "
            "--layers auto."
        )
    room = token_room(args.model, given(args, "engine"))
    longest = int(max(_LENGTHS) * config.segment_size)
    if room is not None and longest + ANSWER + 1 > room:
        fits = int((room - ANSWER - 1) / max(_LENGTHS))
        raise EvalError(
            f"pacellm: texts of several segments of {config.segment_size} tokens are longer than "
            f"the {room} tokens that this engine has room for; give --segment-size {fits} or less."
        )
    prompts: list[list[int]] = []
    for i, length in enumerate(_LENGTHS):
        wanted = int(length * config.segment_size)
        rng = random.Random(args.seed * 100 + i)
        text = " ".join(islice(sentences(rng), wanted))
        prompts.append(tokenizer(text).input_ids[:wanted])
    return prompts


def _bug_report(model: str, done: Any) -> str:
    lines = [f"pacellm {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    for name in _PACKAGES:
        try:
            lines.append(f"{name} {version_of(name)}")
        except PackageNotFoundError:
            lines.append(f"{name}: none")
    from vllm.platforms import current_platform

    lines.append(f"device: {current_platform.get_device_name()}")
    lines.append(f"model: {Path(model).name}")
    lines.append(json.dumps(done.about))
    lines += [f"{check.verdict}: {check.name}: {check.detail}" for check in done.checks]
    return "For a bug report:\n\n```text\n" + "\n".join(lines) + "\n```"
