"""The ``vllm serve`` command that ``pacellm serve`` runs."""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import yaml

from pacellm_vllm.compat import checkpoint_config
from pacellm_vllm.config import CONFIG_KEY, PaceConfig, PaceConfigError
from pacellm_vllm.models.settings import config_with
from pacellm_vllm.models.table import WHY_NOT, pace_architecture
from pacellm_vllm.sentences import first_line

_MERGED = ("--hf-overrides", "--additional-config")
_PLUGIN_GROUPS = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.io_processor_plugins",
    "vllm.stat_logger_plugins",
)


def serve_arguments(model: str, settings: dict[str, Any], rest: Sequence[str]) -> list[str]:
    """Arguments of ``vllm`` that serve ``model`` with memory.

    ``settings`` are PaceConfig fields, ``rest`` flags for vLLM, whose own ``--hf-overrides`` and
    ``--additional-config`` are merged with ours. Raises ``PaceConfigError`` when the model is
    none that carries memory, or a setting is wrong or given twice.
    """
    given, rest = _take_json(rest)
    _check_file(rest)
    overrides, additional = (given[name] for name in _MERGED)
    hf_config = _read_checkpoint(model, rest)
    named = overrides.get("architectures") or hf_config.architectures or ["(none)"]
    architecture = pace_architecture(named[0])
    if architecture is None:
        reason = WHY_NOT.get(named[0], "vLLM does not generate text with it")
        raise PaceConfigError(
            f"pacellm: {model} is a {named[0]}, which carries no memory: {reason}; serve it with "
            "vllm serve."
        )
    ours = additional.get(CONFIG_KEY) or {}
    if not isinstance(ours, dict):
        PaceConfig.from_sources(ours)  # raises: it says what an object of ours looks like
    for name in settings.keys() & ours.keys():
        raise PaceConfigError(
            f"pacellm: {name} is given both as a flag and in --additional-config; drop one."
        )
    ours = {**ours, **settings}
    layers = getattr(hf_config.get_text_config(), "num_hidden_layers", None)
    config = config_with(hf_config, model, ours)
    if layers is not None:
        config.resolve_layers(layers)
    overrides = {**overrides, "architectures": [architecture]}
    additional = {**additional, CONFIG_KEY: ours}
    merged = [f"--hf-overrides={json.dumps(overrides)}"]
    merged.append(f"--additional-config={json.dumps(additional)}")
    return ["serve", model, *merged, *rest]


def all_plugins() -> str:
    """A value for VLLM_PLUGINS that leaves everything installed on and adds our HTTP routes.

    vLLM loads HTTP plugins only when they are named there, and what is named there is then all
    that is loaded, of every kind.
    """
    names = {plugin.name for group in _PLUGIN_GROUPS for plugin in entry_points(group=group)}
    return ",".join(sorted(names | {"pacellm_http"}))


def check_plugins(named: str) -> None:
    """``PaceConfigError`` where a value of VLLM_PLUGINS leaves this package out."""
    if "pacellm" not in named.split(","):
        raise PaceConfigError(
            f"pacellm: VLLM_PLUGINS = {named!r} keeps vLLM from loading this package; unset it, or "
            f"make it {all_plugins()}."
        )


def run_vllm(arguments: Sequence[str]) -> None:
    """Run vLLM's command in this process, which has imported most of it already."""
    from vllm.entrypoints.cli.main import main

    sys.argv = ["vllm", *arguments]
    main()


def as_typed(arguments: Sequence[str], plugins: str | None) -> str:
    """The command as one would type it."""
    env = f"VLLM_PLUGINS={shlex.quote(plugins)} " if plugins else ""
    return env + shlex.join(["vllm", *arguments])


def _read_checkpoint(model: str, rest: Sequence[str]) -> Any:
    """The checkpoint's configuration, read as vLLM will read it."""
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    flags.add_argument("--revision")
    flags.add_argument("--trust-remote-code", "--trust_remote_code", action="store_true")
    try:
        known, _ = flags.parse_known_args(list(rest))
        return checkpoint_config(model, known.trust_remote_code, known.revision)
    except (OSError, ValueError, argparse.ArgumentError) as error:
        reason = first_line(error).rstrip(".:")
        raise PaceConfigError(
            f"pacellm: the configuration of {model!r} cannot be read ({reason}); MODEL must be a "
            "checkpoint directory or a hub name."
        ) from None


def _take_json(rest: Sequence[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Split the two JSON flags off: their values by flag, and what remains."""
    given: dict[str, dict[str, Any]] = {name: {} for name in _MERGED}
    kept = []
    words = iter(rest)
    for word in words:
        flag, equals, value = word.partition("=")
        name = flag.replace("_", "-").partition(".")[0]
        if name not in _MERGED:
            kept.append(word)
            continue
        if not equals:
            value = next(words, "")
        try:
            parsed = json.loads(value) if flag.replace("_", "-") == name else None
        except json.JSONDecodeError:
            parsed = None
        if not isinstance(parsed, dict):
            raise PaceConfigError(
                f"pacellm: {flag} {value!r} cannot be merged with the memory's; give {name} as one "
                "JSON object."
            )
        given[name].update(parsed)
    return given, kept


def _check_file(rest: Sequence[str]) -> None:
    """Refuse a ``--config`` file whose values ours on the command line would silently replace."""
    words = list(rest)
    for i, word in enumerate(words):
        flag, _, value = word.partition("=")
        if flag != "--config":
            continue
        path = Path(value or (words[i + 1] if i + 1 < len(words) else ""))
        if not path.is_file():
            raise PaceConfigError(f"pacellm: --config {str(path)!r} is not a file.")
        try:
            found = yaml.safe_load(path.read_text()) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            found = None
        if not isinstance(found, dict):
            raise PaceConfigError(
                f"pacellm: --config {str(path)!r} is not YAML with a flag on each line, such as "
                "port: 8000."
            )
        # vLLM lets additional-config.pacellm.alpha replace all that the flag says.
        names = {str(name).replace("_", "-").partition(".")[0] for name in found}
        for name in _MERGED:
            if name.removeprefix("--") in names:
                raise PaceConfigError(
                    f"pacellm: {path} sets {name.removeprefix('--')}, which the memory's flags "
                    f"would replace; run vllm serve --config {path} instead, or move it out."
                )
