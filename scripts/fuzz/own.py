"""Own: faults that vLLM has without memory too."""

import re
from collections.abc import Sequence

# What makes a fault the same; wrong tokens and lost blocks are never vLLM's.
_SAME = (
    re.compile(r"(never scheduled) .*: (.*)"),
    # vLLM tells of a window's blocks as if those it has let go of were there.
    re.compile(
        r"(KV events): \d+ (?:tokens in|stored blocks that are not there)[^,]*, (\w+Spec)(?!,)"
    ),
    re.compile(r"the engine died: (\w+): .*\((\w+\.py:\d+)\)$"),
)


def kind_of(fault: str) -> tuple[str, ...] | None:
    """What plain vLLM's fault must agree in: requests, a group's kind, or an error and its line."""
    found = (pattern.match(fault) for pattern in _SAME)
    return next((match.groups() for match in found if match), None)


def are_vllms(faults: Sequence[str], plain: Sequence[str]) -> bool:
    """Whether all ``faults`` are of kinds that the same engine has without memory (``plain``)."""
    return {kind_of(fault) for fault in faults} <= {kind_of(fault) for fault in plain} - {None}
