"""BankRecorder: the banks of one request read out of its pages, in the worker that owns them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig

from pacellm_vllm.memory.backend import BankMetadata, Piece
from pacellm_vllm.memory.layer import PaceMemory
from pacellm_vllm.memory.store import PagedStore, unit_view

RECORD_METHOD = "pacellm_memory_record"
RECORDED_METHOD = "pacellm_memory_recorded"


class BankRecording:
    """Two methods of a worker: before a request and after it.

    What they return is plain numbers, lists and bytes, which any vLLM executor can carry.
    """

    vllm_config: VllmConfig
    get_model: Callable[[], nn.Module]

    def pacellm_memory_record(self) -> None:
        """Record the next request, which must run alone, in every layer with memory."""
        layers = self.vllm_config.compilation_config.static_forward_context.values()
        self._pacellm_recorders = [
            BankRecorder(layer) for layer in layers if isinstance(layer, PaceMemory)
        ]

    @torch.inference_mode()
    def pacellm_memory_recorded(self, words: int) -> dict[int, dict[str, Any]]:
        """Stop recording. By layer index: ``width``, the ``commits``, and fp32 bytes of ``keys``
        [slots, width] and of ``current`` [tokens, width], each with the ids of the ``words``
        tokens that every row speaks for.
        """
        recorded = {}
        for recorder in self._pacellm_recorders:
            recorder.remove()
            found = {"width": recorder.layer.width, "commits": recorder.commits}
            for name, rows in (("keys", recorder.keys), ("current", recorder.current)):
                found[name] = rows.contiguous().numpy().tobytes()
                found[f"{name}_words"] = decode(self.get_model(), recorder.layer, rows, words)
            recorded[recorder.layer.index] = found
        self._pacellm_recorders = []
        return recorded


class BankRecorder:
    """Stands before one layer's memory and notes every commit of the one request that runs.

    ``commits`` has an entry for each segment (see :meth:`_read_commit`); ``keys`` [slots, D] fp32
    are those of the last commit, ``current`` [tokens, D] fp32 the activations of the segment that
    was read last.
    """

    def __init__(self, layer: PaceMemory) -> None:
        self.layer = layer
        self.commits: list[dict[str, Any]] = []
        self.keys = torch.zeros(0, layer.width)
        self._pieces: list[torch.Tensor] = []
        self._run = layer.run
        layer.run = self.run  # type: ignore[method-assign]

    def remove(self) -> None:
        self.layer.run = self._run  # type: ignore[method-assign]

    @property
    def current(self) -> torch.Tensor:
        return torch.cat(self._pieces)

    def run(self, a: torch.Tensor, out: torch.Tensor, metadata: BankMetadata) -> None:
        self._run(a, out, metadata)
        size = self.layer.rules.segment_size
        pieces = [p for p in metadata.pieces if metadata.block_table[p.request, : p.pages].all()]
        # The next segment's tokens go into free slots at once, but a second commit would hide one.
        if len(pieces) > 1:
            raise RuntimeError(
                "pacellm: a recorded request must run alone and a segment at a time; set "
                "max_num_seqs to 1 and max_num_batched_tokens to segment_size."
            )
        for piece in pieces:
            if piece.position % size == 0:
                self._pieces = []
            self._pieces.append(a[piece.begin : piece.end].float().cpu())
            if (piece.position + piece.end - piece.begin) % size == 0:
                self.commits.append(self._read_commit(piece, metadata, a.dtype))

    def _read_commit(
        self, piece: Piece, metadata: BankMetadata, dtype: torch.dtype
    ) -> dict[str, Any]:
        """What the segment's tokens asked for, what became of the slots, and the bank after it.

        ``high``, ``mid``, ``low`` count tokens, ``merged``, ``filled``, ``replaced`` slots,
        ``dropped`` low tokens that found none open; ``usage`` has an entry per slot, ``cosine`` is
        the mean over pairs of keys (see :func:`mean_cosine`).
        """
        layer, layout = self.layer, self.layer.spec.layout
        units = unit_view(layer.kv_cache, layout, layer.config.stored_dtype(dtype))
        store = PagedStore(units, metadata.block_table[piece.request, : piece.pages], layout)
        header = store.read_header()
        valid, mids, lows = int(header.valid), int(header.mids), int(header.lows)
        before = self.commits[-1]["valid"] if self.commits else 0
        filled = valid - before
        replaced = min(lows - filled, layout.max_insertions, before)
        self.keys = store.read_slots(valid)[0].float().cpu()
        return {
            "segment": piece.position // layout.segment_size,
            "high": layout.segment_size - mids - lows,
            "mid": mids,
            "low": lows,
            "merged": int(header.merge[:before].sum()),
            "filled": filled,
            "replaced": replaced,
            "dropped": lows - filled - replaced,
            "valid": valid,
            "usage": header.usage[:valid].tolist(),
            "cosine": mean_cosine(self.keys),
        }


def mean_cosine(rows: torch.Tensor) -> float | None:
    """Mean cosine of two different ``rows`` [m, D]; None for fewer than two."""
    m = len(rows)
    if m < 2:
        return None
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    return float((unit.sum(0).square().sum() - unit.square().sum()) / (m * (m - 1)))


def decode(model: nn.Module, layer: PaceMemory, rows: torch.Tensor, count: int) -> list[list[int]]:
    """The ``count`` tokens that each of ``rows`` [m, D], activations of ``layer``, speaks for most.

    Through the layer's down projection, the final norm and the head, as if nothing else had
    been written. Raises ``RuntimeError`` for a model without a final norm by the usual name.
    """
    norm = getattr(getattr(model, "model", None), "norm", None)
    if norm is None or not hasattr(model, "compute_logits"):
        raise RuntimeError(
            f"pacellm: {type(model).__name__} has no model.norm, so activations cannot be decoded."
        )
    [mlp] = [m for m in model.modules() if getattr(m, "memory", None) is layer]
    weight = next(mlp.down_proj.parameters())
    hidden, _ = mlp.down_proj(rows.to(weight.device, weight.dtype))
    return model.compute_logits(norm(hidden)).topk(count, dim=-1).indices.tolist()
