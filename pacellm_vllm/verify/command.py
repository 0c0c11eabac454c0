"""``pacellm verify MODEL``: engines against the plain truth, and a block for a bug report."""

import argparse
import json
import os
import platform
import random
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

from pacellm_vllm import __version__
from pacellm_vllm.config import CONFIG_KEY, PaceConfig, PaceConfigError
from pacellm_vllm.evals.records import EvalError
from pacellm_vllm.evals.settings import parse_object
from pacellm_vllm.flags import add_settings, settings_of

_PACKAGES = ("vllm", "torch", "transformers", "triton")
# Of prompts, in segments: one that has no bank to read, and some that end within one.
_LENGTHS = (0.6, 1.5, 2.3, 3.4)


def add_parser(commands: Any) -> None:
    """Register ``verify``; its ``run(args, rest)`` returns the exit status."""
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
    parser.add_argument(
        "--engine",
        default="",
        metavar="JSON",
        help='arguments of vllm.LLM, such as \'{"dtype": "bfloat16"}\'',
    )
    parser.add_argument("--seed", type=int, default=0, help="of the text that is read (0)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="for the results")
    add_settings(parser)
    parser.set_defaults(run=main_verify)


def main_verify(args: argparse.Namespace, rest: Sequence[str] | None = None) -> int:
    """Run ``pacellm verify``; returns 0, 1 for a fault, or 2 for what was asked wrongly."""
    if rest:
        print(f"pacellm: unknown argument {rest[0]!r} of pacellm verify.", file=sys.stderr)
        return 2
    try:
        return _verify(args)
    except (EvalError, PaceConfigError) as error:
        print(error, file=sys.stderr)
        return 2


def _verify(args: argparse.Namespace) -> int:
    # Recordings are made in this process.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if args.device == "cpu":
        os.environ["PACELLM_CPU_PLATFORM"] = "1"
    engine = parse_object(args.engine, "--engine") if args.engine else {}
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

    done = Verification(args.model, settings_of(args), engine, prompts, tell)
    done.run()
    print(f"\n{done.overhead_table()}\n")
    failed = [check for check in done.checks if check.failed]
    print(_bug_report(args.model, done))
    if args.json:
        args.json.write_text(
            json.dumps(
                {
                    "checks": [vars(check) for check in done.checks],
                    "overhead": done.overhead,
                    "about": done.about,
                },
                indent=1,
            )
            + "\n"
        )
    if failed:
        print(f"\npacellm: {len(failed)} of {len(done.checks)} checks found a fault.")
        return 1
    missed = [check.name for check in done.checks if check.verdict == "not reached"]
    print(f"\npacellm: no fault found{'; not reached: ' + ', '.join(missed) if missed else ''}.")
    return 0


def _prompts(args: argparse.Namespace) -> list[list[int]]:
    """Token ids of plain English, of some segments each."""
    from transformers import AutoTokenizer
    from vllm.transformers_utils.config import get_config

    from pacellm_vllm.evals.text import sentences

    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        hf_config = get_config(args.model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise EvalError(
            f"pacellm: the tokenizer or configuration of {args.model!r} cannot be read ({reason}); "
            "MODEL must be a checkpoint directory or a hub name."
        ) from None
    config = PaceConfig.from_sources(getattr(hf_config, CONFIG_KEY, None), settings_of(args))
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
            lines.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            lines.append(f"{name}: none")
    from vllm.platforms import current_platform

    lines.append(f"device: {current_platform.get_device_name()}")
    lines.append(f"model: {Path(model).name}")
    lines.append(json.dumps(done.about))
    lines += [f"{check.verdict}: {check.name}: {check.detail}" for check in done.checks]
    return "For a bug report:\n\n```text\n" + "\n".join(lines) + "\n```"
