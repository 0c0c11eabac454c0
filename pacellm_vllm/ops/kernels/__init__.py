"""Enhance and Update as Triton kernels: what ``ops/update.py`` says, for a whole batch on a device.

Nothing is read back on the host: which slots are valid, what a token decides and whether a segment
ends is read from the bank's header on the device. Decode steps have fixed shapes, so CUDA graphs
can hold them.

``batch``     the device's view of a step: pieces, tiles, requests' settings
``bank``      where a bank lies: pages, header words, and the reading of both
``products``  products of tokens and keys, and squared norms of tokens, split over D
``rank``      cosines, the k most and least similar slots, the token's kind and weights
``book``      a piece's bookkeeping: counters, targets of low tokens, the plan of a commit, header
``apply``     outputs, low tokens' rows, sums, merges and replacements, each block of D on its own
``close``     the last two of a piece of several tiles
``step``      ``advance_batch``, which launches them

A *piece* is tokens of one request in one segment; a *tile* is up to 32 of its tokens, cut at
multiples of 32 positions of the segment, as ``ops/sums.py`` cuts. Prefill and decode are the same
kernels, and what a token's numbers are summed over depends on D alone, so bits do not depend on how
a prompt is cut. Floating-point sums use no atomics.

Header ``squares`` are not written by a commit, where every block of D is a program of its own: the
piece that begins a segment finds them in ``products``, and ``book`` keeps them for the rest of it.
Under tensor parallelism they are summed over ranks.
"""
