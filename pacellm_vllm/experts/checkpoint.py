"""Rewrite a safetensors checkpoint with the neurons of each FFN in clustered order.

Two passes, so that memory holds one layer at a time: orders first, layer by layer and cached;
then each shard is copied and the FFN tensors in the copy are replaced by their permutation.
Names, dtypes, offsets and every other byte stay what they were.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from pacellm_vllm.experts.cluster import (
    Assignment,
    ExpertsError,
    check_num_experts,
    cluster,
    resolve_assignment,
)
from pacellm_vllm.experts.layout import Entry, FeedForward, Moved, find_feed_forwards

Features = Literal["gate", "gate_up", "activations"]

EXPERTS_JSON = "pacellm_experts.json"
# In a folder of its own: vLLM loads every safetensors file beside the shards as weights.
EXPERTS_ORDERS = "pacellm_experts/orders.safetensors"
FORMAT = 1

_INDEX = "model.safetensors.index.json"
# Weights in another format, or under names that the index does not list, keep the old order and
# would double the size.
_OTHER_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|gguf|h5|msgpack|onnx)|.*\.bin\.index\.json"
)
_SKIPPED_FOLDERS = ("original", "onnx", "coreml")


@dataclass(frozen=True)
class ClusterSettings:
    """What decides an order, besides the weights: see ``cluster`` and ``read_features``."""

    num_experts: int
    features: Features = "gate"
    seed: int = 0
    assignment: Assignment = "auto"


@dataclass(frozen=True)
class LayerResult:
    """``order`` [D] int64: neuron ``order[j]`` of the input is neuron j of the output."""

    order: torch.Tensor
    inertia: float
    random_inertia: float


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


def cluster_checkpoint(
    source: str | Path,
    target: str | Path,
    settings: ClusterSettings,
    *,
    layers: Sequence[int] | None = None,
    activations: str | Path | None = None,
    cache: str | Path | None = None,
    progress: bool = True,
) -> dict[int, LayerResult]:
    """Write ``source`` with the FFNs of ``layers`` (default: all) clustered to ``target``.

    Args:
        source: directory of a safetensors checkpoint in bf16, fp16 or fp32.
        target: directory to create; it appears whole or not at all.
        settings: how to cluster.
        layers: 0-based decoder layers.
        activations: with features "activations", a safetensors file of [D, samples] tensors named
            ``layers.<i>``.
        cache: folder of per-layer results, by default ``~/.cache/pacellm/experts``; a run that
            was interrupted continues from it.
        progress: show progress bars on stderr.

    Raises ``ExpertsError`` with one sentence for whatever is wrong with the input, the settings
    or the disk; then nothing is left at ``target``. Paper Sec. 3.2.2, Algorithm 2.
    """
    target = Path(target)
    _check_absent(target)
    checkpoint = open_checkpoint(source)
    ffns = _chosen(checkpoint, layers)
    for ffn in ffns.values():
        check_num_experts(settings.num_experts, ffn.neurons)
    if settings.features not in get_args(Features):
        raise ExpertsError(
            f"pacellm: features = {settings.features!r} is not allowed; it must be one of "
            f"{', '.join(get_args(Features))}."
        )
    if (settings.features == "activations") != (activations is not None):
        raise ExpertsError(
            "pacellm: the features 'activations' need a file of activations, and only they do."
        )
    given = None if activations is None else Path(activations)
    store = ResultCache(Path(cache) if cache else default_cache())
    results = {}
    with _clear_disk_errors():
        for layer, ffn in tqdm(ffns.items(), "clustering", unit="layer", disable=not progress):
            results[layer] = _cluster_layer(checkpoint, ffn, settings, given, store)
        orders = {layer: result.order for layer, result in results.items()}
        description = _describe(settings, ffns, results)
        write_permuted(checkpoint, target, orders, description, progress=progress)
    return results


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Read the configuration, the index and the headers of all shards; no weights.

    Raises ``ExpertsError`` about what is missing, damaged or quantised.
    """
    source = Path(source)
    config = _read_json(source / "config.json")
    for name in ("quantization_config", "compression_config"):
        if name in config or name in config.get("text_config", {}):
            raise ExpertsError(
                f"pacellm: {source} is quantised ({name} in config.json); cluster the original "
                "checkpoint and quantise the result."
            )
    if (source / _INDEX).is_file():
        listed = _read_json(source / _INDEX).get("weight_map", {})
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


