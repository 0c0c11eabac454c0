"""What is stored beside a clustered checkpoint: its orders, and which weights they are for."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pacellm_vllm.experts.cache import is_permutation
from pacellm_vllm.experts.cluster import resolve_assignment
from pacellm_vllm.experts.errors import ExpertsError
from pacellm_vllm.experts.files import read_json
from pacellm_vllm.experts.settings import ClusterSettings

EXPERTS_JSON = "pacellm_experts.json"
# In a folder of its own: vLLM loads every safetensors file beside the shards as weights.
EXPERTS_ORDERS = "pacellm_experts/orders.safetensors"
DESCRIPTION_FORMAT = 2


@dataclass(frozen=True)
class DescribedLayer:
    """One layer of a description.

    ``neurons`` D, ``expert_size`` D / K, how well the experts fit (see ``Clustering``), and
    :func:`fingerprint` of the gate's rows in the checkpoint that was clustered and in the
    result.
    """

    neurons: int
    expert_size: int
    inertia: float
    random_inertia: float
    source_gate: str
    clustered_gate: str


class _Description(BaseModel):
    """What is read of a description."""

    num_experts: PositiveInt
    layers: dict[NonNegativeInt, DescribedLayer] = Field(min_length=1)


@dataclass(frozen=True)
class StoredExperts:
    """A directory's description: K experts in each of ``layers``."""

    folder: Path
    num_experts: int
    layers: Mapping[int, DescribedLayer]

    def order_for(self, layer: int, gate: torch.Tensor) -> torch.Tensor | None:
        """The order [D] int64 for a layer whose gate has these rows [D, H].

        None if they are in expert order already. ``ExpertsError`` if they are another model's or
        the orders are damaged.
        """
        about = self.layers[layer]
        found = fingerprint(gate)
        if found == about.clustered_gate:
            return None
        if found != about.source_gate:
            raise ExpertsError(
                f"pacellm: {self.folder} is for another model: its layer {layer} was made from "
                "other gate weights; cluster this one with pacellm cluster."
            )
        order = self.read_order(layer)
        if fingerprint(gate[order.to(gate.device)]) != about.clustered_gate:
            raise ExpertsError(
                f"pacellm: the order of layer {layer} in {self.folder / EXPERTS_ORDERS} is not the "
                f"one that {EXPERTS_JSON} describes; write it again with pacellm cluster."
            )
        return order

    def read_order(self, layer: int) -> torch.Tensor:
        """The stored order [D] int64; ``ExpertsError`` if it is missing or no permutation."""
        path = self.folder / EXPERTS_ORDERS
        try:
            with safe_open(path, framework="pt") as opened:
                order = opened.get_tensor(f"layers.{layer}.order")
        except (SafetensorError, OSError) as error:
            raise ExpertsError(
                f"pacellm: the order of layer {layer} cannot be read from {path} ({error}); write "
                "it again with pacellm cluster."
            ) from None
        if not is_permutation(order, self.layers[layer].neurons):
            raise ExpertsError(
                f"pacellm: the order of layer {layer} in {path} is no permutation of "
                f"{self.layers[layer].neurons} neurons; write it again with pacellm cluster."
            )
        return order


def fingerprint(gate: torch.Tensor) -> str:
    """sha256 over dtype, shape and bytes of the gate's rows [D, H], as the checkpoint has them."""
    digest = hashlib.sha256(f"{gate.dtype} {list(gate.shape)}".encode())
    digest.update(gate.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_experts(
    folder: Path,
    settings: ClusterSettings,
    layers: Mapping[int, DescribedLayer],
    orders: Mapping[int, torch.Tensor],
) -> None:
    """Write the description and the orders into ``folder``."""
    path = folder / EXPERTS_ORDERS
    path.parent.mkdir()
    save_file({f"layers.{layer}.order": order for layer, order in orders.items()}, path)
    description = {
        "format": DESCRIPTION_FORMAT,
        **asdict(settings),
        "assignment": resolve_assignment(settings.assignment),
        "orders": EXPERTS_ORDERS,
        "layers": {str(layer): asdict(about) for layer, about in layers.items()},
    }
    (folder / EXPERTS_JSON).write_text(json.dumps(description, indent=2) + "\n")


def open_experts(path: str | Path) -> StoredExperts:
    """Read the description in directory ``path``, or of the hub model of that name.

    Raises ``ExpertsError`` about a directory without one, or one that this version cannot read.
    """
    folder = _find(path)
    about: dict[str, Any] = read_json(folder / EXPERTS_JSON)
    if about.get("format") != DESCRIPTION_FORMAT:
        raise ExpertsError(
            f"pacellm: {folder / EXPERTS_JSON} has format {about.get('format')!r}, this version "
            f"reads {DESCRIPTION_FORMAT}; write it again with pacellm cluster."
        )
    try:
        found = _Description.model_validate(about)
    except ValidationError as error:
        first = error.errors()[0]
        raise ExpertsError(
            f"pacellm: {folder / EXPERTS_JSON} is damaged ({'.'.join(map(str, first['loc']))}: "
            f"{first['msg']}); write it again with pacellm cluster."
        ) from None
    return StoredExperts(folder, found.num_experts, found.layers)


def _find(path: str | Path) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
        from huggingface_hub.errors import LocalEntryNotFoundError as NotFound

        try:
            folder = Path(snapshot_download(str(path), allow_patterns=["pacellm_experts*"]))
        except (HfHubHTTPError, HFValidationError, NotFound, OSError, ValueError):
            raise ExpertsError(
                f"pacellm: experts.path = {str(path)!r} is neither a directory nor a hub model "
                "that can be downloaded; it must be what pacellm cluster wrote."
            ) from None
    if not (folder / EXPERTS_JSON).is_file():
        raise ExpertsError(
            f"pacellm: experts.path = {str(path)!r} has no {EXPERTS_JSON}; it must be what pacellm "
            "cluster wrote."
        )
    return folder
