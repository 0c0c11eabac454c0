"""Which configurations an evaluation compares."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pacellm_vllm.config import PaceConfig
from pacellm_vllm.evals.records import EvalError

OFF = "off"
PRESET_NAMES = ("official", "paper")


@dataclass(frozen=True)
class Setting:
    """One configuration by name; ``memory`` goes into ``{"pacellm": ...}``, None is off."""

    name: str
    memory: Mapping[str, Any] | None


def parse_settings(text: str, shared: Mapping[str, Any]) -> list[Setting]:
    """``off,official,paper`` or a JSON object of names to PaceConfig fields (null for off).

    ``shared`` fields hold for every configuration with memory unless it says otherwise. Raises
    ``EvalError`` or ``PaceConfigError``.
    """
    if text.lstrip().startswith("{"):
        named = parse_object(text, "--configs")
    else:
        named = {}
        for name in text.split(","):
            if name not in (OFF, *PRESET_NAMES):
                raise EvalError(
                    f"pacellm: --configs {name!r} is not known; it must be off, official, paper, "
                    'or a JSON object such as {"off": null, "mine": {"alpha": 0.1}}.'
                )
            if name in named:
                raise EvalError(f"pacellm: --configs names {name!r} twice; once is enough.")
            named[name] = None if name == OFF else {"preset": name}
    settings = []
    for name, memory in named.items():
        if memory is None:
            settings.append(Setting(name, None))
            continue
        PaceConfig.from_sources(shared, memory)
        settings.append(Setting(name, {**shared, **memory}))
    return settings


def parse_object(text: str, flag: str) -> dict[str, Any]:
    """A JSON object given on the command line; ``EvalError`` otherwise."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise EvalError(f"pacellm: {flag} {text!r} is not JSON: {error}.") from None
    if not isinstance(value, dict) or not value:
        raise EvalError(f"pacellm: {flag} {text!r} must be a JSON object with at least one name.")
    return value
