"""Banks of several requests in one poisoned pool, driven by the kernels."""

from dataclasses import replace

import numpy as np
import torch

from pacellm_vllm.memory.layout import BankLayout
from pacellm_vllm.memory.pieces import cut_pieces
from pacellm_vllm.memory.store import PagedStore, unit_view
from pacellm_vllm.ops.kernels.bank import DeviceBanks
from pacellm_vllm.ops.kernels.batch import numbers_of, piece_rows, tables_of
from pacellm_vllm.ops.kernels.step import advance_batch
from pacellm_vllm.ops.kernels.top_k import TALLY


def rows_of_pieces(pieces):
    """What the device is told of ``pieces``, but for their tiles."""
    columns = [(p.begin, p.end - p.begin, p.position, p.request, p.pages) for p in pieces]
    return piece_rows(*np.array(columns).T, numbers_of(piece.rules for piece in pieces))


class Pool:
    """``requests`` banks of one layer scattered over a pool of NaN bytes; row 0 of ``table`` on.

    The block table has two rows more than requests: a null one, and a last one of invalid ids.
    Banks that are ``far`` lie 2**31 words and more behind the pool's first, in a pool that takes
    addresses and hardly any memory: it is not filled.
    """

    def __init__(
        self, rules, width, dtype, requests, page_bytes=2048, bank_dtype=None, seed=0, far=False
    ):
        self.rules, self.requests = rules, requests
        self.layout = layout = BankLayout.plan(rules, width, bank_dtype or dtype, page_bytes)
        blocks, stride = 2 * requests * layout.num_pages + 1, page_bytes + 512
        skipped = 0
        if far:
            skipped, stride = 32, 2**28
            self.bytes = torch.empty((skipped + blocks, stride), dtype=torch.uint8)
        else:
            self.bytes = torch.full((blocks, stride), 0xFF, dtype=torch.uint8)
        view = self.bytes[:, None, None, 256 : 256 + page_bytes]
        self.units = unit_view(view, layout, bank_dtype or dtype)
        ids = (
            skipped + 1 + torch.randperm(blocks - 1, generator=torch.Generator().manual_seed(seed))
        )
        held = ids[: requests * layout.num_pages].view(requests, -1)
        self.table = torch.full((requests + 2, layout.num_pages + 3), 1 << 30, dtype=torch.int32)
        self.table[:requests, : layout.num_pages] = held
        self.table[requests] = 0
        cells = self.units.flatten(1)
        self.banks = DeviceBanks(
            cells,
            cells.view(torch.int32),
            width,
            layout.slots_start,
            layout.sums_start,
            layout.staged_start,
        )
        self.tally = torch.zeros(64, TALLY.value, dtype=torch.int64)

    def bank(self, request):
        """The plain path's view of one bank."""
        pages = self.table[request, : self.layout.num_pages].tolist()
        return PagedStore(self.units, pages, self.layout)

    def pieces(self, positions, counts, mine=None):
        """One step's pieces: ``counts`` [i] tokens of request i, the first at ``positions`` [i]."""
        starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
        lengths = [p + n for p, n in zip(positions, counts, strict=True)]
        pieces = cut_pieces(starts, lengths, self.layout, self.rules)
        return [replace(p, rules=mine[p.request]) for p in pieces] if mine else pieces

    def rounds(self, pieces):
        """The j-th pieces of all requests, for each j."""
        turns = [
            sum(other.request == p.request for other in pieces[:i]) for i, p in enumerate(pieces)
        ]
        found = []
        for turn in range(max(turns, default=-1) + 1):
            some = [piece for piece, its in zip(pieces, turns, strict=True) if its == turn]
            tables = tables_of(rows_of_pieces(some), self.rules.segment_size)
            on_device = map(torch.from_numpy, (tables.pieces, tables.tiles))
            found.append(tables.on(*on_device, self.table))
        return found

    def run(self, a, pieces, reduce=None):
        """Outputs of one step; what no piece wrote is NaN."""
        out = torch.full_like(a, float("nan"))
        advance_batch(a, out, self.banks, self.rounds(pieces), self.rules, self.tally, reduce)
        return out

    def drive(self, streams, steps, mine=None):
        """Run each request's ``streams`` [i]; ``steps`` has a list of token counts a step."""
        at, outputs = [0] * len(streams), [[] for _ in streams]
        for counts in steps:
            a = torch.cat([s[p : p + n] for s, p, n in zip(streams, at, counts, strict=True)])
            out = self.run(a, self.pieces(at, counts, mine))
            for i, part in enumerate(out.split(counts)):
                outputs[i].append(part)
            at = [p + n for p, n in zip(at, counts, strict=True)]
        return [torch.cat(parts) for parts in outputs]
