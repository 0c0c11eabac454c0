"""PagedStore: one bank, read and written where it lies in its request's pages."""

from collections.abc import Iterable, Iterator, Sequence

import torch

from pacellm_vllm.memory.layout import BankLayout
from pacellm_vllm.memory.places import Run, Span, places


def unit_view(kv_cache: torch.Tensor, layout: BankLayout, dtype: torch.dtype) -> torch.Tensor:
    """All pages of one layer as units.

    ``kv_cache`` is what vLLM binds, [blocks, 1, 1, page_bytes] uint8 with any block stride;
    returns [blocks, units_per_page, unit_elements] of ``dtype``, no copy.
    """
    pages = kv_cache.flatten(1).view(dtype)
    used = layout.units_per_page * layout.unit_elements
    return pages[:, :used].unflatten(1, (layout.units_per_page, layout.unit_elements))


class PagedStore:
    """A ``BankStore`` over ``units`` (see :func:`unit_view`) and the request's ``pages``.

    ``pages`` (at least the pages reached) are block ids in claiming order.
    """

    def __init__(self, units: torch.Tensor, pages: Sequence[int], layout: BankLayout) -> None:
        self._units = units
        self._pages = list(pages)
        self._layout = layout
        self._places = places(layout)
        origin, stride = units.storage_offset(), units.stride(0)
        self._origins = [origin + page * stride for page in pages]

    def read_words(self) -> torch.Tensor:
        return self._load(self._places.header).view(torch.int32)

    def write_words(self, words: torch.Tensor) -> None:
        self._save(self._places.header, words.view(self._units.dtype))

    def read_keys(self, count: int) -> torch.Tensor:
        return self._load_rows(self._places.keys, count)

    def read_values(self, count: int) -> torch.Tensor:
        return self._load_rows(self._places.values, count)

    def products(self, a: torch.Tensor, out: torch.Tensor) -> None:
        for (slot, rows, span), view in self._views(self._places.keys, len(out)):
            view = view.float()
            if rows:
                torch.mv(view, a, out=out[slot : slot + len(view)])
                continue
            part = torch.dot(view, a[span.begin : span.begin + span.size])
            out[slot] = out[slot] + part if span.begin else part

    def add_value(self, slot: int, weight: float, out: torch.Tensor) -> None:
        for span in self._places.rows[self._layout.slots_start + 2 * slot + 1]:
            part = out if span.size == len(out) else out[span.begin : span.begin + span.size]
            part.add_(self._view(span), alpha=weight)

    def write_slots(
        self, slots: Sequence[int], keys: Iterable[torch.Tensor], values: Iterable[torch.Tensor]
    ) -> None:
        self._save_pairs(self._layout.slots_start, slots, keys, values)

    def read_staged(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        where = self._places
        return self._load_rows(where.staged_a, count), self._load_rows(where.staged_o, count)

    def write_staged(
        self, rows: Sequence[int], a: Iterable[torch.Tensor], o: Iterable[torch.Tensor]
    ) -> None:
        self._save_pairs(self._layout.staged_start, rows, a, o)

    def read_sums(self) -> torch.Tensor:
        return self._load(self._places.sums).view(torch.float32).view(-1, self._layout.width)

    def write_sums(self, sums: torch.Tensor) -> None:
        self._save(self._places.sums, sums.flatten().view(self._units.dtype))

    def copy(self) -> "PagedStore":
        """The same bank in memory of its own."""
        return PagedStore(self._units[self._pages], range(len(self._pages)), self._layout)

    def read_tail_position(self) -> int:
        """What was last written there; undefined before."""
        row = self._load(self._places.rows[self._layout.tail_start])
        return int(row[: 4 // row.itemsize].view(torch.int32))

    def write_tail_position(self, position: int) -> None:
        word = torch.tensor([position], dtype=torch.int32, device=self._units.device)
        row = self._units.new_zeros(self._layout.width)
        row[: 4 // row.itemsize] = word.view(row.dtype)
        self._save(self._places.rows[self._layout.tail_start], row)

    def read_tail(self, count: int) -> torch.Tensor:
        """The first rows [count, D] of the tail."""
        start = self._layout.tail_start + 1
        return torch.stack([self._load(row) for row in self._places.rows[start : start + count]])

    def write_tail(self, a: torch.Tensor) -> None:
        start = self._layout.tail_start + 1
        for spans, row in zip(self._places.rows[start : start + len(a)], a, strict=True):
            self._save(spans, row)

    def _view(self, span: Span) -> torch.Tensor:
        origin = self._origins[span.page] + span.start
        return self._units.as_strided((span.size,), (1,), origin)

    def _views(self, runs: Sequence[Run], count: int) -> Iterator[tuple[Run, torch.Tensor]]:
        """The runs of the first ``count`` rows: [rows, width], or a share [size] of one."""
        width = self._layout.width
        for run in runs:
            if run.slot >= count:
                return
            if not run.rows:
                yield run, self._view(run.span)
                continue
            rows = min(run.rows, count - run.slot)
            origin = self._origins[run.span.page] + run.span.start
            yield run, self._units.as_strided((rows, width), (2 * width, 1), origin)

    def _load(self, spans: Sequence[Span]) -> torch.Tensor:
        views = [self._view(span) for span in spans]
        return views[0].clone() if len(views) == 1 else torch.cat(views)

    def _load_rows(self, runs: Sequence[Run], count: int) -> torch.Tensor:
        out = self._units.new_empty(count, self._layout.width)
        for (slot, rows, span), view in self._views(runs, count):
            if rows:
                out[slot : slot + len(view)] = view
            else:
                out[slot, span.begin : span.begin + span.size] = view
        return out

    def _save(self, spans: Sequence[Span], data: torch.Tensor) -> None:
        for span in spans:
            self._view(span).copy_(data[span.begin : span.begin + span.size])

    def _save_pairs(
        self,
        start: int,
        index: Sequence[int],
        first: Iterable[torch.Tensor],
        second: Iterable[torch.Tensor],
    ) -> None:
        for i, one, other in zip(index, first, second, strict=True):
            self._save(self._places.rows[start + 2 * i], one)
            self._save(self._places.rows[start + 2 * i + 1], other)