def write_permuted(
    checkpoint: Checkpoint,
    target: str | Path,
    orders: Mapping[int, torch.Tensor],
    description: Mapping[str, Any] | None = None,
    *,
    progress: bool = True,
) -> None:
    """Write ``checkpoint`` to ``target`` with neuron ``orders[layer][j]`` of each layer at j.

    With ``description``, it and the orders are saved beside the weights. The directory appears
    whole or not at all; ``ExpertsError`` if it exists or the disk refuses.
    """
    target = Path(target)
    ffns = find_feed_forwards(checkpoint.entries, orders)
    moved = {m.name: (m, orders[ffn.layer]) for ffn in ffns.values() for m in ffn.moved}
    with _clear_disk_errors(), _whole_directory(target) as folder:
        files = list(_other_files(checkpoint))
        sizes = {shard: (checkpoint.path / shard).stat().st_size for shard in checkpoint.shards}
        free = shutil.disk_usage(folder).free
        if free < sum(sizes.values()):
            raise ExpertsError(
                f"pacellm: {target} needs {sum(sizes.values()) / 1e9:.1f} GB, but its disk has "
                f"{free / 1e9:.1f} GB free."
            )
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint.path / file, folder / file)
        total = sum(sizes.values())
        with tqdm(
            total=total, desc="writing", unit="B", unit_scale=True, disable=not progress
        ) as bar:
            for shard in checkpoint.shards:
                shutil.copyfile(checkpoint.path / shard, folder / shard)
                with open(folder / shard, "r+b") as out:
                    for name, (move, order) in moved.items():
                        entry = checkpoint.entries[name]
                        if entry.shard == shard:
                            tensor = permute(checkpoint.tensor(name), move, order)
                            out.seek(entry.start)
                            out.write(tensor.view(torch.uint8).numpy().data)
                bar.update(sizes[shard])
        if description is not None:
            named = {f"layers.{layer}.order": order for layer, order in orders.items()}
            (folder / EXPERTS_ORDERS).parent.mkdir()
            save_file(named, folder / EXPERTS_ORDERS)
            (folder / EXPERTS_JSON).write_text(json.dumps(description, indent=2) + "\n")


def permute(tensor: torch.Tensor, move: Moved, order: torch.Tensor) -> torch.Tensor:
    """``tensor`` with its neurons in ``order`` [D], each of its blocks alike; contiguous."""
    blocks = tensor.chunk(move.blocks, dim=move.axis)
    return torch.cat([b.index_select(move.axis, order) for b in blocks], dim=move.axis)


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
    if features == "gate":
        return rows[0]
    return torch.cat([torch.nn.functional.normalize(r.float(), dim=1) for r in rows], dim=1)


def _neurons_first(tensor: torch.Tensor, move: Moved) -> torch.Tensor:
    return tensor if move.axis == 0 else tensor.T.contiguous()


