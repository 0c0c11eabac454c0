"""PagedStore: one bank through its request's pages; PagedBanks: one bank of each of many."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

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

    def copy(self) -> "PagedStore":
        """The same bank in memory of its own."""
        pages = torch.arange(len(self._pages), device=self._pages.device)
        return PagedStore(self._units[self._pages], pages, self._layout)

    def read_tail_position(self) -> int:
        """What was last written; undefined before that, as all else."""
        row = self._read(self._layout.tail_start, 1)
        return int(row.flatten().view(torch.int32)[0])

    def write_tail_position(self, position: int) -> None:
        layout = self._layout
        row = torch.zeros(1, layout.width, dtype=self._units.dtype, device=self._units.device)
        row.flatten().view(torch.int32)[0] = position
        self._write(torch.tensor([layout.tail_start], device=row.device), row)

    def read_tail(self, count: int) -> torch.Tensor:
        """The first rows [count, D] of the tail."""
        return self._read(self._layout.tail_start + 1, count)

    def write_tail(self, a: torch.Tensor) -> None:
        start = self._layout.tail_start + 1
        self._write(torch.arange(start, start + len(a), device=a.device), a)

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


class KeyRun(NamedTuple):
    """Whole keys in one page, from ``slot`` on; or, where ``keys`` is 0, a share of one key.

    ``page`` counts in claiming order, ``start`` is in elements of the page; a share holds elements
    ``begin`` .. ``end - 1`` of its key.
    """

    slot: int
    keys: int
    page: int
    start: int
    begin: int
    end: int


@lru_cache(maxsize=16)
def key_runs(layout: BankLayout) -> tuple[KeyRun, ...]:
    """Where the keys of a full bank lie, in slot order."""
    page_elements = layout.units_per_page * layout.unit_elements
    runs: list[KeyRun] = []
    for slot in range(layout.bank_size):
        begin = (layout.slots_start + 2 * slot) * layout.width
        done = 0
        while done < layout.width:
            page, start = divmod(begin + done, page_elements)
            n = min(layout.width - done, page_elements - start)
            last = runs[-1] if runs else None
            if n < layout.width:
                runs.append(KeyRun(slot, 0, page, start, done, done + n))
            elif last is not None and last.keys and last.page == page:
                runs[-1] = last._replace(keys=last.keys + 1)
            else:
                runs.append(KeyRun(slot, 1, page, start, 0, n))
            done += n
    return tuple(runs)


class PagedBanks:
    """``ops.steps.Banks`` over ``units`` (see :func:`unit_view`) and ``pages`` [R, P] int64.

    Keys are read in place. Everything else is a few rows a bank, and copied.
    """

    def __init__(self, units: torch.Tensor, pages: torch.Tensor, layout: BankLayout) -> None:
        self._units = units
        self._pages = pages
        self._layout = layout
        self._all = torch.arange(len(pages), device=pages.device)

    def bank(self, index: int) -> PagedStore:
        return PagedStore(self._units, self._pages[index], self._layout)

    def read_words(self) -> torch.Tensor:
        layout = self._layout
        rows = self._read(self._all, self._range(0, layout.header_rows).expand(len(self._all), -1))
        words = Header.num_words(layout.bank_size)
        return rows.flatten(1).view(torch.int32)[:, :words].contiguous()

    def write_words(self, words: torch.Tensor) -> None:
        layout = self._layout
        rows = words.new_zeros(
            len(words), layout.header_rows * layout.width * layout.itemsize // words.itemsize
        )
        rows[:, : words.shape[1]] = words
        index = self._range(0, layout.header_rows).expand(len(words), -1)
        self._write(self._all, index, rows.view(self._units.dtype))

    def products(self, a: torch.Tensor, counts: Sequence[int], out: torch.Tensor) -> None:
        width = self._layout.width
        flat = self._units.flatten(1)
        runs = key_runs(self._layout)
        for row, pages, count, products in zip(a, self._pages.tolist(), counts, out, strict=True):
            for run in runs:
                if run.slot >= count:
                    break
                page = flat[pages[run.page]]
                if run.keys:
                    n = min(run.keys, count - run.slot)
                    keys = page.as_strided(
                        (n, width), (2 * width, 1), page.storage_offset() + run.start
                    )
                    torch.mv(keys.float(), row, out=products[run.slot : run.slot + n])
                else:
                    part = page[run.start : run.start + run.end - run.begin].float()
                    part_product = torch.dot(part, row[run.begin : run.end])
                    if run.begin:
                        products[run.slot] += part_product
                    else:
                        products[run.slot] = part_product

    def read_values(self, which: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        return self._read(which, self._layout.slots_start + 2 * slots + 1)

    def write_slots(
        self, which: torch.Tensor, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        self._write_pairs(self._layout.slots_start, which, slots, keys, values)

    def write_staged(
        self, which: torch.Tensor, rows: torch.Tensor, a: torch.Tensor, o: torch.Tensor
    ) -> None:
        self._write_pairs(self._layout.staged_start, which, rows, a, o)

    def read_sums(self, which: torch.Tensor) -> torch.Tensor:
        layout = self._layout
        index = self._range(layout.sums_start, layout.sum_rows).expand(len(which), -1)
        rows = self._read(which, index).flatten(1)
        return rows.view(torch.float32).unflatten(1, (-1, layout.width))

    def write_sums(self, which: torch.Tensor, sums: torch.Tensor) -> None:
        layout = self._layout
        index = self._range(layout.sums_start, layout.sum_rows).expand(len(which), -1)
        self._write(which, index, sums.flatten(1).view(self._units.dtype))

    def _range(self, start: int, count: int) -> torch.Tensor:
        return torch.arange(start, start + count, device=self._pages.device)

    def _write_pairs(
        self,
        start: int,
        which: torch.Tensor,
        index: torch.Tensor,
        first: torch.Tensor,
        second: torch.Tensor,
    ) -> None:
        rows = start + 2 * index[:, None] + self._range(0, 2)
        self._write(which, rows, torch.stack([first, second], dim=1))

    def _locate(self, which: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks and units, [j, k * parts] each, of the banks' ``rows`` [j, k]."""
        layout = self._layout
        index = (rows[..., None] * layout.parts + self._range(0, layout.parts)).flatten(1)
        pages = index // layout.units_per_page
        return self._pages[which[:, None], pages], index % layout.units_per_page

    def _read(self, which: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """[j, k, width] for ``rows`` [j, k], a copy."""
        units = self._units[self._locate(which, rows)]
        return units.reshape(*rows.shape, self._layout.width)

    def _write(self, which: torch.Tensor, rows: torch.Tensor, data: torch.Tensor) -> None:
        """Store ``data`` (k rows for each bank) in the distinct ``rows`` [j, k]."""
        blocks, units = self._locate(which, rows)
        data = data.to(self._units.dtype)
        self._units[blocks, units] = data.reshape(*blocks.shape, self._layout.unit_elements)
