"""Files of a safetensors checkpoint: JSON objects, and where each tensor lies in its shards."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pacellm_vllm.experts.errors import ExpertsError
from pacellm_vllm.experts.layout import Entry

_INDEX = "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ``ExpertsError`` if it cannot be read or is something else."""
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise ExpertsError(f"pacellm: {path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise ExpertsError(f"pacellm: {path} is not valid JSON: {error}.") from None
    if not isinstance(found, dict):
        raise ExpertsError(f"pacellm: {path} is not a JSON object.")
    return found


def find_tensors(source: Path) -> tuple[dict[str, tuple[Entry, ...]], tuple[str, ...]]:
    """Where each tensor lies, in the file that counts first, and the names of all shards.

    The index says which files are shards and, where several have a tensor, which counts; without
    one that is refused. Raises ``ExpertsError`` about it, and about what is missing or damaged.
    """
    index = source / _INDEX
    listed = _read_index(index) if index.is_file() else {}
    shards = tuple(
        sorted(set(listed.values()) or {p.name for p in source.glob("model*.safetensors")})
    )
    if not shards:
        raise ExpertsError(
            f"pacellm: {source} has no model*.safetensors; convert the checkpoint first "
            "(save_pretrained does)."
        )
    found: dict[str, list[Entry]] = {}
    for shard in shards:
        for name, entry in _read_header(source / shard).items():
            found.setdefault(name, []).append(entry)
    for name, shard in listed.items():
        if all(entry.shard != shard for entry in found.get(name, ())):
            raise ExpertsError(f"pacellm: {name} is missing from {source / shard}.")
    for name, copies in found.items():
        if len(copies) > 1 and not listed:
            first, second = (entry.shard for entry in copies[:2])
            raise ExpertsError(
                f"pacellm: {name} is in both {first} and {second} of {source}, and there is no "
                "index to say which counts; remove the files that are not the model's."
            )
        # What the index does not list, loaders take from the last file.
        counts = listed.get(name, copies[-1].shard)
        copies.sort(key=lambda entry: entry.shard != counts)
    return {name: tuple(copies) for name, copies in found.items()}, shards


def check_copies(source: Path, name: str, copies: Sequence[Entry]) -> None:
    """Raise ``ExpertsError`` where loaders would not take the first of a tensor's ``copies``.

    They take the last file: vLLM counts numbers in names, transformers compares letters.
    """
    by_shard = {entry.shard: entry for entry in copies}
    counts = copies[0]
    for shard in sorted({max(by_shard, key=_natural), max(by_shard)} - {counts.shard}):
        if _bytes(source, by_shard[shard]) != _bytes(source, counts):
            raise ExpertsError(
                f"pacellm: {name} of {source} is in {counts.shard} by the index, but loaders take "
                f"it from {shard}, the last file that has it; remove one of the two."
            )
    for entry in copies:
        if (entry.dtype, entry.shape) != (counts.dtype, counts.shape):
            raise ExpertsError(
                f"pacellm: {name} of {source} is {counts.dtype} of shape {list(counts.shape)} in "
                f"{counts.shard}, but {entry.dtype} of shape {list(entry.shape)} in "
                f"{entry.shard}; remove one of the two."
            )


def _read_index(path: Path) -> dict[str, str]:
    listed = read_json(path).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ExpertsError(
            f"pacellm: {path} has no weight_map of tensors to files; write it again "
            "(save_pretrained does)."
        )
    for name, shard in listed.items():
        # A path could lead out of the directory that is written.
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\]+\.safetensors", shard):
            raise ExpertsError(
                f"pacellm: {path} is damaged: its weight_map has {name} in {shard!r}, which must "
                "be a file name such as 'model.safetensors'."
            )
    return listed


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _bytes(source: Path, entry: Entry) -> tuple[str, tuple[int, ...], bytes]:
    with open(source / entry.shard, "rb") as file:
        file.seek(entry.start)
        return entry.dtype, entry.shape, file.read(entry.end - entry.start)


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
