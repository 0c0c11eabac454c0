"""Which configurations an evaluation compares."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pacellm_vllm.config import PRESETS, PaceConfig
from pacellm_vllm.evals.records import EvalError
from pacellm_vllm.experts.settings import merge_experts

OFF = "off"
# The paper's and the published code's number of cortical experts.
EXPERTS = {"num_experts": 64}
CONFIG_NAMES = (OFF, *PRESETS, "ce", *(f"{preset}+ce" for preset in PRESETS))


@dataclass(frozen=True)
class Setting:
    """One configuration by name; ``memory`` goes into ``{"pacellm": ...}``, None is off."""

    name: str
    memory: Mapping[str, Any] | None


def parse_settings(text: str, shared: Mapping[str, Any]) -> list[Setting]:
    """Names such as ``off,official,ce``, or a JSON object of them to PaceConfig fields, null off.

    ``shared`` fields hold for every configuration with memory unless it says otherwise, and
    ``shared["experts"]`` for the names with ``ce``. Raises ``EvalError`` or ``PaceConfigError``.
    """
    if text.lstrip().startswith("{"):
        named = parse_object(text, "--configs")
    else:
        named = {}
        for name in text.split(","):
            if name not in CONFIG_NAMES:
                raise EvalError(
                    f"pacellm: --configs {name!r} is not known; it must be one of "
                    f"{', '.join(CONFIG_NAMES)}, or a JSON object such as "
                    '{"off": null, "mine": {"alpha": 0.1}}.'
                )
            if name in named:
                raise EvalError(f"pacellm: --configs names {name!r} twice; once is enough.")
            named[name] = _named(name, shared)
    settings = []
    for name, memory in named.items():
        if not name.strip() or "/" in name:
            raise EvalError(
                f"pacellm: a configuration of --configs cannot be named {name!r}, because files "
                "are named after it; give it a name without a slash."
            )
        if memory is None:
            settings.append(Setting(name, None))
            continue
        merged = {**shared, **memory}
        if memory.get("experts") is not None and not memory.get("layers"):
            # Experts without memory, which has no place for its settings.
            merged = dict(memory)
        PaceConfig.from_sources(merged)
        settings.append(Setting(name, merged))
    return settings


def _named(name: str, shared: Mapping[str, Any]) -> dict[str, Any] | None:
    preset, _, experts = name.partition("+")
    if name == OFF:
        return None
    with_experts = {"experts": merge_experts(EXPERTS, shared.get("experts") or {})}
    if name == "ce":
        # Whatever the checkpoint says of memory.
        return {"layers": [], **with_experts}
    if experts:
        return {"preset": preset, "layers": shared.get("layers", "auto"), **with_experts}
    # A preset by name is memory alone, whatever a clustered checkpoint says of itself.
    return {"preset": preset, "experts": None}


def parse_object(text: str, flag: str) -> dict[str, Any]:
    """A JSON object given on the command line; ``EvalError`` otherwise."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise EvalError(f"pacellm: {flag} {text!r} is not JSON: {error}.") from None
    if not isinstance(value, dict) or not value:
        raise EvalError(f"pacellm: {flag} {text!r} must be a JSON object with at least one name.")
    return value
