"""DeviceStep: what the kernels do in one step, its tables copied once for all memory layers.

Imports Triton, so only what runs on a device that has it may import this.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from pacellm_vllm.memory.counts import MemoryCounts
from pacellm_vllm.memory.layout import BankLayout
from pacellm_vllm.memory.snapshots import SnapshotGrid, takes_copies
from pacellm_vllm.memory.store import unit_view
from pacellm_vllm.ops.kernels.bank import DeviceBanks
from pacellm_vllm.ops.kernels.batch import (
    COLUMNS,
    POSITION,
    REQUEST,
    TILE,
    TILE_COLUMNS,
    DeviceRound,
    Tables,
    numbers_of,
    piece_rows,
    single_tables,
    tables_of,
)
from pacellm_vllm.ops.kernels.step import advance_batch
from pacellm_vllm.ops.kernels.top_k import (
    ALL_LOWS,
    ALL_MIDS,
    COMMITS,
    HIGHS,
    LAST_ROUND,
    LAST_VALID,
    MOST_VALID,
    TALLY,
)
from pacellm_vllm.ops.lookup import Reduce
from pacellm_vllm.ops.rules import MemoryRules


@dataclass
class DeviceStep:
    """``rounds`` (see ``ops/kernels/batch.py``) over the step's first ``num_tokens`` tokens."""

    rounds: list[DeviceRound]
    num_tokens: int

    def run(
        self,
        kv_cache: torch.Tensor,
        layout: BankLayout,
        dtype: torch.dtype,
        rules: MemoryRules,
        a: torch.Tensor,
        out: torch.Tensor,
        tally: torch.Tensor,
        reduce: Reduce | None,
    ) -> None:
        """Advance every request's bank in one layer's ``kv_cache``, of rows stored as ``dtype``.

        ``a`` and ``out`` [>= num_tokens, width]; all of ``out`` is written. The host waits for
        nothing, and a CUDA graph may hold a decode step.
        """

        cells = unit_view(kv_cache, layout, dtype).flatten(1)
        banks = DeviceBanks(
            cells=cells,
            words=cells.view(torch.int32),
            width=layout.width,
            slots_start=layout.slots_start,
            sums_start=layout.sums_start,
            staged_start=layout.staged_start,
        )
        advance_batch(a.contiguous(), out, banks, self.rounds, rules, tally, reduce)
        if self.num_tokens < len(a):
            out[self.num_tokens :] = a[self.num_tokens :]