class ResultCache:
    """Orders of layers already clustered, by a hash of their features and settings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def key(self, features: torch.Tensor, settings: ClusterSettings) -> str:
        """sha256 over the format, the settings, and dtype, shape and bytes of ``features``."""
        about = {**asdict(settings), "assignment": resolve_assignment(settings.assignment)}
        about |= {"format": FORMAT, "dtype": str(features.dtype), "shape": list(features.shape)}
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        digest.update(features.contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def get(self, key: str, neurons: int) -> LayerResult | None:
        """The stored result, or None; a damaged one counts as none."""
        try:
            about = json.loads((self.folder / f"{key}.json").read_text())
            order = load_file(self.folder / f"{key}.safetensors")["order"]
            result = LayerResult(order, float(about["inertia"]), float(about["random_inertia"]))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            return None
        whole = torch.equal(order.sort().values, torch.arange(neurons))
        return result if whole else None

    def put(self, key: str, result: LayerResult) -> None:
        """Store ``result``; another process sees it whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {"inertia": result.inertia, "random_inertia": result.random_inertia}
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            save_file({"order": result.order}, Path(folder, "order"))
            Path(folder, "about").write_text(json.dumps(about))
            os.replace(Path(folder, "about"), self.folder / f"{key}.json")
            os.replace(Path(folder, "order"), self.folder / f"{key}.safetensors")


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/pacellm/experts``, by default under ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "pacellm", "experts")


def _cluster_layer(
    checkpoint: Checkpoint,
    ffn: FeedForward,
    settings: ClusterSettings,
    activations: Path | None,
    store: ResultCache,
) -> LayerResult:
    for move in ffn.moved:
        if not torch.isfinite(checkpoint.tensor(move.name)).all():
            raise ExpertsError(
                f"pacellm: {move.name} has NaN or infinite values; the checkpoint is damaged."
            )
    features = read_features(checkpoint, ffn, settings.features, activations)
    key = store.key(features, settings)
    result = store.get(key, ffn.neurons)
    if result is None:
        found = cluster(
            features, settings.num_experts, settings.seed, assignment=settings.assignment
        )
        result = LayerResult(found.order, found.inertia, found.random_inertia)
        store.put(key, result)
    return result


def _chosen(checkpoint: Checkpoint, layers: Sequence[int] | None) -> dict[int, FeedForward]:
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


def _describe(
    settings: ClusterSettings,
    ffns: Mapping[int, FeedForward],
    results: Mapping[int, LayerResult],
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        **asdict(settings),
        "assignment": resolve_assignment(settings.assignment),
        "orders": EXPERTS_ORDERS,
        "layers": {
            str(layer): {
                "neurons": ffns[layer].neurons,
                "expert_size": ffns[layer].neurons // settings.num_experts,
                "inertia": result.inertia,
                "random_inertia": result.random_inertia,
            }
            for layer, result in results.items()
        },
    }


def _read_json(path: Path) -> dict[str, Any]:
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


def _other_files(checkpoint: Checkpoint) -> Iterator[Path]:
    """Files besides weights, relative to the checkpoint."""
    for folder, folders, files in os.walk(checkpoint.path):
        folders[:] = [f for f in folders if f not in _SKIPPED_FOLDERS and not f.startswith(".")]
        for file in files:
            relative = Path(folder, file).relative_to(checkpoint.path)
            if not _OTHER_WEIGHTS.fullmatch(file) and file != EXPERTS_JSON:
                yield relative


def _check_absent(target: Path) -> None:
    if os.path.lexists(target):
        raise ExpertsError(f"pacellm: {target} exists already; choose another output directory.")


@contextlib.contextmanager
def _clear_disk_errors() -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        what = getattr(error, "strerror", None) or error
        where = getattr(error, "filename", None)
        raise ExpertsError(
            f"pacellm: writing stopped: {what}{f' ({where})' if where else ''}; the output "
            "directory was not made."
        ) from error


@contextlib.contextmanager
def _whole_directory(target: Path) -> Iterator[Path]:
    """A temporary directory beside ``target`` that takes its name when the block has succeeded.

    It is removed on any exception, Ctrl-C included. What a killed run left behind is removed by
    the next one for the same target: the lock on it has gone with its process.
    """
    _check_absent(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.partial-"
    for stale in target.parent.glob(f"{prefix}*"):
        with _locked(stale) as ours:
            if ours:
                shutil.rmtree(stale, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=prefix))
    try:
        with _locked(folder):
            yield folder
            folder.chmod(0o777 & ~_umask())
            _check_absent(target)
            folder.rename(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of a directory for the block; False if another process has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
