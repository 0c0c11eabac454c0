"""Piece: tokens of one request, in one segment if certain, which a step's batch is cut into."""

from collections.abc import Mapping
from dataclasses import dataclass

from pacellm_vllm.memory.layout import BankLayout
from pacellm_vllm.memory.snapshots import SnapshotGrid, takes_copies
from pacellm_vllm.ops.rules import MemoryRules


@dataclass(frozen=True)
class Piece:
    """Tokens ``begin`` .. ``end - 1`` of the batch: one request's.

    ``position`` is the first one's place in its request, ``pages`` how many of the request's
    pages the piece can reach, ``rules`` the engine's with what the request has set for itself.
    ``certain`` tokens lie in one segment; others may be rejected drafts, and are not cut.
    ``copy`` are the columns of the block table whose pages take a copy of the bank before the
    piece changes it.
    """

    request: int
    begin: int
    end: int
    position: int
    pages: int
    rules: MemoryRules
    certain: bool = True
    copy: range = range(0)


def cut_pieces(
    starts: list[int],
    lengths: list[int],
    layout: BankLayout,
    rules: MemoryRules,
    own: Mapping[int, MemoryRules] | None = None,
    grid: SnapshotGrid | None = None,
) -> list[Piece]:
    """Cut a batch at request borders and segment ends.

    ``starts`` [requests + 1] are offsets into the batch, ``lengths`` [requests] each request's
    tokens after this step, ``own`` the rules of those that have some of their own, ``grid`` where
    banks are copied, if anywhere. Requests without tokens give no piece.

    Drafts may be among the tokens of a step that is no longer than one and ``layout.drafts`` more,
    in a prompt too, whose last token vLLM pads with drafts that it rejects.
    """
    size = layout.segment_size
    pieces = []
    for request, length in enumerate(lengths):
        begin, end = starts[request], starts[request + 1]
        position = length - (end - begin)
        mine = own.get(request, rules) if own else rules
        has_drafts = 1 < end - begin <= 1 + layout.drafts
        copies = grid if grid and takes_copies(end - begin, layout.drafts) else None
        last, end = end, begin + 1 if has_drafts else end
        while begin < end:
            n = min(end - begin, size - position % size)
            pages = layout.pages_for(position + n)
            copy = copies.columns(position) if copies else range(0)
            pieces.append(Piece(request, begin, begin + n, position, pages, mine, copy=copy))
            begin, position = begin + n, position + n
        if has_drafts:
            pages = layout.pages_for(length)
            pieces.append(Piece(request, begin, last, position, pages, mine, certain=False))
    return pieces
