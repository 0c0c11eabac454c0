"""The memory's settings as command-line flags."""

import argparse
from typing import Any

from pacellm_vllm.config import PaceConfig
from pacellm_vllm.experts.settings import parse_experts


def add_settings(parser: argparse.ArgumentParser) -> None:
    """One flag for each field of ``PaceConfig``; values are checked by it, not here."""
    for name, field in PaceConfig.model_fields.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            type=_PARSERS.get(name, _number_or_text),
            help=field.description,
        )


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The fields that were given."""
    fields = {name: getattr(args, name) for name in PaceConfig.model_fields}
    return {name: value for name, value in fields.items() if value is not None}


def _layers(text: str) -> Any:
    if text in ("auto", ""):
        return text or []
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError('a list such as 12,26, "auto", or "" for none') from None


def _experts(text: str) -> Any:
    given = parse_experts(text)
    if given is None:
        # As a flag that is not given, it would leave those of the checkpoint on.
        raise argparse.ArgumentTypeError(
            "a number of experts, an object or a directory; what turns a checkpoint's off is "
            '--additional-config \'{"pacellm": {"experts": null}}\''
        )
    return given


def _number_or_text(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _true_or_false(text: str) -> Any:
    return {"true": True, "false": False}.get(text.lower(), text)


_PARSERS = {"layers": _layers, "experts": _experts, "clip": _true_or_false}
