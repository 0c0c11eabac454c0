"""Which tensors of a checkpoint make an FFN, and along which axis its neurons lie."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from pacellm_vllm.experts.errors import ExpertsError

FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class Entry:
    """One tensor of a shard: its safetensors dtype, shape, and the byte range in the file."""

    shard: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Moved:
    """A tensor whose ``axis`` runs over neurons, ``halves`` times (2: gate and up in one)."""

    name: str
    axis: int
    halves: int = 1


@dataclass(frozen=True)
class StoredFeedForward:
    """The FFN of one decoder layer.

    ``inputs`` are its input projections, the gate first where there is one (the paper clusters
    the gate's rows); ``moved`` are all tensors that follow a new order of its neurons.
    """

    layer: int
    neurons: int
    inputs: tuple[Moved, ...]
    moved: tuple[Moved, ...]

    @property
    def gated(self) -> bool:
        return len(self.inputs) == 2 or self.inputs[0].halves == 2

    @property
    def output(self) -> str:
        """The module that the activations enter."""
        last = self.moved[len(self.inputs)]
        return last.name.removesuffix(".weight")


@dataclass(frozen=True)
class _Names:
    """Names of projections; ``fused`` when the only input is gate over up."""

    inputs: tuple[str, ...]
    output: str
    fused: bool = False

    @property
    def gated(self) -> bool:
        return self.fused or len(self.inputs) == 2


_NAMES = (
    _Names(("gate_proj", "up_proj"), "down_proj"),
    _Names(("gate_up_proj",), "down_proj", fused=True),
    _Names(("up_proj",), "down_proj"),
    _Names(("fc1",), "fc2"),
    _Names(("c_fc",), "c_proj"),
    _Names(("dense_h_to_4h",), "dense_4h_to_h"),
)
# Their biases stay where they are.
OUTPUTS = frozenset(names.output for names in _NAMES)
_KNOWN = "known are one each of " + ", ".join("/".join((*n.inputs, n.output)) for n in _NAMES)
_PROJECTIONS = sorted({name for names in _NAMES for name in (*names.inputs, names.output)})
_TENSOR = re.compile(
    rf"(?P<module>(?:.*?\.)?(?P<layer>\d+)(?:\.(?P<inner>.+?))??)\."
    rf"(?P<projection>{'|'.join(_PROJECTIONS)})\.(?P<kind>[^.]+)"
)
# Attention has a c_proj, too; other towers of a model have FFNs that are not the decoder's.
_NOT_THE_FFN = re.compile(r"(^|\.)(self_attn|attn|attention)$")
_OTHER_TOWER = re.compile(r"vision|visual|audio|encoder")
_MIXTURE = re.compile(r"\.(experts|shared_experts?)(\.|$)")


def permute(tensor: torch.Tensor, move: Moved, order: torch.Tensor) -> torch.Tensor:
    """``tensor`` with its neurons in ``order`` [D], each of its halves alike; contiguous."""
    halves = tensor.chunk(move.halves, dim=move.axis)
    return torch.cat([half.index_select(move.axis, order) for half in halves], dim=move.axis)


def is_whole(projections: Iterable[str], gated: bool) -> bool:
    """Whether these are all the projections of an FFN with, or without, a gate."""
    there = set(projections)
    return any(names.gated == gated and {*names.inputs, names.output} <= there for names in _NAMES)


def bias_of(part: str) -> Moved | None:
    """How ``part``, such as ``up_proj.bias``, follows the neurons if it is an input's bias."""
    name, _, kind = part.rpartition(".")
    found = [names for names in _NAMES if name in names.inputs]
    return Moved(part, 0, 2 if found[0].fused else 1) if found and kind == "bias" else None


def find_feed_forwards(
    entries: Mapping[str, Entry], layers: Iterable[int]
) -> dict[int, StoredFeedForward]:
    """The FFN of each of ``layers``; all of them must be whole and named alike.

    Raises ``ExpertsError`` about a missing tensor, a shape or dtype that does not fit, a mixture
    of experts, and names that are not known.
    """
    modules: dict[int, dict[str, set[str]]] = {layer: {} for layer in layers}
    for name in entries:
        match = _TENSOR.fullmatch(name)
        if (
            match
            and int(match["layer"]) in modules
            and not _OTHER_TOWER.search(name)
            and not _NOT_THE_FFN.search(match["module"])
        ):
            found = modules[int(match["layer"])]
            found.setdefault(match["module"], set()).add(match["projection"])
    for layer, found in modules.items():
        _check_one_dense(layer, found)
    # What any layer has, all must have: else a lost gate would pass for an FFN without gates.
    present = set().union(*(p for found in modules.values() for p in found.values()))
    names = next(
        (n for n in _NAMES if present == {*n.inputs, n.output}),
        next((n for n in _NAMES if present <= {*n.inputs, n.output}), None),
    )
    if names is None:
        raise ExpertsError(
            f"pacellm: an FFN of {', '.join(sorted(present))} is not known; {_KNOWN}."
        )
    return {layer: _checked(layer, module, names, entries) for layer, (module,) in modules.items()}


def _check_one_dense(layer: int, modules: Mapping[str, set[str]]) -> None:
    if any(_MIXTURE.search(module) for module in modules):
        raise ExpertsError(
            f"pacellm: layer {layer} is a mixture of experts already; only dense FFNs can be "
            "clustered: choose others with --layers."
        )
    if len(modules) != 1:
        what = f"{len(modules)} FFNs, {', '.join(sorted(modules))}" if modules else "no known FFN"
        raise ExpertsError(f"pacellm: layer {layer} has {what}; {_KNOWN}.")


def _checked(
    layer: int, module: str, names: _Names, entries: Mapping[str, Entry]
) -> StoredFeedForward:
    def entry(projection: str) -> Entry:
        name = f"{module}.{projection}.weight"
        if name not in entries:
            raise ExpertsError(f"pacellm: {name} is missing from the checkpoint.")
        if entries[name].dtype not in FLOATS or len(entries[name].shape) != 2:
            raise ExpertsError(
                f"pacellm: {name} is {entries[name].dtype} of shape {list(entries[name].shape)}; "
                f"quantised checkpoints cannot be clustered, only {', '.join(FLOATS)} matrices: "
                "cluster the original and quantise the result."
            )
        return entries[name]

    halves = 2 if names.fused else 1
    inputs = [entry(projection) for projection in names.inputs]
    output = entry(names.output)
    # GPT-2 stores its matrices as [in, out]; only its bias tells when the FFN is square.
    bias = entries.get(f"{module}.{names.inputs[0]}.bias")
    transposed = (
        names.inputs == ("c_fc",)
        and inputs[0].shape[0] != inputs[0].shape[1]
        and bias is not None
        and bias.shape[0] == inputs[0].shape[1]
    )
    axis = 1 if transposed else 0
    neurons = output.shape[1 - axis]
    hidden = output.shape[axis]
    for projection, found in zip(names.inputs, inputs, strict=True):
        if found.shape[axis] != neurons * halves or found.shape[1 - axis] != hidden:
            raise ExpertsError(
                f"pacellm: {module}.{projection}.weight has shape {list(found.shape)}, which does "
                f"not fit {names.output}.weight of shape {list(output.shape)}."
            )
    weights = [Moved(f"{module}.{name}.weight", axis, halves) for name in names.inputs]
    moved = [*weights, Moved(f"{module}.{names.output}.weight", 1 - axis)]
    known = {m.name for m in moved} | {f"{module}.{names.output}.bias"}
    for projection in names.inputs:
        name = f"{module}.{projection}.bias"
        known.add(name)
        if name in entries:
            if entries[name].dtype not in FLOATS or entries[name].shape != (neurons * halves,):
                raise ExpertsError(
                    f"pacellm: {name} is {entries[name].dtype} of shape "
                    f"{list(entries[name].shape)}; [{neurons * halves}] floats were expected."
                )
            moved.append(Moved(name, 0, halves))
    for name in entries:
        # In a module of its own, whatever else is there may have a value per neuron.
        if name.startswith(f"{module}.") and name not in known and not module[-1].isdigit():
            raise ExpertsError(
                f"pacellm: {name} is part of an FFN, but not one of the tensors known there; "
                "clustering could break the model, so nothing was written."
            )
    return StoredFeedForward(layer, neurons, tuple(weights), tuple(moved))
