"""Bringing neurons into expert order while a checkpoint's weights stream by."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from pacellm_vllm.experts.cache import ResultCache, default_cache
from pacellm_vllm.experts.checkpoint import features_of
from pacellm_vllm.experts.errors import ExpertsError
from pacellm_vllm.experts.layout import (
    OUTPUTS,
    Entry,
    Moved,
    StoredFeedForward,
    bias_of,
    find_feed_forwards,
    is_whole,
    permute,
)
from pacellm_vllm.experts.orders import StoredExperts, open_experts
from pacellm_vllm.experts.settings import ClusterSettings, ExpertsConfig, check_num_experts

Weights = Iterable[tuple[str, torch.Tensor]]
# Called with the layer and its gate and up rows [D, H], in expert order; without a gate, with up's
# rows and None.
Observer = Callable[[int, torch.Tensor, torch.Tensor | None], None]

_TENSOR = re.compile(r"(?P<module>(?:.*\.)?layers\.(?P<layer>\d+)\.mlp)\.(?P<part>.+)")
_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


@dataclass(frozen=True)
class ExpertsPlan:
    """Which experts an engine's model gets: K in each of ``layers``.

    ``source`` is a clustered checkpoint's description, or how to cluster while loading.
    """

    num_experts: int
    layers: tuple[int, ...]
    source: StoredExperts | ClusterSettings

    @classmethod
    def of(cls, config: ExpertsConfig, num_layers: int, neurons: int) -> "ExpertsPlan":
        """The plan for a model of ``num_layers`` FFNs with ``neurons`` each.

        Reads the description at ``config.path``, no weights. Raises ``ExpertsError`` when it is
        missing or another model's, or when the numbers do not fit.
        """
        source: StoredExperts | ClusterSettings
        if config.path is not None:
            source = open_experts(config.path)
            there: Sequence[int] = sorted(source.layers)
        else:
            source = config.cluster_settings()
            there = range(num_layers)
        check_num_experts(source.num_experts, neurons)
        config.check_top_k(source.num_experts)
        chosen = tuple(there) if config.layers is None else tuple(sorted(config.layers))
        for layer in chosen:
            if layer >= num_layers and isinstance(source, StoredExperts):
                raise ExpertsError(
                    f"pacellm: {source.folder} is for another model: it has orders for layer "
                    f"{layer}, this model has layers 0 to {num_layers - 1}; cluster this one with "
                    "pacellm cluster."
                )
            if layer not in there:
                raise ExpertsError(
                    f"pacellm: experts.layers = {layer} is not allowed; it must be one of "
                    f"{_ranges(there)}, the layers that have an order."
                )
            if isinstance(source, StoredExperts) and source.layers[layer].neurons != neurons:
                raise ExpertsError(
                    f"pacellm: {source.folder} is for another model: its layer {layer} has "
                    f"{source.layers[layer].neurons} neurons, this model's have {neurons}; cluster "
                    "this one with pacellm cluster."
                )
        return cls(source.num_experts, chosen, source)

    @property
    def summary(self) -> str:
        """For the start-up line."""
        where = (
            f"stored in {self.source.folder}"
            if isinstance(self.source, StoredExperts)
            else f"clustered while loading, orders kept in {default_cache()}"
        )
        return f"{self.num_experts} experts in layers {_ranges(self.layers)}, {where}"


@dataclass
class _Layer:
    """A layer's FFN as its tensors arrive: kept in ``waiting`` until its order is known."""

    waiting: dict[str, torch.Tensor] = field(default_factory=dict)
    moved: Mapping[str, Moved] = field(default_factory=dict)
    order: torch.Tensor | None = None
    done: bool = False


