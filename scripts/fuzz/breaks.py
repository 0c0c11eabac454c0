"""Breaks: faults put into the package on purpose, to see that the fuzzer finds them."""

import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from pacellm_vllm.memory import manager, plain
from pacellm_vllm.memory.layout import BankLayout
from pacellm_vllm.memory.manager import PagedBankManager
from pacellm_vllm.ops import steps, update


def snapshot_of_a_segment() -> None:
    """A snapshot's pages hold as many slots as a segment has tokens, its header counts more."""
    count = BankLayout.committed_pages
    BankLayout.committed_pages = (  # type: ignore[method-assign]
        lambda layout, tokens: count(layout, min(tokens, layout.segment_size))
    )


def commit_one_token_early() -> None:
    """The last token of a segment reads the bank that the others left, and leaves nothing."""
    advance, step = update.advance, steps._advance

    def commit_now(store: Any, rules: Any) -> update.Committed:
        words = store.read_words()
        header = update.Header.unpack(words)
        committed = update.commit(store, header, int(header.valid), rules)
        store.write_words(words)
        return committed

    def early(
        store: Any, a: Any, position: int, rules: Any, reduce: Any = None, out: Any = None
    ) -> Any:
        left = rules.segment_size - 1 - position % rules.segment_size
        if rules.segment_size == 1 or len(a) < left:
            return advance(store, a, position, rules, reduce, out)
        out = torch.empty_like(a) if out is None else out
        progress = update.Progress(0, 0, 0, None, [], [])
        if left:
            _, progress = advance(store, a[:left], position, rules, reduce, out[:left])
            progress.committed = commit_now(store, rules)
        if len(a) > left:
            update.peek(store, a[left:], position + left, rules, reduce, out[left:])
        return out, progress

    def early_step(
        store: Any, words: Any, counts: Any, a: Any, out: Any, position: int, found: Any, rules: Any
    ) -> Any:
        left = rules.segment_size - 1 - position % rules.segment_size
        if rules.segment_size > 1 and left == 0:
            steps._enhance(store, a, out, found, rules)
            return update.Progress(0, 0, 0, None, [], [])
        progress = step(store, words, counts, a, out, position, found, rules)
        if left == 1:
            store.write_words(words)
            progress.committed = commit_now(store, rules)
        return progress

    _replace_everywhere(advance, early)
    steps._advance = early_step


def settings_left_out_of_the_key() -> None:
    """Requests with other settings share a prefix."""
    manager._hash_key = lambda request: None


def page_not_refreshed() -> None:
    """Every third page of a bank that should be restored from a snapshot is not."""
    copy, count = manager.copy_blocks_before_forward, itertools.count(1)

    def some(group: Any, pairs: Any) -> None:
        kept = [(s, t) if next(count) % 3 else (t, t) for s, t in pairs]
        for (source, _), (now, target) in zip(pairs, kept, strict=True):
            if now is target:
                # The scheduler lets go of both ends.
                group.block_pool.touch([target])
                group.block_pool.free_blocks([source])
        copy(group, kept)

    manager.copy_blocks_before_forward = some


def snapshot_not_copied() -> None:
    """The last page of a bank that should be copied for the prefix cache is not."""
    run = plain.PlainStep.run

    def shorter(step: Any, *args: Any) -> Any:
        step.pieces = [replace(piece, copy=piece.copy[:-1]) for piece in step.pieces]
        return run(step, *args)

    plain.PlainStep.run = shorter  # type: ignore[method-assign]


def hit_pages_counted_on_top() -> None:
    """A hit needs its pages besides all that the request needs without it."""
    count = PagedBankManager.get_num_blocks_to_allocate

    def more(group: Any, request_id: str, tokens: int, new: Any, *args: Any, **more: Any) -> int:
        need = count(group, request_id, tokens, new, *args, **more)
        if request_id not in group._taking_over:
            return need
        group._taking_over.discard(request_id)
        return need + len(new)

    PagedBankManager.get_num_blocks_to_allocate = more  # type: ignore[method-assign]


BREAKS: dict[str, Callable[[], None]] = {
    "snapshot-of-a-segment": snapshot_of_a_segment,
    "commit-early": commit_one_token_early,
    "settings-not-in-key": settings_left_out_of_the_key,
    "page-not-refreshed": page_not_refreshed,
    "snapshot-not-copied": snapshot_not_copied,
    "hit-on-top": hit_pages_counted_on_top,
}


def _replace_everywhere(old: Any, new: Any) -> None:
    """Where modules of the package have imported ``old`` by name, too."""
    for name, module in list(sys.modules.items()):
        if name.startswith("pacellm_vllm"):
            for key, value in list(vars(module).items()):
                if value is old:
                    setattr(module, key, new)
