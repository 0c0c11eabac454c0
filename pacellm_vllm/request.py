"""RequestSettings: what one request may set for itself, and how it asks for it."""

import json
import secrets
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from pacellm_vllm.config import CONFIG_KEY, PaceConfigError
from pacellm_vllm.ops.rules import MemoryRules
from pacellm_vllm.sentences import first_mistake, not_allowed, of_request, shown

_ALLOWED = {
    "enabled": "true or false",
    "alpha": "a number from 0 to 1",
    "noise": "a number from 0 to 1",
    "theta_high": "a number from -1 to 1, not below theta_low",
    "theta_low": "a number from -1 to 1, not above theta_high",
    "report": "true or false",
    "session": "a name of 1 to 256 characters",
    "session_read": '"auto", "always" or "never"',
    "session_write": "true or false",
}

_WHERE = " in a request"
_JOURNAL_KEY = "journal_of_pacellm"
_READING_KEY = "reading_of_pacellm"
_SWITCHES = {"true": True, "1": True, "false": False, "0": False}


def _read_switch(given: Any) -> bool:
    """A boolean, which plain ``vllm_xargs`` make 0 or 1, or its text."""
    if isinstance(given, (bool, int, str)) and str(given).lower() in _SWITCHES:
        return _SWITCHES[str(given).lower()]
    raise ValueError


def _read_number(given: Any) -> float:
    """A number or its text, and no boolean; of two zeros the positive one."""
    if isinstance(given, bool) or not isinstance(given, (int, float, str)):
        raise ValueError
    try:
        return float(given) + 0.0
    except OverflowError:
        raise ValueError from None


# What changes nothing of what memory computes.
_SESSION = {"session", "session_read", "session_write"}
_BESIDE = {"report", *_SESSION}

Switch = Annotated[bool, BeforeValidator(_read_switch)]
Number = Annotated[float, BeforeValidator(_read_number)]

SessionRead = Literal["auto", "always", "never"]


class RequestSettings(BaseModel):
    """Overrides of one request; what is None is the engine's.

    A request gives them in ``SamplingParams.extra_args``, over HTTP in ``vllm_xargs``, as flat
    keys (``{"pacellm_alpha": 0.5}``) or together (``{"pacellm": {"alpha": 0.5}}``, which
    ``vllm_xargs`` takes as a JSON string). They change activations only: the shape of the bank
    is the engine's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    enabled: Switch = Field(True, description="false: no memory, and no pages claimed for any")
    alpha: Number | None = Field(None, ge=0, le=1, description="as in PaceConfig")
    noise: Number | None = Field(None, ge=0, le=1, description="as in PaceConfig")
    theta_high: Number | None = Field(None, ge=-1, le=1, description="as in PaceConfig")
    theta_low: Number | None = Field(None, ge=-1, le=1, description="as in PaceConfig")

    report: Switch = Field(False, description="note what memory does, to be asked for later")
    session: str | None = Field(
        None, min_length=1, max_length=256, strict=True, description="whose text it may read"
    )
    session_read: SessionRead = Field(
        "auto", description="read the session's text where it is asked about, always or never"
    )
    session_write: Switch = Field(True, description="leave its own text to the session")

    @classmethod
    def of(cls, extra_args: Any) -> "RequestSettings":
        """The settings among a request's ``extra_args``.

        Null is as good as nothing. What leaves no memory (``alpha`` 0) is ``enabled`` false, which
        wins over all others. Raises ``PaceConfigError`` with one sentence about the first thing
        that is wrong.
        """
        given = _given(extra_args)
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
        apart = settings.model_fields_set & {"session_read", "session_write"}
        if settings.session is None and apart:
            raise PaceConfigError(
                f"pacellm: a request that sets {min(apart)} must name a session; add "
                "pacellm_session."
            )
        if settings.enabled and settings.alpha != 0:
            return settings
        return cls.model_validate({"enabled": False, **settings.model_dump(include=_BESIDE)})

    def overrides(self) -> dict[str, Any]:
        """The rules this request changes."""
        return self.model_dump(exclude_none=True, exclude={"enabled", *_BESIDE})

    def differs(self) -> bool:
        """Whether it sets anything that could change what memory computes."""
        return not self.enabled or bool(self.overrides())

    def of_memory(self) -> bool:
        """Whether it sets anything that is for layers with memory, and not to be without it."""
        return self.enabled and bool(self.model_fields_set - _SESSION)

    def key(self, rules: MemoryRules) -> str:
        """The same for the same effect only, in an engine with ``rules``; empty for the engine's.

        What a request says of fields that cannot matter beside the others is not part of it.
        """
        mine = effect_of(self.applied_to(rules)) if self.enabled else {}
        return json.dumps(mine) if mine != effect_of(rules) else ""

    def applied_to(self, rules: MemoryRules) -> MemoryRules:
        """The engine's ``rules`` as this request wants them."""
        if not self.enabled:
            return replace(rules, alpha=0.0)
        return replace(rules, **self.overrides())


