"""Flags that several measurements share, and what their values may be."""

import argparse
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pacellm_vllm.config import PaceConfig
from pacellm_vllm.evals.records import EvalError
from pacellm_vllm.evals.settings import CONFIG_NAMES, parse_object
from pacellm_vllm.flags import given_settings
from pacellm_vllm.sentences import PaceError, first_line


def add_model(parser: argparse.ArgumentParser, batch: int) -> None:
    """MODEL, where results go, and how an engine in this process is made."""
    parser.add_argument("model", metavar="MODEL", help="checkpoint directory or hub name")
    parser.add_argument("--out", type=Path, required=True, help="directory for the results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--batch", type=at_least(1), default=batch, help="items at once (%(default)s)"
    )
    parser.add_argument(
        "--memory", default="", metavar="JSON", help="settings that all configurations share"
    )
    add_engine(parser, '{"dtype": "float32", "max_model_len": 8192}')
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def add_engine(parser: argparse.ArgumentParser, example: str) -> None:
    """How an engine in this process is made; read it with :func:`given`."""
    parser.add_argument(
        "--engine", default="", metavar="JSON", help=f"arguments of vllm.LLM, such as '{example}'"
    )


Run = Callable[[argparse.Namespace], int | None]


def guarded(run: Run) -> Run:
    """``run``, but 3, and where it came from, for errors that nobody foresaw."""

    def run_guarded(args: argparse.Namespace) -> int | None:
        try:
            return run(args)
        except PaceError:
            raise
        except Exception:
            traceback.print_exc()
            return 3

    return run_guarded


def add_config_names(parser: argparse.ArgumentParser) -> None:
    """Which configurations are compared."""
    parser.add_argument(
        "--configs",
        default="off,gentle",
        help=f"{', '.join(CONFIG_NAMES)}, or JSON of names to settings; all are compared to the "
        "first (%(default)s)",
    )


def add_configs(parser: argparse.ArgumentParser) -> None:
    """Which configurations, and the servers that run them if any do."""
    add_config_names(parser)
    parser.add_argument(
        "--base-url",
        action="append",
        metavar="[NAME=]URL",
        help="ask a running server (http://host:port/v1) instead of an engine in this process; "
        "NAME= for several servers, one per configuration",
    )
    parser.add_argument("--served-model-name", help="the server's name for the model (MODEL)")
    parser.add_argument("--api-key", default="none", help="of the server")


def list_of(kind: type, low: float, high: float = float("inf")) -> Callable[[str], tuple]:
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


def at_least(low: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"an integer of at least {low}")
        return int(text)

    return parse


def given(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """The JSON object of flag ``--name``, empty without one."""
    text = getattr(args, name)
    return parse_object(text, f"--{name}") if text else {}


def token_room(model: str, engine: Mapping[str, Any]) -> int | None:
    """How many tokens an engine of ``model`` has room for, if that is said anywhere."""
    from pacellm_vllm.compat import checkpoint_config

    if "max_model_len" in engine:
        # vLLM takes others than numbers, too, such as "32k".
        length = engine["max_model_len"]
        return length if isinstance(length, int) and length > 0 else None
    name = "max_position_embeddings"
    overrides = engine.get("hf_overrides") or {}
    config = checkpoint_config(model, bool(engine.get("trust_remote_code", False)))
    found = overrides.get(name, getattr(config.get_text_config(), name, None))
    return None if found is None else int(found)


def require_room(model: str, engine: Mapping[str, Any], tokens: int, what: str) -> None:
    """``EvalError`` where ``what``, of so many ``tokens`` with its answer, is too long."""
    room = token_room(model, engine)
    if room is not None and tokens > room:
        raise EvalError(
            f"pacellm: {what} needs {tokens} tokens with its answer, and this engine has room for "
            f"{room}; ask for less, or raise max_model_len in --engine if the model goes that far."
        )


def given_text(path: Path) -> str:
    """What the file of a ``--text`` says; ``EvalError`` where it cannot be read."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise EvalError(f"pacellm: --text {str(path)!r} cannot be read: {error}.") from None


def servers_of(urls: Sequence[str] | None, names: Sequence[str]) -> dict[str, str]:
    """The URL of each configuration's server; empty without ``--base-url``."""
    if not urls:
        return {}
    servers = {}
    for text in urls:
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


def trusted(args: argparse.Namespace) -> bool:
    """Whether the checkpoint's own code may run, as ``--engine`` says."""
    return bool(given(args, "engine").get("trust_remote_code", False))


def read_tokenizer(args: argparse.Namespace) -> Any:
    """The tokenizer of ``args.model``; ``EvalError`` where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(args.model, trust_remote_code=trusted(args))
    except (OSError, ValueError) as error:
        raise EvalError(
            f"pacellm: the tokenizer of {args.model!r} cannot be read ({first_line(error)}); MODEL "
            "must be a checkpoint directory or a hub name."
        ) from None


def read_model(args: argparse.Namespace) -> tuple[Any, PaceConfig]:
    """The tokenizer of ``args.model``, and the settings that an engine of it will come to.

    ``EvalError`` where either cannot be read.
    """
    from pacellm_vllm.compat import checkpoint_config
    from pacellm_vllm.models.settings import config_with

    tokenizer = read_tokenizer(args)
    try:
        hf_config = checkpoint_config(args.model, trusted(args))
    except (OSError, ValueError) as error:
        raise EvalError(
            f"pacellm: the configuration of {args.model!r} cannot be read ({first_line(error)}); "
            "MODEL must be a checkpoint directory or a hub name."
        ) from None
    return tokenizer, config_with(hf_config, args.model, given_settings(args))
