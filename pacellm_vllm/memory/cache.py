"""SnapshotCache: committed banks among the cached blocks of vLLM's pool."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    BlockHashWithGroupId,
    KVCacheBlock,
    get_block_hash,
    make_block_hash_with_group_id,
)

from pacellm_vllm.compat import publish_block
from pacellm_vllm.memory.layout import BankLayout


@dataclass(frozen=True)
class SnapshotCache:
    """Snapshots in the KV cache ``groups`` of ``pool``, by their prefixes' hashes.

    All pages of one must be there for it to be found. ``block_hashes`` are vLLM's of a request.
    """

    pool: BlockPool
    layout: BankLayout
    groups: list[int]

    def hashed_tokens(self, block_hashes: Sequence[BlockHash]) -> int:
        return len(block_hashes) * self.pool.hash_block_size

    def page_hashes(self, block_hashes: Sequence[BlockHash], length: int) -> Iterator[BlockHash]:
        """Of the pages of the bank committed after ``length`` tokens."""
        prefix = block_hashes[length // self.pool.hash_block_size - 1]
        return (_page_hash(prefix, i) for i in range(self.layout.committed_pages(length)))

    def first_hash(self, block_hashes: Sequence[BlockHash], length: int) -> BlockHash:
        return next(self.page_hashes(block_hashes, length))

    def find(
        self, block_hashes: Sequence[BlockHash], length: int
    ) -> list[list[KVCacheBlock]] | None:
        """Pages of the snapshot after ``length`` tokens, each in all groups."""
        pages = []
        for page_hash in self.page_hashes(block_hashes, length):
            page = self.pool.get_cached_block(page_hash, self.groups)
            if page is None:
                return None
            pages.append(page)
        return pages

    def longest_hit(
        self, block_hashes: Sequence[BlockHash], max_length: int, alignment: int
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """The longest prefix of whole segments with a snapshot: its pages by group, its tokens."""
        step = math.lcm(self.layout.segment_size, alignment)
        known = min(max_length, self.hashed_tokens(block_hashes))
        for length in range(known // step * step, 0, -step):
            pages = self.find(block_hashes, length)
            if pages is not None:
                return tuple(list(group) for group in zip(*pages, strict=True)), length
        return tuple([] for _ in self.groups), 0

    def publish(
        self, pages: Iterable[KVCacheBlock], block_hashes: Sequence[BlockHash], length: int
    ) -> None:
        """Let the snapshot after ``length`` tokens be found in ``pages``, which are all of it.

        Of another one that was evicted in part the rest is found no more: the two need not be equal
        bit for bit, and the older page would come first.
        """
        [group] = self.groups
        for page, page_hash in zip(pages, self.page_hashes(block_hashes, length), strict=True):
            while older := self.pool.get_cached_block(page_hash, self.groups):
                self.pool.evict_blocks({block.block_id for block in older})
            group_hash = make_block_hash_with_group_id(page_hash, group)
            publish_block(self.pool, page, group_hash, length)


def count_snapshots(hashes: Iterable[BlockHashWithGroupId]) -> int:
    """How many snapshots pages with these hashes come of, each having one first page."""
    first = _page_hash(b"", 0)
    return sum(get_block_hash(page_hash).endswith(first) for page_hash in hashes)


def _page_hash(prefix: bytes, page: int) -> BlockHash:
    """The hash of one page of the bank committed after a prefix with this hash."""
    return BlockHash(prefix + b"pacellm" + page.to_bytes(4, "big"))
