"""Subscriber: what someone who hears KV events believes to be in the prefix cache."""

from collections import Counter
from typing import Any

from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import (
    get_block_hash,
    get_group_id,
    maybe_convert_block_hash,
)

Entry = tuple[int, Any]


class Subscriber:
    """Hears all events of one block pool, from now on; ``kinds`` are those of its groups."""

    def __init__(self, pool: Any, kinds: list[str]) -> None:
        self._pool, self._kinds = pool, kinds
        self._stored: Counter[Entry] = Counter()
        self._there: set[Entry] = set()
        self._faults: list[str] = []
        take = pool.take_events

        def heard() -> list[Any]:
            events = take()
            for event in events:
                self._hear(event)
            return events

        pool.take_events = heard

    def compare(self) -> list[str]:
        """Sentences about what was heard and is not so, or is so and was not heard."""
        self._pool.take_events()
        faults, self._faults = self._faults, []
        cached = {
            (get_group_id(key), maybe_convert_block_hash(get_block_hash(key)))
            for key in self._pool.cached_block_hash_to_block._cache
        }
        heard = {group for group, _ in self._there}
        for what, entries in (
            ("stored blocks that are not there", self._there - cached),
            # A group may be kept out of events altogether.
            (
                "cached blocks that were never told of",
                {(group, key) for group, key in cached if group in heard} - set(self._stored),
            ),
        ):
            if entries:
                kinds = sorted({self._kinds[group] for group, _ in entries})
                faults.append(f"KV events: {len(entries)} {what}, {', '.join(kinds)}")
        return faults

    def _hear(self, event: Any) -> None:
        if isinstance(event, AllBlocksCleared):
            self._stored.clear()
            self._there.clear()
        elif isinstance(event, BlockStored):
            entries = [(event.group_idx, key) for key in event.block_hashes]
            self._stored.update(entries)
            self._there.update(entries)
            if len(event.token_ids) != event.block_size * len(entries):
                self._faults.append(
                    f"KV events: {len(event.token_ids)} tokens in {len(entries)} blocks of "
                    f"{event.block_size}, {self._kinds[event.group_idx]}"
                )
        elif isinstance(event, BlockRemoved):
            for key in event.block_hashes:
                entry = (event.group_idx, key)
                if not self._stored[entry]:
                    self._faults.append(
                        f"KV events: a block of group {entry[0]} removed that was never stored"
                    )
                self._stored[entry] -= 1
                self._there.discard(entry)
