"""Reading a safetensors checkpoint: its headers, the tensors of its FFNs, and their features."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pacellm_vllm.experts.errors import ExpertsError
from pacellm_vllm.experts.layout import Entry, FeedForward, Moved, find_feed_forwards
from pacellm_vllm.experts.settings import Features

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """A directory of safetensors shards: its configuration and where each tensor lies."""

    path: Path
    config: Mapping[str, Any]
    shards: tuple[str, ...]
    entries: Mapping[str, Entry]

    @property
    def num_layers(self) -> int:
        text = self.config.get("text_config", self.config)
        for name in ("num_hidden_layers", "n_layer", "num_layers"):
            if isinstance(text.get(name), int):
                return text[name]
        raise ExpertsError(f"pacellm: {self.path}/config.json does not say num_hidden_layers.")

    def tensor(self, name: str) -> torch.Tensor:
        shard = self.path / self.entries[name].shard
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
    for name in ("quantization_config", "compression_config"):
        if name in config or name in config.get("text_config", {}):
            raise ExpertsError(
                f"pacellm: {source} is quantised ({name} in config.json); cluster the original "
                "checkpoint and quantise the result."
            )
    if (source / _INDEX).is_file():
        listed = read_json(source / _INDEX).get("weight_map", {})
        shards = tuple(sorted(set(listed.values())))
    else:
        listed = {}
        shards = tuple(sorted(p.name for p in source.glob("model*.safetensors")))
    if not shards:
        raise ExpertsError(
            f"pacellm: {source} has no model*.safetensors; convert the checkpoint first "
            "(save_pretrained does)."
        )
    entries: dict[str, Entry] = {}
    for shard in shards:
        entries.update(_read_header(source / shard))
    for name, shard in listed.items():
        if name not in entries or entries[name].shard != shard:
            raise ExpertsError(f"pacellm: {name} is missing from {source / shard}.")
    return Checkpoint(source, config, shards, entries)


def feed_forwards(checkpoint: Checkpoint, layers: Sequence[int] | None) -> dict[int, FeedForward]:
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
    return find_feed_forwards(checkpoint.entries, chosen)


def read_features(
    checkpoint: Checkpoint, ffn: FeedForward, features: Features, activations: Path | None = None
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
        block
        for move in ffn.inputs
        for block in _neurons_first(checkpoint.tensor(move.name), move).chunk(move.blocks)
    ]
    return features_of(rows, features)


def features_of(rows: Sequence[torch.Tensor], features: Features) -> torch.Tensor:
    """Features [D, F] of ``rows``: those of the gate [D, H], then those of up, if there is one."""
    if features == "gate":
        return rows[0]
    return torch.cat([torch.nn.functional.normalize(r.float(), dim=1) for r in rows], dim=1)


def _neurons_first(tensor: torch.Tensor, move: Moved) -> torch.Tensor:
    return tensor if move.axis == 0 else tensor.T.contiguous()


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise ExpertsError(f"pacellm: {path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ExpertsError(f"pacellm: {path} is not valid JSON: {error}.") from None
    if not isinstance(found, dict):
        raise ExpertsError(f"pacellm: {path} is not a JSON object.")
    return found


def _read_header(path: Path) -> dict[str, Entry]:
    """Where the tensors of one shard lie; opening it checks that the file is whole."""
    try:
        with safe_open(path, framework="pt"):
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError) as error:
        raise ExpertsError(
            f"pacellm: {path} is missing, truncated or damaged ({error}); download it again."
        ) from None
    header.pop("__metadata__", None)
    base = 8 + length
    return {
        name: Entry(
            path.name,
            about["dtype"],
            tuple(about["shape"]),
            *(base + offset for offset in about["data_offsets"]),
        )
        for name, about in header.items()
    }
