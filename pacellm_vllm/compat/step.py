"""What a layer can know of the step that it runs in."""

from __future__ import annotations

from typing import Any

import torch


def layer_in_step(name: str) -> Any:
    """The layer ``name`` of the model whose forward is running.

    Symptom: a custom operator is handed tensors and names; vLLM's own find their layers in the
    forward context.
    Can go when operators can be methods of layers.
    """
    from vllm.forward_context import get_forward_context

    return get_forward_context().no_compile_layers[name]


def metadata_of_step() -> Any:
    """What metadata builders have made of the running step: by layer, or None in a profiling run.

    Symptom: vLLM hands it to nobody; attention reads the forward context too, whose type promises
    lists as well.
    Can go when a layer is called with its metadata.
    """
    from vllm.forward_context import get_forward_context

    return get_forward_context().attn_metadata


def in_graph_piece() -> bool:
    """Whether what runs is being captured as a piece of a model, by the stream of this device.

    Symptom: vLLM cuts models at operators that it is told of, but not within other operators, and
    what is inside one is captured with the metadata of a step that has no requests.
    Can go when an operator within another one is cut out as well.
    """
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import get_forward_context

    mode = get_forward_context().cudagraph_runtime_mode
    return mode == CUDAGraphMode.PIECEWISE and torch.cuda.is_current_stream_capturing()


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