class Reorder:
    """Permutes the FFN tensors of one pass over a checkpoint; all others go by untouched.

    A layer's tensors are held back until its projections are there (gate, up and down, or up and
    down where FFNs are not ``gated``), from whichever shards: one or two layers at a time, since
    shards follow the layers. ``orders`` has the order of each finished layer, None where the
    checkpoint had it already. Those of an earlier pass are kept to where neurons are clustered: a
    bank knows neurons by their place.
    """

    def __init__(
        self,
        plan: ExpertsPlan,
        observe: Observer | None = None,
        gated: bool = True,
        orders: dict[int, torch.Tensor | None] | None = None,
    ) -> None:
        self._plan = plan
        self._gated = gated
        self._observe = observe
        self._layers = {layer: _Layer() for layer in plan.layers}
        self._cache = ResultCache(default_cache())
        self.orders = {} if orders is None else orders

    def __call__(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        """``weights`` with neurons in expert order.

        Raises ``ExpertsError`` about weights of another model, a layer that is not there whole, or
        tensors that cannot be reordered.
        """
        for name, tensor in weights:
            found = _TENSOR.fullmatch(name)
            layer = self._layers.get(int(found["layer"])) if found else None
            if found is None or layer is None:
                yield name, tensor
            elif layer.done:
                yield name, self._late(name, found["part"], tensor, layer)
            else:
                # A loader may reuse its buffer for the next tensor.
                layer.waiting[name] = tensor.clone()
                parts = [n.removeprefix(f"{found['module']}.") for n in layer.waiting]
                there = [p.removesuffix(".weight") for p in parts if p.endswith(".weight")]
                if is_whole(there, self._gated):
                    yield from self._finish(int(found["layer"]), layer)
        for index, layer in self._layers.items():
            if not layer.done:
                has = ", ".join(sorted(layer.waiting)) or "none of its FFN's tensors"
                raise ExpertsError(
                    f"pacellm: the FFN of layer {index} cannot be brought into expert order: the "
                    f"weights have {has}, but "
                    f"{'a gate, ' if self._gated else ''}an up and a down projection are needed."
                )

    def _finish(self, index: int, layer: _Layer) -> Iterator[tuple[str, torch.Tensor]]:
        entries = {name: _entry(tensor) for name, tensor in layer.waiting.items()}
        ffn = find_feed_forwards(entries, [index])[index]
        gate, up = _gate_and_up(layer.waiting, ffn)
        order = self._order(index, gate, up)
        self.orders[index] = order
        layer.moved = {move.name: move for move in ffn.moved}
        layer.order, layer.done = order, True
        if self._observe is not None:
            rows = slice(None) if order is None else order.to(gate.device)
            self._observe(index, gate[rows], None if up is None else up[rows])
        for name in list(layer.waiting):
            tensor = layer.waiting.pop(name)
            yield name, _moved(tensor, layer.moved.get(name), order)

    def _order(
        self, index: int, gate: torch.Tensor, up: torch.Tensor | None
    ) -> torch.Tensor | None:
        source = self._plan.source
        if isinstance(source, StoredExperts):
            return source.order_for(index, gate)
        if index in self.orders:
            return self.orders[index]
        rows = [gate] if up is None else [gate, up]
        features = features_of(rows, source.features).cpu()
        try:
            return self._cache.cluster(features, source).order
        except OSError as error:
            raise ExpertsError(
                f"pacellm: {default_cache()} cannot be written ({error.strerror}), where orders of "
                "clustered layers are kept; set XDG_CACHE_HOME to a folder that can."
            ) from error

    def _late(self, name: str, part: str, tensor: torch.Tensor, layer: _Layer) -> torch.Tensor:
        """A tensor that came after its layer's weights: a bias, or a copy."""
        if name in layer.moved and layer.order is None:
            return tensor
        if part.removesuffix(".bias") in OUTPUTS:
            return tensor
        bias = bias_of(part)
        if bias is None and name in layer.moved:
            raise ExpertsError(
                f"pacellm: {name} comes twice from the checkpoint, again after its layer was "
                "brought into expert order; serve what pacellm cluster makes of the checkpoint."
            )
        if bias is None:
            raise ExpertsError(
                f"pacellm: {name} is part of an FFN, but not one of the tensors known there; the "
                "model cannot be brought into expert order."
            )
        return _moved(tensor, bias, layer.order)


def _moved(tensor: torch.Tensor, move: Moved | None, order: torch.Tensor | None) -> torch.Tensor:
    if move is None or order is None:
        return tensor
    return permute(tensor, move, order.to(tensor.device))


def _entry(tensor: torch.Tensor) -> Entry:
    dtype = _DTYPES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
    return Entry("", dtype, tuple(tensor.shape), 0, 0)


def _gate_and_up(
    tensors: dict[str, torch.Tensor], ffn: StoredFeedForward
) -> tuple[torch.Tensor, torch.Tensor | None]:
    rows = [half for m in ffn.inputs for half in tensors[m.name].chunk(m.halves)]
    return rows[0], rows[1] if ffn.gated else None


def _ranges(numbers: Sequence[int]) -> str:
    """``0 to 3, 7`` for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
