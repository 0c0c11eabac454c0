"""advance_batch: what ``ops/update.py: advance`` does, for all requests of a step on a device."""

from collections.abc import Sequence

import torch

from pacellm_vllm.ops.kernels.bank import DeviceBanks
from pacellm_vllm.ops.kernels.batch import DeviceRound
from pacellm_vllm.ops.kernels.blend import blend
from pacellm_vllm.ops.kernels.bookkeeping import bookkeeping
from pacellm_vllm.ops.kernels.similarity import similarity
from pacellm_vllm.ops.kernels.top_k import top_k
from pacellm_vllm.ops.lookup import Reduce
from pacellm_vllm.ops.rules import MemoryRules


def advance_batch(
    a: torch.Tensor,
    out: torch.Tensor,
    banks: DeviceBanks,
    rounds: Sequence[DeviceRound],
    rules: MemoryRules,
    tally: torch.Tensor,
    reduce: Reduce | None = None,
) -> None:
    """Run a step's tokens through their banks, committing where a segment ends.

    ``a`` and ``out`` [tokens, width], contiguous, of one float dtype; tokens in no round are left
    as they are in ``out``. ``rules`` are the engine's, of which ``alpha``, ``noise`` and the
    thresholds are taken from each piece instead. ``tally`` counts, see ``top_k``. ``reduce`` sums a
    buffer over tensor parallel ranks. Waits for nothing.
    """
    for now in rounds:
        if now.copies is not None:
            sources, targets = now.copies
            banks.cells.index_copy_(0, targets, banks.cells[sources])
        found = similarity(a, banks, now, rules)
        if reduce is not None:
            found = found.reduced(reduce)
        findings = top_k(len(a), found, banks, now, rules, tally)
        plans = bookkeeping(found, findings, banks, now, rules, tally)
        blend(a, out, banks, now, rules, findings, plans)
