"""PlainStep: what the plain PyTorch ops do in one step, worked out once for all memory layers."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from pacellm_vllm.memory.drafts import look_up_drafts, write_accepted
from pacellm_vllm.memory.layout import BankLayout
from pacellm_vllm.memory.pieces import Piece
from pacellm_vllm.memory.store import PagedStore
from pacellm_vllm.ops.lookup import Reduce
from pacellm_vllm.ops.rules import MemoryRules
from pacellm_vllm.ops.steps import advance_steps
from pacellm_vllm.ops.update import Progress, advance


@dataclass(frozen=True)
class PlacedPiece:
    """A ``Piece`` and where its request's bank lies: ``pages`` are block ids, as far as it reaches.

    ``copy`` are pages that take what the first as many of ``pages`` hold before the tokens change
    it, none where there is no copy. ``asked`` is the request's key in the ``Journal``.
    """

    tokens: slice
    position: int
    pages: list[int]
    rules: MemoryRules
    copy: list[int]
    asked: str | None = None


# What came of a piece's tokens, and the bank they were of.
Done = tuple[PlacedPiece, Progress, PagedStore]


@dataclass
class PlainStep:
    """``idle`` tokens have no bank and pass through, as does padding behind ``num_tokens``.

    ``asked`` has for tokens of requests in the ``Journal`` its key and the first one's position,
    ``asked_idle`` how many of them have no bank.

    ``pieces`` lie in one segment each; ``singles`` are those of one token and of one request each,
    at ``single_tokens`` in the batch: a slice where they lie side by side, else [R] int64. With
    speculative decoding, ``first_pieces`` has every request's first token, before which its bank
    catches up with what was accepted, and ``drafts`` the tokens that may be rejected.
    """

    first_pieces: list[PlacedPiece] = field(default_factory=list)
    drafts: list[PlacedPiece] = field(default_factory=list)
    pieces: list[PlacedPiece] = field(default_factory=list)
    singles: list[PlacedPiece] = field(default_factory=list)
    single_tokens: slice | torch.Tensor = field(default_factory=lambda: slice(0))
    idle: list[slice] = field(default_factory=list)
    asked_idle: list[tuple[str, int, int]] = field(default_factory=list)
    asked: list[tuple[str, int, slice]] = field(default_factory=list)
    num_tokens: int = 0

    @classmethod
    def of(
        cls,
        block_table: torch.Tensor,
        pieces: Sequence[Piece],
        speculative: bool = False,
        asked: Mapping[int, str] | None = None,
    ) -> "PlainStep":
        """``block_table`` [requests, >= pages] int of the pieces' requests, on any device.

        ``asked`` are the ``Journal`` keys of requests that have one.
        """
        asked = asked or {}
        step = cls(num_tokens=max((piece.end for piece in pieces), default=0))
        if not pieces:
            return step
        # The one host read of a step.
        reach = max(max(piece.pages, piece.copy.stop) for piece in pieces)
        table = block_table[:, :reach].tolist()
        pieces_of = Counter(piece.request for piece in pieces)
        seen = set()
        for piece in pieces:
            tokens = slice(piece.begin, piece.end)
            blocks = table[piece.request]
            pages, copy = blocks[: piece.pages], blocks[piece.copy.start : piece.copy.stop]
            key = asked.get(piece.request)
            copy = copy if all(copy) else []
            placed = PlacedPiece(tokens, piece.position, pages, piece.rules, copy, key)
            if key:
                step.asked.append((key, piece.position, tokens))
            # Warm-up, padding and requests without memory hold vLLM's null block, nobody's bank.
            if not all(pages):
                step.idle.append(tokens)
                if key:
                    step.asked_idle.append((key, piece.position, piece.end - piece.begin))
                continue
            if speculative and piece.request not in seen:
                seen.add(piece.request)
                step.first_pieces.append(placed)
            if not piece.certain:
                step.drafts.append(placed)
            # One token of many requests is a decode step; other pieces have their turn.
            elif piece.end - piece.begin == 1 and pieces_of[piece.request] == 1:
                step.singles.append(placed)
            else:
                step.pieces.append(placed)
        if step.singles:
            at = [piece.tokens.start for piece in step.singles]
            together = at[-1] - at[0] + 1 == len(at)
            step.single_tokens = slice(at[0], at[-1] + 1) if together else torch.tensor(at)
        return step

    def run(
        self,
        units: torch.Tensor,
        layout: BankLayout,
        a: torch.Tensor,
        out: torch.Tensor,
        reduce: Reduce | None,
    ) -> Iterator[Done]:
        """Advance every request's bank in ``units`` (see ``store.unit_view``) of one layer.

        ``a`` and ``out`` [>= num_tokens, width]; all of ``out`` is written. Yields each piece when
        its bank was advanced, and a request's first piece, which no ``Journal`` asks for then, for
        what was accepted before it.
        """
        out[self.num_tokens :] = a[self.num_tokens :]
        for tokens in self.idle:
            out[tokens] = a[tokens]
        for piece in self.first_pieces:
            store = PagedStore(units, piece.pages, layout)
            for progress in write_accepted(store, piece.position, piece.rules, reduce):
                yield piece, progress, store
        for piece in self.pieces:
            if piece.copy:
                units[piece.copy] = units[piece.pages[: len(piece.copy)]]
            store = PagedStore(units, piece.pages, layout)
            tokens = piece.tokens
            _, progress = advance(
                store, a[tokens], piece.position, piece.rules, reduce, out[tokens]
            )
            yield piece, progress, store
        for piece in self.drafts:
            store = PagedStore(units, piece.pages, layout)
            tokens = piece.tokens
            look_up_drafts(store, a[tokens], piece.position, piece.rules, reduce, out[tokens])
        if not self.singles:
            return
        at = self.single_tokens
        stores = [PagedStore(units, piece.pages, layout) for piece in self.singles]
        positions = [piece.position for piece in self.singles]
        rules = [piece.rules for piece in self.singles]
        # A slice gives a view of out, which is written in place; an index gives a copy.
        in_place = out[at] if isinstance(at, slice) else None
        o, progresses = advance_steps(stores, a[at], positions, rules, reduce, in_place)
        if in_place is None:
            out[at] = o
        yield from zip(self.singles, progresses, stores, strict=True)
