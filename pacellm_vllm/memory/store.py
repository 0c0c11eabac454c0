"""PagedStore: one bank, read and written through its request's pages."""

import torch

from pacellm_vllm.memory.layout import BankLayout
from pacellm_vllm.ops.update import Header


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

    ``pages`` int [at least the pages reached] are block ids in claiming order.
    """

    def __init__(self, units: torch.Tensor, pages: torch.Tensor, layout: BankLayout) -> None:
        self._units = units
        self._pages = pages.long()
        self._layout = layout

    def read_header(self) -> Header:
        layout = self._layout
        rows = self._read(0, layout.header_rows)
        words = Header.num_words(layout.bank_size)
        return Header.unpack(rows.flatten().view(torch.int32)[:words])

    def write_header(self, header: Header) -> None:
        layout = self._layout
        rows = torch.zeros(
            layout.header_rows, layout.width, dtype=self._units.dtype, device=self._units.device
        )
        words = rows.flatten().view(torch.int32)
        words[: Header.num_words(layout.bank_size)] = header.pack()
        self._write(torch.arange(layout.header_rows, device=rows.device), rows)

    def read_slots(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._read_pairs(self._layout.slots_start, count)

    def write_slots(self, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._write_pairs(self._layout.slots_start, slots, keys, values)

    def read_staged(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._read_pairs(self._layout.staged_start, count)

    def write_staged(self, rows: torch.Tensor, a: torch.Tensor, o: torch.Tensor) -> None:
        self._write_pairs(self._layout.staged_start, rows, a, o)

    def read_sums(self) -> torch.Tensor:
        layout = self._layout
        rows = self._read(layout.sums_start, layout.sum_rows)
        return rows.flatten().view(torch.float32).view(-1, layout.width)

    def write_sums(self, sums: torch.Tensor) -> None:
        layout = self._layout
        rows = sums.flatten().view(self._units.dtype).view(layout.sum_rows, layout.width)
        start = layout.sums_start
        self._write(torch.arange(start, start + layout.sum_rows, device=sums.device), rows)

    def _read_pairs(self, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = self._read(start, 2 * count).unflatten(0, (count, 2))
        return pairs[:, 0], pairs[:, 1]

    def _write_pairs(
        self, start: int, index: torch.Tensor, first: torch.Tensor, second: torch.Tensor
    ) -> None:
        rows = start + 2 * index[:, None] + torch.arange(2, device=index.device)
        self._write(rows.flatten(), torch.stack([first, second], dim=1).flatten(0, 1))

    def _read(self, start: int, count: int) -> torch.Tensor:
        """Rows [count, width] from ``start`` on, a copy."""
        layout = self._layout
        begin, end = start * layout.parts, (start + count) * layout.parts
        first = begin // layout.units_per_page
        last = -(-end // layout.units_per_page)
        units = self._units[self._pages[first:last]].flatten(0, 1)
        skip = begin - first * layout.units_per_page
        return units[skip : skip + end - begin].reshape(count, layout.width)

    def _write(self, rows: torch.Tensor, data: torch.Tensor) -> None:
        """Store ``data`` [j, width] in the distinct rows [j]."""
        layout = self._layout
        parts = torch.arange(layout.parts, device=rows.device)
        index = (rows[:, None] * layout.parts + parts).flatten()
        page, unit = index // layout.units_per_page, index % layout.units_per_page
        data = data.to(self._units.dtype).reshape(-1, layout.unit_elements)
        self._units[self._pages[page], unit] = data
