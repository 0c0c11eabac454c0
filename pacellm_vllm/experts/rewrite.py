"""Rewrite a safetensors checkpoint with the neurons of each FFN in clustered order.

Two passes, so that memory holds one layer at a time: orders first, layer by layer and cached;
then each shard is copied and the FFN tensors in the copy are replaced by their permutation.
Names, dtypes, offsets and every other byte of the shards stay what they were.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from tqdm import tqdm

from pacellm_vllm.config import CONFIG_KEY, PaceConfig, PaceConfigError
from pacellm_vllm.experts.cache import LayerResult, ResultCache, default_cache
from pacellm_vllm.experts.checkpoint import (
    Checkpoint,
    feed_forwards,
    open_checkpoint,
    read_features,
)
from pacellm_vllm.experts.errors import ExpertsError
from pacellm_vllm.experts.folders import check_absent, clear_disk_errors, whole_directory
from pacellm_vllm.experts.layout import StoredFeedForward, find_feed_forwards, permute
from pacellm_vllm.experts.orders import EXPERTS_JSON, DescribedLayer, fingerprint, write_experts
from pacellm_vllm.experts.settings import (
    ClusterSettings,
    Features,
    check_num_experts,
    check_seed,
    merge_experts,
)

Rename = Callable[[str], str | None]

# Weights in another format, or under names that the index does not list, keep the old order and
# would double the size.
_OTHER_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|gguf|h5|msgpack|onnx)|.*\.bin\.index\.json"
)
_SKIPPED_FOLDERS = ("original", "onnx", "coreml")


def cluster_checkpoint(
    source: str | Path,
    target: str | Path,
    settings: ClusterSettings,
    *,
    layers: Sequence[int] | None = None,
    activations: str | Path | None = None,
    cache: str | Path | None = None,
    rename: Rename = lambda architecture: None,
    progress: bool,
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
        rename: the architecture that serves experts, for the one in config.json; where it names
            one, config.json is changed so that the result is served with its experts.
        progress: show progress bars on stderr.

    Raises ``ExpertsError`` with one sentence for whatever is wrong with the input, the settings
    or the disk; then nothing is left at ``target``. Paper Sec. 3.2.2, Algorithm 2.
    """
    target = Path(target)
    check_absent(target)
    checkpoint = open_checkpoint(source)
    ffns = feed_forwards(checkpoint, layers)
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
    check_seed(settings.seed)
    config = _served_config(checkpoint, settings.num_experts, rename)
    given = None if activations is None else Path(activations)
    store = ResultCache(Path(cache) if cache else default_cache())
    results = {}
    with clear_disk_errors():
        for layer, ffn in tqdm(ffns.items(), "clustering", unit="layer", disable=not progress):
            results[layer] = _cluster_layer(checkpoint, ffn, settings, given, store)
        count = settings.num_experts
        about = {i: _describe(checkpoint, ffn, results[i], count) for i, ffn in ffns.items()}
        orders = {layer: result.order for layer, result in results.items()}

        def finish(folder: Path) -> None:
            write_experts(folder, settings, about, orders)
            if config is not None:
                (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

        write_permuted(checkpoint, target, orders, finish, progress=progress)
    return results


def write_permuted(
    checkpoint: Checkpoint,
    target: str | Path,
    orders: Mapping[int, torch.Tensor],
    finish: Callable[[Path], None] | None = None,
    *,
    progress: bool,
) -> None:
    """Write ``checkpoint`` to ``target`` with neuron ``orders[layer][j]`` of each layer at j.

    ``finish`` is called with the finished directory before it gets its name, to add to it. The
    directory appears whole or not at all; ``ExpertsError`` if it exists or the disk refuses.
    """
    target = Path(target)
    ffns = find_feed_forwards(checkpoint.entries, orders)
    moved = {m.name: (m, orders[ffn.layer]) for ffn in ffns.values() for m in ffn.moved}
    with clear_disk_errors(), whole_directory(target) as folder:
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
                        for entry in checkpoint.copies[name]:
                            if entry.shard == shard:
                                tensor = permute(checkpoint.tensor(name), move, order)
                                out.seek(entry.start)
                                out.write(tensor.view(torch.uint8).numpy().data)
                bar.update(sizes[shard])
        if finish is not None:
            finish(folder)


def _cluster_layer(
    checkpoint: Checkpoint,
    ffn: StoredFeedForward,
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
    return store.cluster(features, settings)


def _describe(
    checkpoint: Checkpoint, ffn: StoredFeedForward, result: LayerResult, num_experts: int
) -> DescribedLayer:
    gate = read_features(checkpoint, ffn, "gate")
    return DescribedLayer(
        neurons=ffn.neurons,
        expert_size=ffn.neurons // num_experts,
        inertia=result.inertia,
        random_inertia=result.random_inertia,
        source_gate=fingerprint(gate),
        clustered_gate=fingerprint(gate[result.order]),
    )


def _served_config(
    checkpoint: Checkpoint, num_experts: int, rename: Rename
) -> dict[str, Any] | None:
    """The configuration with the experts and the architecture that reads them, or None.

    ``ExpertsError`` if what it says of memory or experts cannot be served.
    """
    given = checkpoint.architecture
    name = None if given is None else rename(given)
    if name is None:
        return None
    ours = dict(checkpoint.section(CONFIG_KEY))
    try:
        PaceConfig.from_sources(ours)
        if given == name and not ours.get("experts"):
            # It had memory in these layers without saying so; beside experts that must be said.
            ours.setdefault("layers", "auto")
        ours["experts"] = merge_experts(ours.get("experts"), {"path": "."})
        experts = PaceConfig.from_sources(ours).experts
    except PaceConfigError as error:
        where = f"{checkpoint.path}/config.json"
        raise ExpertsError(f"{str(error).removesuffix('.')} (in {where}).") from None
    assert experts is not None
    experts.check_top_k(num_experts)
    return {**checkpoint.config, "architectures": [name], CONFIG_KEY: ours}


def _other_files(checkpoint: Checkpoint) -> Iterator[Path]:
    """Files besides weights, relative to the checkpoint."""
    for folder, folders, files in os.walk(checkpoint.path):
        folders[:] = [f for f in folders if f not in _SKIPPED_FOLDERS and not f.startswith(".")]
        for file in files:
            relative = Path(folder, file).relative_to(checkpoint.path)
            if not _OTHER_WEIGHTS.fullmatch(file) and file != EXPERTS_JSON:
                yield relative
