"""Places: where in its request's pages each row of a bank lies."""

from functools import lru_cache
from typing import NamedTuple

from pacellm_vllm.memory.layout import BankLayout
from pacellm_vllm.ops.update import Header


class Span(NamedTuple):
    """Elements ``begin`` .. ``begin + size - 1`` of something, side by side in one page.

    ``page`` counts in claiming order, ``start`` is in elements of the page.
    """

    page: int
    start: int
    begin: int
    size: int


class Run(NamedTuple):
    """Whole rows of the slots from ``slot`` on in one page; where ``rows`` is 0, a share of one.

    ``span`` is the first row's, or the share's.
    """

    slot: int
    rows: int
    span: Span


class Places:
    """``header`` and ``sums`` as a whole; ``keys``, ``values``: every slot's, in slot order."""

    def __init__(self, layout: BankLayout) -> None:
        self._page_elements = layout.units_per_page * layout.unit_elements
        width = layout.width
        self.rows = [self._spans(row * width, width) for row in range(layout.num_rows)]
        words = Header.num_words(layout.bank_size) * 4 // layout.itemsize
        self.header = self._spans(0, words)
        self.sums = self._spans(layout.sums_start * width, layout.sum_rows * width)
        self.keys = self._runs(layout.slots_start, layout.bank_size)
        self.values = self._runs(layout.slots_start + 1, layout.bank_size)
        self.staged_a = self._runs(layout.staged_start, layout.max_insertions)
        self.staged_o = self._runs(layout.staged_start + 1, layout.max_insertions)

    def _spans(self, first: int, size: int) -> tuple[Span, ...]:
        """Elements ``first`` .. ``first + size - 1`` of the bank."""
        spans = []
        done = 0
        while done < size:
            page, start = divmod(first + done, self._page_elements)
            n = min(size - done, self._page_elements - start)
            spans.append(Span(page, start, done, n))
            done += n
        return tuple(spans)

    def _runs(self, first: int, count: int) -> tuple[Run, ...]:
        """Every other row from ``first`` on."""
        runs: list[Run] = []
        for slot in range(count):
            spans = self.rows[first + 2 * slot]
            last = runs[-1] if runs else None
            if len(spans) > 1:
                runs += [Run(slot, 0, span) for span in spans]
            elif last is not None and last.rows and last.span.page == spans[0].page:
                runs[-1] = last._replace(rows=last.rows + 1)
            else:
                runs.append(Run(slot, 1, spans[0]))
        return tuple(runs)


@lru_cache(maxsize=16)
def places(layout: BankLayout) -> Places:
    """The same for every bank of an engine."""
    return Places(layout)
