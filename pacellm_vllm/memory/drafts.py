"""Tokens that may be rejected: looked up at once, and written when they are known to stay.

A step of speculative decoding ends with drafts. Their outputs depend on a committed bank alone, so
they need no write; their activations wait in the bank's tail, under the position of the first of
them. The next step's position tells how many were accepted: those are written then, the rest is
forgotten.
"""

from collections.abc import Iterator

import torch

from pacellm_vllm.memory.store import PagedStore
from pacellm_vllm.ops.lookup import Reduce
from pacellm_vllm.ops.rules import MemoryRules
from pacellm_vllm.ops.update import Progress, advance, peek

_NOTHING = -1


def write_accepted(
    store: PagedStore, position: int, rules: MemoryRules, reduce: Reduce | None = None
) -> Iterator[Progress]:
    """Write what the tail holds of the tokens before ``position``, and empty it.

    ``position`` is the next token's. A restored bank's tail begins there or later, as its donor's
    bank had caught up with the prefix. A request's first token finds whatever its pages held, and
    there is nothing before it.
    """
    first = store.read_tail_position()
    if first == _NOTHING:
        return
    if 0 <= first < position:
        a = store.read_tail(position - first)
        yield from _advance_all(store, a, first, rules, reduce, torch.empty_like(a))
    store.write_tail_position(_NOTHING)


def look_up_drafts(
    store: PagedStore,
    a: torch.Tensor,
    position: int,
    rules: MemoryRules,
    reduce: Reduce | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Outputs of ``a`` [n, D], the tokens from ``position`` on, any of which may be rejected.

    They go to ``out`` if it is given. Of the bank only the tail is written. Tokens behind a
    segment's end read it as the drafts before them would leave it.
    """
    out = torch.empty_like(a) if out is None else out
    if len(a) <= rules.segment_size - position % rules.segment_size:
        peek(store, a, position, rules, reduce, out)
    else:
        list(_advance_all(store.copy(), a, position, rules, reduce, out))
    store.write_tail(a)
    store.write_tail_position(position)
    return out


def _advance_all(
    store: PagedStore,
    a: torch.Tensor,
    position: int,
    rules: MemoryRules,
    reduce: Reduce | None,
    out: torch.Tensor,
) -> Iterator[Progress]:
    """``advance`` over tokens that may lie in several segments."""
    begin = 0
    while begin < len(a):
        n = min(len(a) - begin, rules.segment_size - (position + begin) % rules.segment_size)
        part = slice(begin, begin + n)
        yield advance(store, a[part], position + begin, rules, reduce, out[part])[1]
        begin += n