class DeviceTables:
    """A step's tables in buffers that stay where they are, as CUDA graphs need.

    ``max_requests`` and ``max_tokens`` bound a step. Copies do not wait: what they read is pinned
    and not written again, and what runs before on the stream has read what they overwrite.
    """

    def __init__(
        self,
        layout: BankLayout,
        rules: MemoryRules,
        max_requests: int,
        max_tokens: int,
        device: torch.device,
    ) -> None:
        assert not layout.drafts, "drafts are refused at start-up where kernels run"
        # A request's tokens touch one segment, or one tile, more than they would fill.
        most = min(max_tokens, max_tokens // layout.segment_size + 2 * max_requests)
        tiles = min(max_tokens, max_tokens // TILE.value + 2 * most)
        self._pieces = torch.zeros(most, COLUMNS.value, dtype=torch.int32, device=device)
        self._tiles = torch.zeros(tiles, TILE_COLUMNS.value, dtype=torch.int32, device=device)
        self._layout = layout
        self._rules = rules
        self._numbers = numbers_of([rules])
        self._pages = np.array(
            [layout.pages_for(n) for n in range(min(layout.bank_size, layout.segment_size) + 1)]
        )

    def of_singles(
        self, table: torch.Tensor, lengths: np.ndarray, own: Mapping[int, MemoryRules]
    ) -> DeviceStep:
        """A decode step: token i is row i's only one, ``lengths`` [R] with it counted.

        Rows of length 0 are padding. ``own`` holds the rules of rows that have some of their own.
        """
        positions = np.maximum(lengths - 1, 0)
        pages = np.where(lengths > 0, self._pages_for(lengths), 0)
        tables = single_tables(positions, pages, self._numbers_for(len(lengths), own))
        return DeviceStep(self._on_device([tables], table), len(lengths))

    def of_batch(
        self,
        table: torch.Tensor,
        starts: np.ndarray,
        lengths: np.ndarray,
        own: Mapping[int, MemoryRules],
        grid: SnapshotGrid | None = None,
    ) -> DeviceStep:
        """Any step, cut as ``cut_pieces`` does; ``table`` [requests, >= pages] int32 block ids.

        ``starts`` [requests + 1] are offsets into the batch, ``lengths`` [requests] with its tokens
        counted, ``grid`` where banks are copied, if anywhere.
        """
        size = self._layout.segment_size
        counts = np.diff(starts)
        first = lengths - counts
        segment = first // size
        turns = np.where(counts > 0, (lengths - 1) // size - segment + 1, 0)
        request = np.repeat(np.arange(len(counts)), turns)
        turn = np.arange(len(request)) - (turns.cumsum() - turns)[request]
        begin = np.maximum(first[request], (segment[request] + turn) * size)
        end = np.minimum(lengths[request], (segment[request] + turn + 1) * size)
        rows = piece_rows(
            begin + (starts[:-1] - first)[request],
            end - begin,
            begin,
            request,
            self._pages_for(end),
            self._numbers_for(len(counts), own)[request],
        )
        # A segment ends before the next one of its request begins.
        some = [rows[turn == i] for i in range(turns.max(initial=0))]
        rounds = self._on_device([tables_of(pieces, size) for pieces in some], table)
        if grid is not None:
            rounds = [
                replace(one, copies=_snapshot_copies(pieces, counts, grid, table))
                for one, pieces in zip(rounds, some, strict=True)
            ]
        return DeviceStep(rounds, int(starts[-1]))

    def _pages_for(self, lengths: np.ndarray) -> np.ndarray:
        """``BankLayout.pages_for`` of each."""
        few = self._pages[np.minimum(lengths, len(self._pages) - 1)]
        return np.where(lengths > self._layout.segment_size, self._layout.num_pages, few)

    def _numbers_for(self, requests: int, own: Mapping[int, MemoryRules]) -> np.ndarray:
        """``numbers_of`` each request's rules."""
        numbers = np.repeat(self._numbers, requests, axis=0)
        if own:
            numbers[list(own)] = numbers_of(own.values())
        return numbers

    def _on_device(self, rounds: Sequence[Tables], table: torch.Tensor) -> list[DeviceRound]:
        """The rounds with their tables on the device."""
        pieces = _upload([one.pieces for one in rounds], self._pieces)
        tiles = _upload([one.tiles for one in rounds], self._tiles)
        return [
            one.on(pieces_now, tiles_now, table)
            for one, pieces_now, tiles_now in zip(rounds, pieces, tiles, strict=True)
        ]


def _snapshot_copies(
    pieces: np.ndarray, counts: np.ndarray, grid: SnapshotGrid, table: torch.Tensor
) -> torch.Tensor | None:
    """Blocks [2, n] int64 that hold banks, and those that take a copy, on the device.

    Where there is no bank, or no copy of it is wanted, a block is copied to itself.
    """
    begun = pieces[pieces[:, POSITION] % grid.interval == 0]
    positions, requests = begun[:, POSITION].tolist(), begun[:, REQUEST].tolist()
    where = [
        (request, source, target)
        for position, request in zip(positions, requests, strict=True)
        if takes_copies(counts[request])
        for source, target in enumerate(grid.columns(position))
    ]
    if not where:
        return None
    host = torch.tensor(where, dtype=torch.int64)
    if table.device.type == "cuda":
        host = host.pin_memory()
    rows, sources, targets = host.to(table.device, non_blocking=True).unbind(1)
    held, wanted = table[rows, sources].long(), table[rows, targets].long()
    return torch.stack([held, torch.where((held == 0) | (wanted == 0), held, wanted)])


def _upload(tables: Sequence[np.ndarray], buffer: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Views of ``buffer`` that hold the ``tables``, one after the other."""
    counts = [len(table) for table in tables]
    assert sum(counts) <= len(buffer), (counts, buffer.shape)
    if not tables:
        return ()
    host = torch.from_numpy(np.concatenate(tables))
    if buffer.device.type == "cuda":
        host = host.pin_memory()
    held = buffer[: sum(counts)]
    held.copy_(host, non_blocking=True)
    return held.split(counts)


def new_tally(requests: int, device: torch.device) -> torch.Tensor:
    """What the kernels count in, for steps of at most ``requests``; see ``kernels/top_k.py``."""
    return torch.zeros(requests, TALLY.value, dtype=torch.int64, device=device)


def counts_of(tally: torch.Tensor) -> MemoryCounts:
    """The counts so far; waits for the device."""
    rows = tally.tolist()
    kinds = (HIGHS, ALL_MIDS, ALL_LOWS, COMMITS)
    high, mid, low, commits = (sum(row[column] for row in rows) for column in kinds)
    # Of commits in one round the last request's counts, as it does in a batch on the plain path.
    last = max(range(len(rows)), key=lambda i: (rows[i][LAST_ROUND], i))
    return MemoryCounts(
        high=high,
        mid=mid,
        low=low,
        commits=commits,
        slots_last=rows[last][LAST_VALID],
        slots_peak=max(row[MOST_VALID] for row in rows),
    )
