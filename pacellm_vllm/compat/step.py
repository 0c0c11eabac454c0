"""What a layer can know of the step that it runs in."""

from __future__ import annotations

import torch


def rows_of_requests(rows: int) -> torch.Tensor | None:
    """Which of a step's rows are tokens of requests, [rows] bool on the device, and not padding.

    None in profiling runs. Nothing is read on the host, and graphs see each step's own rows.
    Symptom: vLLM pads batches for its graphs and tells layers outside of attention nothing about
    it; where keys and values go is what it marks padding in, with -1.
    Can go when the forward context says how many tokens a step has, on the device.
    """
    from vllm.forward_context import get_forward_context

    mapping = get_forward_context().slot_mapping
    if not isinstance(mapping, dict):
        return None
    slots = (slots for name, slots in mapping.items() if not name.endswith(".memory"))
    found = next(slots, None)
    return None if found is None else found[:rows] >= 0
