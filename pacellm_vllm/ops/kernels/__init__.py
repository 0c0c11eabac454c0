"""Enhance and Update as Triton kernels: what ``ops/update.py`` says, for a whole batch on a device.

Nothing is read back on the host: which slots are valid, what a token decides and whether a segment
ends is read from the bank's header on the device. Decode steps have fixed shapes, so CUDA graphs
can hold them.

``batch``        the device's view of a step: pieces, tiles, requests' settings
``bank``         where a bank lies: pages, header words, and the reading of both
``similarity``   products of tokens and keys, and squared norms of tokens, split over D
``top_k``        cosines, the k most and least similar slots, the token's kind and weights
``bookkeeping``  of a piece: counters, targets of low tokens, the plan of a commit, header
``blend``        outputs, low tokens' rows, sums, and the commit where a tile ends its piece
``commit``       the end of a piece of several tiles: sums, means, merges and replacements
``step``         ``advance_batch``, which launches them

A *piece* is tokens of one request in one segment; a *tile* is up to 32 of its tokens, cut at
multiples of 32 positions of the segment, as ``ops/sums.py`` cuts. Prefill and decode are the same
kernels, and what a token's numbers are summed over depends on D alone, so bits do not depend on how
a prompt is cut. Floating-point sums use no atomics.

Header ``squares`` are not written by a commit, where every block of D is a program of its own: the
piece that begins a segment finds them in ``similarity``, and ``bookkeeping`` keeps them for the
rest of it. Under tensor parallelism they are summed over ranks.
"""
