"""BankRecorder: the banks of one request read out of its pages, in the worker that owns them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig

from pacellm_vllm.memory.backend import BankMetadata
from pacellm_vllm.memory.layer import PaceMemory, memory_layers
from pacellm_vllm.memory.store import PagedStore, unit_view
from pacellm_vllm.models.ffn import output_projection
from pacellm_vllm.ops.lookup import MOST_SQUARE
from pacellm_vllm.ops.update import Header

RECORD_METHOD = "pacellm_memory_record"
RECORDED_METHOD = "pacellm_memory_recorded"

FINAL_NORMS = (
    "model.norm",
    "model.final_layernorm",
    "model.final_layer_norm",
    "model.ln_f",
    "transformer.ln_f",
    "gpt_neox.final_layer_norm",
    "model.decoder.final_layer_norm",
)


class BankRecording:
    """Two methods of a worker: before a request and after it.

    What they return is plain numbers, lists and bytes, which any vLLM executor can carry.
    """

    vllm_config: VllmConfig
    get_model: Callable[[], nn.Module]

    def pacellm_memory_record(self) -> str | None:
        """Record the next request, which must run alone, in every layer with memory.

        Returns a sentence, and records nothing, where there is no memory, no known final norm, or
        where memory runs as kernels.
        """
        memories = memory_layers(self.vllm_config)
        if not memories:
            return "pacellm: no layer carries memory; name some with --layers."
        if memories[0].runs_kernels:
            return (
                "pacellm: banks are recorded on the CPU platform only, where a step is worked out "
                "on the host; inspect the model there."
            )
        model = self.get_model()
        if final_norm(model) is None:
            return (
                f"pacellm: the final norm of a {type(model).__name__} is not known, so its "
                "activations cannot be decoded; inspect another model."
            )
        self._pacellm_recorders = [BankRecorder(layer) for layer in memories]
        return None

    @torch.inference_mode()
    def pacellm_memory_recorded(self, words: int) -> dict[int, dict[str, Any]]:
        """Stop recording. By layer index: ``width``, how many tokens were ``unsound``, the
        ``commits``, and fp32 bytes of ``keys`` [slots, width] and of ``current`` [tokens, width],
        each with the ids of the ``words`` tokens that every row speaks for.
        """
        recorded = {}
        for recorder in self._pacellm_recorders:
            recorder.remove()
            found: dict[str, Any] = {
                "width": recorder.layer.width,
                "unsound": recorder.unsound,
                "commits": recorder.commits,
            }
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
    was read last, ``unsound`` the tokens that memory passed by.
    """

    def __init__(self, layer: PaceMemory) -> None:
        self.layer = layer
        self.commits: list[dict[str, Any]] = []
        self.keys = torch.zeros(0, layer.width)
        self.unsound = 0
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
        step, size = metadata.plain, self.layer.rules.segment_size
        assert step is not None, "not recorded where kernels run"
        pieces: list[tuple[Any, int, list[int]]] = [
            (piece.tokens, piece.position, piece.pages) for piece in step.pieces
        ]
        if step.singles is not None:
            one = step.singles
            pieces += [(one.tokens, *at) for at in zip(one.positions, one.pages, strict=True)]
        # The next segment's tokens go into free slots at once, but a second commit would hide one.
        if len(pieces) > 1:
            raise RuntimeError(
                "pacellm: a recorded request must run alone and a segment at a time; set "
                "max_num_seqs to 1 and max_num_batched_tokens to segment_size."
            )
        for tokens, position, pages in pieces:
            if position % size == 0:
                self._pieces = []
            self._pieces.append(a[tokens].float().cpu())
            squares = self._pieces[-1].square().sum(dim=1)
            self.unsound += int((~(squares <= MOST_SQUARE)).sum())
            if (position + len(self._pieces[-1])) % size == 0:
                self.commits.append(self._read_commit(position // size, pages, a.dtype))

    def _read_commit(self, segment: int, pages: list[int], dtype: torch.dtype) -> dict[str, Any]:
        """What the segment's tokens asked for, what became of the slots, and the bank after it.

        ``high``, ``mid``, ``low`` count tokens, ``merged``, ``filled``, ``replaced`` slots,
        ``dropped`` low tokens that found none open; ``usage`` has an entry per slot, ``cosine`` is
        the mean over pairs of keys (see :func:`mean_cosine`).
        """
        layer, layout = self.layer, self.layer.spec.layout
        units = unit_view(layer.kv_cache, layout, layer.config.stored_dtype(dtype))
        store = PagedStore(units, pages, layout)
        header = Header.unpack(store.read_words())
        valid, mids, lows = int(header.valid), int(header.mids), int(header.lows)
        before = self.commits[-1]["valid"] if self.commits else 0
        filled = valid - before
        replaced = min(lows - filled, layout.max_insertions, before)
        self.keys = store.read_keys(valid).float().cpu()
        return {
            "segment": segment,
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


def final_norm(model: nn.Module) -> nn.Module | None:
    """The norm before the head of one of vLLM's decoders, by the names they give it."""
    named = dict(model.named_modules())
    return next((named[name] for name in FINAL_NORMS if name in named), None)


def decode(model: Any, layer: PaceMemory, rows: torch.Tensor, count: int) -> list[list[int]]:
    """The ``count`` tokens that each of ``rows`` [m, D], what ``layer`` remembers, speaks for most.

    Activations go through the layer's output projection; all through the final norm and the head,
    as if no other layer had written anything.
    """
    module = model.get_submodule(layer.prefix.removesuffix(".memory"))
    norm: Any = final_norm(model)
    weight = next(model.parameters())
    hidden = rows.to(weight.device, weight.dtype)
    if layer.config.site == "activation":
        hidden, _ = output_projection(module)(hidden)
    return model.compute_logits(norm(hidden)).topk(count, dim=-1).indices.tolist()
