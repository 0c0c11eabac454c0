"""Orders of layers already clustered, kept between runs."""

import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pacellm_vllm.experts.cluster import cluster, resolve_assignment
from pacellm_vllm.experts.settings import ClusterSettings

CACHE_FORMAT = 2
# Of one neuron, whose row has length 1.
NO_INERTIA = 1e-5


@dataclass(frozen=True)
class LayerResult:
    """``order`` [D] int64: neuron ``order[j]`` of the input is neuron j of the output."""

    order: torch.Tensor
    inertia: float
    random_inertia: float

    @property
    def explained(self) -> float | None:
        """Share of a random split's inertia that this one does not have.

        None where that is rounding alone: the neurons are alike, or each has an expert.
        """
        if self.random_inertia <= NO_INERTIA * len(self.order):
            return None
        return 1 - self.inertia / self.random_inertia


class ResultCache:
    """Orders of layers already clustered, by a hash of their features and settings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def key(self, features: torch.Tensor, settings: ClusterSettings) -> str:
        """sha256 over the format, the settings, and dtype, shape and bytes of ``features``."""
        about = {**asdict(settings), "assignment": resolve_assignment(settings.assignment)}
        about |= {
            "format": CACHE_FORMAT,
            "dtype": str(features.dtype),
            "shape": list(features.shape),
        }
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        digest.update(features.contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def cluster(self, features: torch.Tensor, settings: ClusterSettings) -> LayerResult:
        """The result for ``features`` [D, F], stored or made now; by one process at a time."""
        key = self.key(features, settings)
        result = self.get(key, features.shape[0])
        if result is not None:
            return result
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / f"{key}.lock"):
            result = self.get(key, features.shape[0])
            if result is None:
                found = cluster(
                    features, settings.num_experts, settings.seed, assignment=settings.assignment
                )
                result = LayerResult(found.order, found.inertia, found.random_inertia)
                self.put(key, result)
        return result

    def get(self, key: str, neurons: int) -> LayerResult | None:
        """The stored result, or None; a damaged one counts as none."""
        try:
            about = json.loads((self.folder / f"{key}.json").read_text())
            order = load_file(self.folder / f"{key}.safetensors")["order"]
            result = LayerResult(order, float(about["inertia"]), float(about["random_inertia"]))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            return None
        return result if is_permutation(order, neurons) else None

    def put(self, key: str, result: LayerResult) -> None:
        """Store ``result``; another process sees it whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {"inertia": result.inertia, "random_inertia": result.random_inertia}
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            save_file({"order": result.order}, Path(folder, "order"))
            Path(folder, "about").write_text(json.dumps(about))
            os.replace(Path(folder, "about"), self.folder / f"{key}.json")
            os.replace(Path(folder, "order"), self.folder / f"{key}.safetensors")


def is_permutation(order: torch.Tensor, neurons: int) -> bool:
    """Whether ``order`` is [neurons] int64 with each neuron once."""
    return order.dtype == torch.int64 and torch.equal(order.sort().values, torch.arange(neurons))


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/pacellm/experts``, by default under ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "pacellm", "experts")
