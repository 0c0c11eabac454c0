"""BankLayout: how the state of one bank is cut into pages of the KV cache pool."""

from dataclasses import dataclass
from math import ceil

import torch

from pacellm_vllm.ops.rules import MemoryRules
from pacellm_vllm.ops.update import Header

_FP32_BYTES = 4
_NUM_SUMS = 4
_MAX_PARTS = 64
_UNIT_ALIGNMENT = 16


@dataclass(frozen=True)
class BankLayout:
    """One request's bank of one layer, in rows of ``width`` elements, in this order:

    header (int32 words) | tail | slot 0 key, value | slot 1 key, value | ... | 4 fp32 sums |
    staged a, o

    Slots come first because a request's first tokens reach only the first of them, and what
    follows is not touched before the second segment: pages are claimed front to back. A row is
    kept in ``parts`` equal units so that rows wider than a page, or that would waste one, fit.
    The tail, which only speculative decoding has, is a row for a position and one for each of the
    ``drafts`` tokens that a step may add and the next may take back.

    ``width`` is this rank's share of the intermediate size, ``itemsize`` the bytes of a stored
    element, ``page_bytes`` what one page may hold.
    """

    bank_size: int
    segment_size: int
    max_insertions: int
    width: int
    itemsize: int
    page_bytes: int
    parts: int
    drafts: int = 0

    @classmethod
    def plan(
        cls,
        rules: MemoryRules,
        width: int,
        dtype: torch.dtype,
        page_bytes: int,
        drafts: int = 0,
    ) -> "BankLayout":
        """The layout with the fewest pages of at most ``page_bytes``, then the fewest parts.

        Units are whole multiples of 16 bytes where rows are, which GPUs read at once.
        Raises ``ValueError`` when even the narrowest unit does not fit a page.
        """
        layouts = [
            cls(
                bank_size=rules.bank_size,
                segment_size=rules.segment_size,
                max_insertions=rules.max_insertions,
                width=width,
                itemsize=dtype.itemsize,
                page_bytes=page_bytes,
                parts=parts,
                drafts=drafts,
            )
            for parts in range(1, _MAX_PARTS + 1)
            if width % parts == 0 and width // parts * dtype.itemsize <= page_bytes
        ]
        if not layouts:
            raise ValueError(
                f"pacellm: a KV cache page of {page_bytes} bytes is too small for rows of {width} "
                f"x {dtype.itemsize} bytes; raise --block-size or choose fewer layers."
            )

        def cost(layout: BankLayout) -> tuple[bool, bool, int, int]:
            # Kernels read the header as words.
            aligned, words = (layout.unit_bytes % n == 0 for n in (_UNIT_ALIGNMENT, _FP32_BYTES))
            return not aligned, not words, layout.num_pages, layout.parts

        return min(layouts, key=cost)

    @property
    def unit_elements(self) -> int:
        return self.width // self.parts

    @property
    def unit_bytes(self) -> int:
        return self.unit_elements * self.itemsize

    @property
    def units_per_page(self) -> int:
        return self.page_bytes // self.unit_bytes

    @property
    def header_rows(self) -> int:
        words = Header.num_words(self.bank_size)
        return ceil(words * _FP32_BYTES / (self.width * self.itemsize))

    @property
    def tail_start(self) -> int:
        return self.header_rows

    @property
    def slots_start(self) -> int:
        """Row of slot 0's key."""
        return self.tail_start + (1 + self.drafts if self.drafts else 0)

    @property
    def sum_rows(self) -> int:
        return _NUM_SUMS * _FP32_BYTES // self.itemsize

    @property
    def sums_start(self) -> int:
        return self.slots_start + 2 * self.bank_size

    @property
    def staged_start(self) -> int:
        return self.sums_start + self.sum_rows

    @property
    def num_rows(self) -> int:
        return self.staged_start + 2 * self.max_insertions

    @property
    def num_pages(self) -> int:
        """Pages of a bank that has reached its second segment."""
        return self._pages(self.num_rows)

    @property
    def committed_bytes(self) -> int:
        """Bytes of the keys and values of a full bank alone."""
        return 2 * self.bank_size * self.width * self.itemsize

    def committed_pages(self, num_tokens: int) -> int:
        """Pages that hold what the bank committed after ``num_tokens`` tokens can count.

        Its header counts no more slots than tokens, and no more than ``bank_size``.
        """
        return self._pages(self.slots_start + 2 * min(num_tokens, self.bank_size))

    @property
    def max_committed_pages(self) -> int:
        """Pages that hold a full committed bank."""
        return self.committed_pages(self.bank_size)

    def pages_for(self, num_tokens: int) -> int:
        """Pages a request needs once ``num_tokens`` of its tokens are computed.

        In the first segment token j can reach slot j at most.
        """
        if num_tokens > self.segment_size:
            return self.num_pages
        return self.committed_pages(num_tokens)

    def _pages(self, rows: int) -> int:
        return ceil(rows * self.parts / self.units_per_page)
