"""SnapshotGrid: where in a text banks are copied for the prefix cache, and into which pages."""

from dataclasses import dataclass
from functools import cached_property
from math import ceil

from pacellm_vllm.memory.layout import BankLayout


@dataclass(frozen=True)
class SnapshotGrid:
    """A copy of the committed bank for every ``interval`` tokens of a prompt.

    ``interval`` is the fewest whole segments whose attention blocks, of ``block_size`` tokens, are
    as many as a copy's pages: copies take no more blocks than they make reusable.

    A request's row of the block table holds its own ``layout.num_pages`` pages and behind them a
    column for each page of each copy, at a place that the copy's boundary alone decides: the null
    block where there is no copy. The scheduler appends the columns of a boundary in the step that
    reads the token at it; the worker fills them there, before that token changes the bank.
    """

    layout: BankLayout
    block_size: int

    @cached_property
    def interval(self) -> int:
        """Tokens from one boundary to the next."""
        size = self.layout.segment_size
        return ceil(self.layout.max_committed_pages * self.block_size / size) * size

    def boundaries(self, computed: int, num_tokens: int) -> range:
        """Those that a forward over tokens ``computed`` .. ``num_tokens - 1`` reads a token at."""
        first = max(ceil(computed / self.interval), 1) * self.interval
        return range(first, num_tokens, self.interval)

    def row_length(self, num_tokens: int) -> int:
        """Columns of a request with ``num_tokens`` tokens, where any boundary lies among them."""
        copies = (num_tokens - 1) // self.interval
        return self.layout.num_pages + copies * self.layout.max_committed_pages if copies else 0

    def columns(self, position: int) -> range:
        """The columns for a copy made at ``position``, as many as that bank's pages; else none."""
        if position == 0 or position % self.interval:
            return range(0)
        first = self.row_length(position) or self.layout.num_pages
        return range(first, first + self.layout.committed_pages(position))


def takes_copies(tokens_in_step: int, drafts: int = 0) -> bool:
    """Whether a request with so many tokens in a step, ``drafts`` of them at most, may be copied.

    Scheduler and worker must both say so. Decode steps, which a graph may hold, have nothing to
    copy, and a prompt's last token alone looks like one; nor is a bank copied beside drafts.
    """
    return tokens_in_step > 1 + drafts
