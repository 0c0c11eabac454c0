"""BankRecorder: the banks of one request read out of its pages, in the worker that owns them."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig

from pacellm_vllm.memory.layer import PaceMemory, memory_layers
from pacellm_vllm.memory.plain import Done
from pacellm_vllm.models.ffn import output_projection

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
        where memory runs as kernels. A recording that nobody took away ends.
        """
        self._end_recording()
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

        ``RuntimeError`` where the request did not run alone.
        """
        recorded = {}
        recorders = self._end_recording()
        if any(recorder.disturbed for recorder in recorders):
            raise RuntimeError("pacellm: a recorded request must run alone; set max_num_seqs to 1.")
        for recorder in recorders:
            found: dict[str, Any] = {
                "width": recorder.layer.width,
                "unsound": recorder.unsound,
                "commits": recorder.commits,
            }
            for name, rows in (("keys", recorder.keys), ("current", recorder.current)):
                found[name] = rows.contiguous().numpy().tobytes()
                found[f"{name}_words"] = decode(self.get_model(), recorder.layer, rows, words)
            recorded[recorder.layer.index] = found
        return recorded

    def _end_recording(self) -> "list[BankRecorder]":
        recorders = getattr(self, "_pacellm_recorders", [])
        for recorder in recorders:
            recorder.remove()
        self._pacellm_recorders = []
        return recorders


class BankRecorder:
    """Notes every commit that one layer's memory makes for the one request that runs.

    ``commits`` has an entry for each segment: ``high``, ``mid``, ``low`` count tokens, ``merged``,
    ``filled``, ``replaced`` slots, ``dropped`` low tokens that found none open; ``usage`` has an
    entry per slot, ``cosine`` is the mean over pairs of keys (see :func:`mean_cosine`). ``keys``
    [slots, D] fp32 are those of the last commit, ``current`` [tokens, D] fp32 the activations of
    the segment that was read last, ``unsound`` the tokens that memory passed by.
    """

    def __init__(self, layer: PaceMemory) -> None:
        self.layer = layer
        self.commits: list[dict[str, Any]] = []
        self.keys = torch.zeros(0, layer.width)
        self.unsound = 0
        self.disturbed = False
        self._pieces: list[torch.Tensor] = []
        self._kinds: Counter[str] = Counter()
        self._next = 0
        layer.observers.append(self.note)

    def remove(self) -> None:
        self.layer.observers.remove(self.note)

    @property
    def current(self) -> torch.Tensor:
        return torch.cat(self._pieces)

    def note(self, a: torch.Tensor, done: Done) -> None:
        """Where another request's tokens come between, the recording is ``disturbed`` and ends."""
        piece, progress, bank = done
        segment, offset = divmod(piece.position, self.layer.rules.segment_size)
        self.disturbed = self.disturbed or piece.position != self._next
        if self.disturbed:
            return
        if offset == 0:
            self._pieces, self._kinds = [], Counter()
        rows = a[piece.tokens].float().cpu()
        self._next += len(rows)
        self._pieces.append(rows)
        kinds = {"high": progress.high, "mid": progress.mid, "low": progress.low}
        self._kinds.update(kinds)
        self.unsound += len(rows) - sum(kinds.values())
        if (commit := progress.committed) is None:
            return
        self.keys = bank.read_keys(commit.valid).float().cpu()
        self.commits.append(
            {
                "segment": segment,
                **self._kinds,
                "merged": len(commit.merged),
                "filled": commit.filled,
                "replaced": len(commit.replaced),
                "dropped": commit.dropped,
                "valid": commit.valid,
                "usage": commit.usage,
                "cosine": mean_cosine(self.keys),
            }
        )


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