def with_journal_key(extra_args: Any, request_id: str, wanted: bool = False) -> Any:
    """``extra_args`` of a request that asks for a report, with what it is kept under.

    Of one whose report is ``wanted`` as well. What a client says of that itself is dropped.
    """
    if not extra_args and not wanted:
        return extra_args
    given = _without(extra_args, _JOURNAL_KEY)
    if wanted or RequestSettings.of(given).report:
        given[_JOURNAL_KEY] = f"{request_id}\n{secrets.token_hex(8)}"
    return given


def journal_key(params: Any) -> str | None:
    """What the report of a request with these ``SamplingParams`` is kept under, if there is one."""
    return (params.extra_args or {}).get(_JOURNAL_KEY)


def ids_of(answer_id: str) -> tuple[str, ...]:
    """The request ids that may stand behind the id of an answer, as a client was told it.

    Of a route that takes several prompts or turns, vLLM writes behind it which one, from 0.
    """
    return answer_id, f"{answer_id}-0", f"{answer_id}_0"


def keep_reading(extra_args: Any, reading: list[Any] | None) -> Any:
    """``extra_args`` with what a request read of its session; a client's own word is dropped."""
    rest = _without(extra_args, _READING_KEY)
    return rest if reading is None else {**rest, _READING_KEY: reading}


def reading_of(params: Any) -> list[Any] | None:
    """What :func:`keep_reading` has put into these ``SamplingParams``."""
    return (params.extra_args or {}).get(_READING_KEY)


def _without(extra_args: Any, ours: str) -> dict[Any, Any]:
    """``extra_args`` less the key that only we may write."""
    return {name: value for name, value in (extra_args or {}).items() if name != ours}


def is_ours(key: Any) -> bool:
    """Whether a key of ``extra_args`` is one of ours, or was meant to be."""
    return _folded(key).startswith(CONFIG_KEY)


def ours_in(given: Mapping[Any, Any] | None) -> Any:
    """A key of ours in ``given``, or where it names extra arguments as another way in does."""
    for key, value in (given or {}).items():
        if is_ours(key):
            return key
        if (inner := _misplaced(key, value)) is not None:
            return inner
    return None


def _misplaced(key: Any, value: Any) -> Any:
    if key == "extra_body" and isinstance(value, Mapping):
        return ours_in({name: value[name] for name in value if name != key})
    if key in ("vllm_xargs", "extra_args") and isinstance(value, Mapping):
        return next(filter(is_ours, value), None)
    return None


def settings_of(request: Any) -> RequestSettings:
    """Those of a vLLM ``Request``, read once: it is asked for them at every block.

    Raises ``PaceConfigError`` as :meth:`RequestSettings.of`, with the request's id.
    """
    return _read(request).settings


def key_of(request: Any, rules: MemoryRules) -> str:
    """``RequestSettings.key`` of a vLLM ``Request``, made once."""
    read = _read(request)
    if read.rules is not rules:
        read.rules, read.key = rules, read.settings.key(rules)
    return read.key


