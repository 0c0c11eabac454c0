"""Reading a safetensors checkpoint: its configuration, the tensors of its FFNs, their features."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pacellm_vllm.experts.errors import ExpertsError
from pacellm_vllm.experts.files import check_copies, find_tensors, read_json
from pacellm_vllm.experts.layout import Entry, Moved, StoredFeedForward, find_feed_forwards
from pacellm_vllm.experts.settings import Features
from pacellm_vllm.sentences import not_allowed


@dataclass(frozen=True)
class Checkpoint:
    """A directory of safetensors shards: its configuration and where each tensor lies."""

    path: Path
    config: Mapping[str, Any]
    shards: tuple[str, ...]
    copies: Mapping[str, tuple[Entry, ...]]

    @property
    def entries(self) -> dict[str, Entry]:
        """Of each tensor's copies the one that counts."""
        return {name: copies[0] for name, copies in self.copies.items()}

    @property
    def num_layers(self) -> int:
        for scope in (self.section("text_config"), self.config):
            for name in ("num_hidden_layers", "n_layer", "num_layers"):
                count = scope.get(name)
                if count is None:
                    continue
                if type(count) is not int or count < 1:
                    raise self._wrong(name, count, "an integer from 1")
                if count > len(self.copies):
                    raise ExpertsError(
                        f"pacellm: {self.path}/config.json says {name} = {count}, but there are "
                        f"{len(self.copies)} tensors in all; the checkpoint is damaged."
                    )
                return count
        raise ExpertsError(f"pacellm: {self.path}/config.json does not say num_hidden_layers.")

    @property
    def architecture(self) -> str | None:
        """The first one that the configuration names."""
        given = self.config.get("architectures")
        if given is None:
            return None
        names = [given] if isinstance(given, str) else given
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise self._wrong("architectures", given, "a list of names")
        return names[0] if names else None

    def section(self, name: str) -> Mapping[str, Any]:
        """An object in the configuration; empty if it is absent or null."""
        found = self.config.get(name)
        if found is not None and not isinstance(found, dict):
            raise self._wrong(name, found, "an object")
        return found or {}

    def _wrong(self, name: str, value: Any, allowed: str) -> ExpertsError:
        return ExpertsError(not_allowed(name, value, allowed, f" in {self.path}/config.json"))

    def tensor(self, name: str) -> torch.Tensor:
        """It whole, of the shape in ``entries``; ``ExpertsError`` if it cannot be read."""
        shard = self.path / self.copies[name][0].shard
        try:
            with safe_open(shard, framework="pt") as opened:
                return opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ExpertsError(f"pacellm: {shard} cannot be read: {error}.") from error


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Read the configuration, the index and the headers of all shards; no weights.

    Raises ``ExpertsError`` about what is missing, damaged or quantised.
    """
    source = Path(source)
    config = read_json(source / "config.json")
    copies, shards = find_tensors(source)
    checkpoint = Checkpoint(source, config, shards, copies)
    for name in ("quantization_config", "compression_config"):
        if any(
            scope.get(name) is not None for scope in (config, checkpoint.section("text_config"))
        ):
            raise ExpertsError(
                f"pacellm: {source} is quantised ({name} in config.json); cluster the original "
                "checkpoint and quantise the result."
            )
    return checkpoint


def feed_forwards(
    checkpoint: Checkpoint, layers: Sequence[int] | None
) -> dict[int, StoredFeedForward]:
    """The FFN of each of ``layers``, or of all, by layer.

    Raises ``ExpertsError`` about a layer that is not there, or none, and what
    :func:`find_feed_forwards` and :func:`check_copies` refuse.
    """
    count = checkpoint.num_layers
    chosen = sorted(set(range(count) if layers is None else layers))
    for layer in chosen:
        if not 0 <= layer < count:
            raise ExpertsError(
                f"pacellm: layers = {layer} is not allowed; it must be from 0 to {count - 1} for "
                "this model."
            )
    if not chosen:
        raise ExpertsError("pacellm: no layers were chosen.")
    found = find_feed_forwards(checkpoint.entries, chosen)
    for name in (move.name for ffn in found.values() for move in ffn.moved):
        check_copies(checkpoint.path, name, checkpoint.copies[name])
    return found


def read_features(
    checkpoint: Checkpoint,
    ffn: StoredFeedForward,
    features: Features,
    activations: Path | None = None,
) -> torch.Tensor:
    """What the neurons of one layer are compared by, [D, F] in the dtype it is stored in.

    ``gate``: rows of the gate projection (of the only input projection in a plain FFN);
    ``gate_up``: rows of gate and up, each of length 1, side by side; ``activations``: the given
    file's tensor. Raises ``ExpertsError`` if that is missing or has another shape.
    """
    if features == "activations":
        assert activations is not None
        name = f"layers.{ffn.layer}"
        try:
            with safe_open(activations, framework="pt") as opened:
                given = opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ExpertsError(f"pacellm: {name} of {activations}: {error}.") from error
        if given.ndim != 2 or given.shape[0] != ffn.neurons:
            raise ExpertsError(
                f"pacellm: {name} of {activations} has shape {list(given.shape)}; "
                f"[{ffn.neurons}, samples] was expected."
            )
        return given
    rows = [
        half
        for move in ffn.inputs
        for half in _neurons_first(checkpoint.tensor(move.name), move).chunk(move.halves)
    ]
    return features_of(rows, features)


def features_of(rows: Sequence[torch.Tensor], features: Features) -> torch.Tensor:
    """Features [D, F] of ``rows``: those of the gate [D, H], then those of up, if there is one."""
    if features == "gate":
        return rows[0]
    return torch.cat([torch.nn.functional.normalize(r.float(), dim=1) for r in rows], dim=1)


def _neurons_first(tensor: torch.Tensor, move: Moved) -> torch.Tensor:
    return tensor if move.axis == 0 else tensor.T.contiguous()
