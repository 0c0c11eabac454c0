"""Trying settings on needles, and which of them to recommend."""

import itertools
import json
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import yaml

from pacellm_vllm.config import CONFIG_KEY, PaceConfig
from pacellm_vllm.evals.records import EvalError, Records
from pacellm_vllm.evals.report import compare, scores_of
from pacellm_vllm.evals.settings import OFF, Setting

# Items of even samples choose, those of odd ones confirm: the best of many is best by luck too.
_CHOOSE, _CONFIRM = 0, 1


def combinations(
    tried: Mapping[str, Any], shared: Mapping[str, Any], product: bool
) -> list[Setting]:
    """The shared settings, and each tried value in their place alone, or all combinations.

    Raises ``EvalError`` or ``PaceConfigError``.
    """
    for name, values in tried.items():
        if not isinstance(values, list) or not values:
            raise EvalError(
                f"pacellm: --try {name} = {values!r} must be a list of values, such as [0.1, 0.2]."
            )
    changes: list[dict[str, Any]]
    if product:
        changes = [
            dict(zip(tried, values, strict=True)) for values in itertools.product(*tried.values())
        ]
    else:
        changes = [{}, *({name: value} for name, values in tried.items() for value in values)]
    settings: dict[str, Setting] = {}
    for change in changes:
        memory = {**shared, **change}
        PaceConfig.from_sources(memory)
        name = " ".join(f"{field}={json.dumps(value)}" for field, value in change.items())
        settings.setdefault(json.dumps(memory, sort_keys=True), Setting(name or "base", memory))
    return list(settings.values())


def choose(
    records: Records, tried: Sequence[Setting], served: Mapping[str, Any]
) -> tuple[str, str]:
    """A Markdown table of all settings, and a file for ``vllm serve --config``, ``served`` in it.

    The setting that does best on the even samples is recommended; its interval on the odd ones
    says whether it beats off, and the file carries a warning when it does not.
    """
    rows = [
        "| setting | exact | - off, choosing half | - off, confirming half |",
        "|---|---|---|---|",
        f"| off | {fmean(scores_of(records, OFF, 'exact')):.3f} | | |",
    ]
    best, best_mean, confirmed = tried[0], float("-inf"), None
    for setting in tried:
        first = compare(records, OFF, setting.name, parity=_CHOOSE)
        second = compare(records, OFF, setting.name, parity=_CONFIRM)
        mean = fmean(scores_of(records, setting.name, "exact"))
        rows.append(f"| {setting.name} | {mean:.3f} | {first} | {second} |")
        if first.mean > best_mean:
            best, best_mean, confirmed = setting, first.mean, second
    assert confirmed is not None
    additional = json.dumps({CONFIG_KEY: best.memory})
    text = yaml.safe_dump({**served, "additional-config": additional}, sort_keys=False, width=1000)
    note = f"# Best on the choosing half: {best.name}; off plus {confirmed} on the other half.\n"
    if not confirmed.better:
        note += (
            "# WARNING: no setting beats off here with confidence; serve this model without "
            "memory.\n"
        )
    return "\n".join(rows) + "\n", note + text