@dataclass
class _Read:
    """What was read of a request's ``params``, and its key in an engine with ``rules``."""

    params: Any
    settings: RequestSettings
    rules: MemoryRules | None = None
    key: str = ""


def _read(request: Any) -> _Read:
    params = request.sampling_params
    read = getattr(request, "_pacellm", None)
    # The next turn of streamed input brings other parameters.
    if read is None or read.params is not params:
        try:
            settings = RequestSettings.of(params.extra_args if params else None)
        except PaceConfigError as error:
            raise PaceConfigError(of_request(error, request.request_id)) from None
        read = _Read(params, settings)
        request._pacellm = read
    return read


def effect_of(rules: MemoryRules) -> dict[str, float]:
    """What a request can set of ``rules``, as far as it matters; nothing where memory does none."""
    if not rules.alpha:
        return {}
    return {
        "alpha": rules.alpha,
        "noise": rules.noise if rules.negative_k else 0.0,
        "theta_high": rules.theta_high,
        "theta_low": rules.theta_low,
    }


def _given(extra_args: Any) -> dict[str, Any]:
    """Our fields among ``extra_args``, by name and without those that are null."""
    if not isinstance(extra_args, Mapping | None):
        raise PaceConfigError(not_allowed("extra_args", extra_args, "an object", _WHERE))
    given: dict[str, Any] = {}
    for key, value in (extra_args or {}).items():
        if (inner := _misplaced(key, value)) is not None:
            raise PaceConfigError(
                f"pacellm: {shown(inner)} stands within {shown(key)}, where nobody reads it; write "
                "it beside it."
            )
        if not is_ours(key):
            continue
        together = key == CONFIG_KEY
        prefix = "" if together else f"{CONFIG_KEY}_"
        for written, setting in (_read_object(value) if together else {key: value}).items():
            name = next((name for name in _ALLOWED if prefix + name == written), None)
            if name is None:
                raise _unknown(written, prefix)
            if name in given:
                raise _twice(name)
            given[name] = setting
    return {name: setting for name, setting in given.items() if setting is not None}


def _read_object(given: Any) -> Mapping[str, Any]:
    """``{"alpha": 0.5}``, or its JSON."""
    value = given
    if isinstance(given, str):
        try:
            value = json.loads(given, object_pairs_hook=_object)
        except PaceConfigError:
            raise
        except (ValueError, RecursionError):  # no JSON, or too deep or too long a number in it
            pass
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise PaceConfigError(
            f"pacellm: the request's {CONFIG_KEY!r} = {shown(given)} is not allowed; it must be an "
            "object such as {'alpha': 0.5}."
        )
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; Python's own reading of it would keep the last of two equal names."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _twice(name)
        found[name] = value
    return found


def _folded(key: Any) -> str:
    """The beginning of a key as people tell keys apart: letters and digits, in one case."""
    text = key.decode(errors="replace") if isinstance(key, bytes) else key
    if not isinstance(text, str):
        return ""
    # Cut first: ordering long runs of combining marks takes time in the square of their length.
    plain = unicodedata.normalize("NFKC", text[:80]).casefold()
    return "".join(filter(str.isalnum, plain))


def _unknown(written: Any, prefix: str) -> PaceConfigError:
    """What is said about a key that is none of the fields behind ``prefix``."""
    names = [prefix + name for name in _ALLOWED]
    known = [*names, CONFIG_KEY] if prefix else names
    meant = _folded(written).removeprefix(CONFIG_KEY)
    right = [name for name in known if _folded(name).removeprefix(CONFIG_KEY) == meant]
    remedy = f"write {right[0]}" if right else f"it can set {', '.join(names)}"
    return PaceConfigError(f"pacellm: a request cannot set {shown(written)}; {remedy}.")


def _twice(name: Any) -> PaceConfigError:
    return PaceConfigError(f"pacellm: the request sets {shown(name)} twice; drop one.")
