"""What is said about a setting that is not allowed, wherever settings are read."""

import reprlib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

_SHOWN = 80
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3
_SHORT.maxlist = _SHORT.maxtuple = 20
_SHORT.maxstring = _SHORT.maxother = _SHOWN


class PaceError(ValueError):
    """What was asked cannot be done: one sentence, with what to do instead."""


def shown(value: Any) -> str:
    """``value`` as one would write it, cut to 80 characters: it may be anything at all."""
    try:
        text = _SHORT.repr(value)
    except Exception:  # an integer of too many digits, or whatever its class raises
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def of_request(sentence: object, request_id: Any) -> str:
    """``sentence``, ours and of any length, which says at its end whose request it is about."""
    return f"{str(sentence).removesuffix('.')} (request {shown(request_id)})."


def first_line(error: Exception) -> str:
    """The first line of what another library raised, or the error's name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def first_refusal(subject: str, refusals: Mapping[str, tuple[bool, str]]) -> str | None:
    """One sentence: the first of ``refusals`` that was found, and what to do; None where none was.

    They are, by what ``subject`` ("memory does", "experts do") does not work with, whether that is
    so here, and why with what to do instead.
    """
    for what, (found, why) in refusals.items():
        if found:
            return f"pacellm: {subject} not work with {what}: {why}."
    return None


def not_allowed(name: str, value: Any, allowed: str, where: str = "") -> str:
    """One sentence: which field, its value, and what it must be; ``where`` it was given."""
    return f"pacellm: {name} = {shown(value)} is not allowed{where}; it must be {allowed}."


def first_mistake(
    error: ValidationError,
    given: Mapping[str, Any],
    allowed: Mapping[str, str],
    *,
    prefix: str = "",
    where: str = "",
) -> str:
    """One sentence about the first thing that pydantic found wrong with ``given``.

    What a validator of ours raised is a sentence already; else ``allowed`` says, by field, what it
    must be, and ``prefix`` stands before the field's name.
    """
    first = error.errors()[0]
    raised = first.get("ctx", {}).get("error")
    if isinstance(raised, ValueError) and str(raised).startswith("pacellm: "):
        return str(raised)
    name = str(first["loc"][0])
    value = given.get(name, first.get("input"))
    return not_allowed(prefix + name, value, allowed[name], where)
