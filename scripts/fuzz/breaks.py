"""Breaks: faults put into the package on purpose, to see that the fuzzer finds them."""

import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch

from pacellm_vllm.memory.layout import BankLayout
from pacellm_vllm.memory.manager import PagedBankManager
from pacellm_vllm.ops import steps, update
from pacellm_vllm.request import RequestSettings


def snapshot_of_a_segment() -> None:
    """A snapshot's pages hold as many slots as a segment has tokens, its header counts more."""
    BankLayout.committed_pages = property(  # type: ignore[assignment]
        lambda layout: layout.pages_for(layout.segment_size)
    )


def commit_one_token_early() -> None:
    """The last token of a segment reads the bank that the others left, and leaves nothing."""
    advance, step = update.advance, steps._advance

    def commit_now(store: Any, rules: Any) -> int:
        words = store.read_words()
        header = update.Header.unpack(words)
        slots = update.commit(store, header, int(header.valid), rules)
        store.write_words(words)
        return slots

    def early(
        store: Any, a: Any, position: int, rules: Any, reduce: Any = None, out: Any = None
    ) -> Any:
        left = rules.segment_size - 1 - position % rules.segment_size
        if rules.segment_size == 1 or len(a) < left:
            return advance(store, a, position, rules, reduce, out)
        out = torch.empty_like(a) if out is None else out
        progress = update.Progress(0, 0, 0, None)
        if left:
            _, progress = advance(store, a[:left], position, rules, reduce, out[:left])
            progress.committed_slots = commit_now(store, rules)
        if len(a) > left:
            update.peek(store, a[left:], position + left, rules, reduce, out[left:])
        return out, progress

    def early_step(
        store: Any, words: Any, counts: Any, a: Any, out: Any, position: int, found: Any, rules: Any
    ) -> Any:
        left = rules.segment_size - 1 - position % rules.segment_size
        if rules.segment_size > 1 and left == 0:
            steps._enhance(store, a, out, found, rules)
            return update.Progress(0, 0, 0, None)
        progress = step(store, words, counts, a, out, position, found, rules)
        if left == 1:
            store.write_words(words)
            progress.committed_slots = commit_now(store, rules)
        return progress

    _replace_everywhere(advance, early)
    steps._advance = early_step


def settings_left_out_of_the_key() -> None:
    """Requests with other settings share a prefix."""
    RequestSettings.key = lambda self: ""  # type: ignore[method-assign]


def page_not_refreshed() -> None:
    """Every third page that should be copied is not."""
    copy, count = PagedBankManager._copy, itertools.count(1)

    def sometimes(manager: Any, source: Any, target: Any) -> None:
        if next(count) % 3:
            copy(manager, source, target)

    PagedBankManager._copy = sometimes  # type: ignore[method-assign]


def hit_pages_counted_on_top() -> None:
    """A hit needs its pages besides all that the request needs without it."""
    count = PagedBankManager.get_num_blocks_to_allocate

    def more(
        manager: Any, request_id: str, num_tokens: int, new: Any, *args: Any, **kwargs: Any
    ) -> int:
        return count(manager, request_id, num_tokens, new, *args, **kwargs) + 2 * len(new)

    PagedBankManager.get_num_blocks_to_allocate = more  # type: ignore[method-assign]


BREAKS: dict[str, Callable[[], None]] = {
    "snapshot-of-a-segment": snapshot_of_a_segment,
    "commit-early": commit_one_token_early,
    "settings-not-in-key": settings_left_out_of_the_key,
    "page-not-refreshed": page_not_refreshed,
    "hit-on-top": hit_pages_counted_on_top,
}


def _replace_everywhere(old: Any, new: Any) -> None:
    """Where modules of the package have imported ``old`` by name, too."""
    for name, module in list(sys.modules.items()):
        if name.startswith("pacellm_vllm"):
            for key, value in list(vars(module).items()):
                if value is old:
                    setattr(module, key, new)
