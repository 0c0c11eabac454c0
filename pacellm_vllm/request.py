"""RequestSettings: what one request may set for itself, and how it asks for it."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pacellm_vllm.config import CONFIG_KEY, PaceConfigError
from pacellm_vllm.ops.rules import MemoryRules
from pacellm_vllm.sentences import first_mistake, not_allowed

_ALLOWED = {
    "enabled": "true or false",
    "alpha": "a number from 0 to 1",
    "noise": "a number from 0 to 1",
    "theta_high": "a number from -1 to 1, not below theta_low",
    "theta_low": "a number from -1 to 1, not above theta_high",
}

_WHERE = " in a request"


class RequestSettings(BaseModel):
    """Overrides of one request; what is None is the engine's.

    A request gives them in ``SamplingParams.extra_args``, over HTTP in ``vllm_xargs``, as flat
    keys (``{"pacellm_alpha": 0.5}``) or together (``{"pacellm": {"alpha": 0.5}}``, which
    ``vllm_xargs`` takes as a JSON string). They change activations only: the shape of the bank
    is the engine's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    enabled: bool = Field(True, description="false: no memory, and no pages claimed for any")
    alpha: float | None = Field(None, ge=0, le=1, description="as in PaceConfig")
    noise: float | None = Field(None, ge=0, le=1, description="as in PaceConfig")
    theta_high: float | None = Field(None, ge=-1, le=1, description="as in PaceConfig")
    theta_low: float | None = Field(None, ge=-1, le=1, description="as in PaceConfig")

    @classmethod
    def of(cls, extra_args: Mapping[str, Any] | None) -> "RequestSettings":
        """The settings among a request's ``extra_args``.

        Raises ``PaceConfigError`` with one sentence about the first thing that is wrong.
        """
        given = _given(extra_args or {})
        unknown = [name for name in given if name not in cls.model_fields]
        if unknown:
            raise PaceConfigError(
                f"pacellm: a request cannot set {unknown[0]!r}; it can set "
                f"{', '.join(cls.model_fields)}."
            )
        try:
            settings = cls.model_validate(given)
        except ValidationError as error:
            raise PaceConfigError(first_mistake(error, given, _ALLOWED, where=_WHERE)) from None
        high, low = settings.theta_high, settings.theta_low
        if (high is None) != (low is None):
            raise PaceConfigError(
                "pacellm: a request that sets one of theta_high and theta_low must set both."
            )
        if high is not None and low is not None and low > high:
            raise PaceConfigError(
                not_allowed("theta_low", low, f"at most theta_high = {high}", _WHERE)
            )
        return settings

    def overrides(self) -> dict[str, Any]:
        """The rules this request changes."""
        return self.model_dump(exclude_none=True, exclude={"enabled"})

    def key(self) -> str:
        """The same for equal settings only; empty for a request that sets nothing."""
        given = self.overrides() if self.enabled else {"enabled": False}
        return json.dumps(given, sort_keys=True) if given else ""

    def applied_to(self, rules: MemoryRules) -> MemoryRules:
        """The engine's ``rules`` as this request wants them."""
        if not self.enabled:
            # A session's bank goes on recording, for a later turn that may want it.
            return replace(rules, alpha=0.0)
        return replace(rules, **self.overrides())


def _given(extra_args: Mapping[str, Any]) -> dict[str, Any]:
    """Our keys among ``extra_args``, without their prefix."""
    whole = extra_args.get(CONFIG_KEY, {})
    if isinstance(whole, str):
        with suppress(json.JSONDecodeError):
            whole = json.loads(whole)
    if not isinstance(whole, Mapping):
        raise PaceConfigError(
            f"pacellm: the request's {CONFIG_KEY!r} = {whole!r} is not allowed; it must be an "
            "object such as {'alpha': 0.5}."
        )
    given = dict(whole)
    for key, value in extra_args.items():
        name = key.removeprefix(f"{CONFIG_KEY}_")
        if name == key:
            continue
        if name in given:
            raise PaceConfigError(f"pacellm: the request sets {name!r} twice; drop one.")
        given[name] = value
    return given
