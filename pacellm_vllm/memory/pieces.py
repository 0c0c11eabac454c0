"""Piece: tokens of one request in one segment, which a step's batch is cut into."""

from collections.abc import Sequence
from dataclasses import dataclass

from pacellm_vllm.memory.layout import BankLayout
from pacellm_vllm.ops.rules import MemoryRules
from pacellm_vllm.request import RequestSettings


@dataclass(frozen=True)
class Piece:
    """Tokens ``begin`` .. ``end - 1`` of the batch: one request's, in one segment.

    ``position`` is the first one's place in its request, ``pages`` how many of the request's
    pages the piece can reach, ``rules`` the engine's with what the request has set for itself.
    """

    request: int
    begin: int
    end: int
    position: int
    pages: int
    rules: MemoryRules


def cut_pieces(
    starts: list[int],
    lengths: list[int],
    layout: BankLayout,
    rules: MemoryRules,
    settings: Sequence[RequestSettings | None] = (),
) -> list[Piece]:
    """Cut a batch at request borders and segment ends.

    ``starts`` [requests + 1] are offsets into the batch, ``lengths`` [requests] each request's
    tokens after this step, ``settings`` what the first of them have set. Requests without tokens
    give no piece.
    """
    size = layout.segment_size
    pieces = []
    for request, length in enumerate(lengths):
        begin, end = starts[request], starts[request + 1]
        position = length - (end - begin)
        own = settings[request] if request < len(settings) else None
        mine = own.applied_to(rules) if own is not None else rules
        while begin < end:
            n = min(end - begin, size - position % size)
            pages = layout.pages_for(position + n)
            pieces.append(Piece(request, begin, begin + n, position, pages, mine))
            begin, position = begin + n, position + n
    return pieces
