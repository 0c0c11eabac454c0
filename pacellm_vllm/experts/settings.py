"""Settings of experts; nothing heavy is imported here."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError, model_validator

from pacellm_vllm.experts.errors import ExpertsError
from pacellm_vllm.sentences import first_mistake, not_allowed

Assignment = Literal["auto", "flow", "swaps"]
Features = Literal["gate", "gate_up", "activations"]

# How neurons come into expert order, and how tokens choose experts: one of each, or neither.
_SOURCES, _ROUTINGS = ("path", "num_experts"), ("top_k", "mass")

# What scikit-learn takes.
MAX_SEED = 2**32 - 1

# By these names a model's configuration says how many experts of its own it has.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

_ALLOWED = {
    "path": "a clustered checkpoint's directory, or one with its pacellm_experts.json and orders",
    "num_experts": "an integer from 1",
    "layers": "a non-empty list of distinct 0-based layer indices",
    "features": '"gate" or "gate_up"',
    "seed": f"an integer from 0 to {MAX_SEED}",
    "top_k": "an integer from 1 to the number of experts",
    "mass": "a number above 0, at most 1",
}


@dataclass(frozen=True)
class ClusterSettings:
    """What decides an order, besides the weights: see ``cluster`` and ``read_features``."""

    num_experts: int
    features: Features = "gate"
    seed: int = 0
    assignment: Assignment = "auto"


class ExpertsConfig(BaseModel):
    """``experts`` in ``{"pacellm": {...}}``: which experts, and whether tokens choose among them.

    Build it with :meth:`from_settings`, which raises ``ExpertsError`` in one sentence.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    path: str | None = Field(None, min_length=1, description="where the orders of neurons are")
    num_experts: int | None = Field(
        None, ge=1, strict=True, description="cluster into so many while loading"
    )
    layers: tuple[StrictInt, ...] | None = Field(
        None, description="decoder layers with experts; by default all, or all of path"
    )
    features: Literal["gate", "gate_up"] = Field(
        "gate", description="what neurons are compared by, with num_experts"
    )
    seed: int = Field(
        0, ge=0, le=MAX_SEED, strict=True, description="of the first centres, with num_experts"
    )
    top_k: int | None = Field(
        None, ge=1, strict=True, description="experts that a token computes; absent: all"
    )
    mass: float | None = Field(
        None,
        gt=0,
        le=1,
        strict=True,
        description="predicted share of activation that a token computes",
    )

    @model_validator(mode="after")
    def _check_together(self) -> "ExpertsConfig":
        if (self.path is None) == (self.num_experts is None):
            raise ExpertsError(
                "pacellm: experts need one of path (a clustered checkpoint or its orders) and "
                "num_experts (cluster while loading), not both."
            )
        for name in ("features", "seed"):
            if self.path is not None and name in self.model_fields_set:
                raise ExpertsError(
                    f"pacellm: experts.{name} belongs to num_experts; the orders at path are what "
                    "they are, so drop it."
                )
        if self.top_k is not None and self.mass is not None:
            raise ExpertsError("pacellm: experts take top_k or mass, not both; drop one.")
        if self.layers is not None and (
            not self.layers or min(self.layers) < 0 or len(set(self.layers)) < len(self.layers)
        ):
            raise ExpertsError(not_allowed("experts.layers", list(self.layers), _ALLOWED["layers"]))
        if self.num_experts is not None:
            self.check_top_k(self.num_experts)
        return self

    @classmethod
    def from_settings(cls, settings: Any) -> "ExpertsConfig":
        """Validate what was given; ``ExpertsError`` about the first thing that is wrong."""
        if not isinstance(settings, Mapping):
            raise ExpertsError(
                f"pacellm: experts = {settings!r} is not allowed; it must be an object such as "
                '{"path": "DIR"} or {"num_experts": 64, "top_k": 32}.'
            )
        unknown = [name for name in settings if name not in cls.model_fields]
        if unknown:
            raise ExpertsError(
                f"pacellm: unknown field experts.{unknown[0]} = {settings[unknown[0]]!r}; the "
                f"fields are {', '.join(cls.model_fields)}."
            )
        try:
            return cls.model_validate(dict(settings))
        except ValidationError as error:
            sentence = first_mistake(error, settings, _ALLOWED, prefix="experts.")
            raise ExpertsError(sentence) from None

    @property
    def routed(self) -> bool:
        """Whether tokens compute a part of the experts."""
        return self.top_k is not None or self.mass is not None

    def check_top_k(self, num_experts: int) -> None:
        """Raise ``ExpertsError`` if ``top_k`` is above the number of experts."""
        if self.top_k is not None and self.top_k > num_experts:
            raise ExpertsError(not_allowed("experts.top_k", self.top_k, f"from 1 to {num_experts}"))

    def cluster_settings(self) -> ClusterSettings:
        """How to cluster while loading; only without ``path``."""
        assert self.num_experts is not None
        return ClusterSettings(self.num_experts, self.features, self.seed)


def merge_experts(earlier: Any, later: Any) -> Any:
    """Settings of two sources, the later one winning field by field.

    What it says about where experts come from, or about routing, replaces all that the earlier
    one says about that.
    """
    if not isinstance(earlier, Mapping) or not isinstance(later, Mapping):
        return later
    kept = dict(earlier)
    if any(name in later for name in _SOURCES):
        kept = {name: kept[name] for name in kept if name in _ROUTINGS}
    if any(name in later for name in _ROUTINGS):
        kept = {name: kept[name] for name in kept if name not in _ROUTINGS}
    return {**kept, **later}


def parse_experts(text: str) -> Any:
    """What ``--experts`` says: a number of experts, an object in JSON, or a directory."""
    try:
        given = json.loads(text)
    except ValueError:
        return {"path": text}
    return {"num_experts": given} if isinstance(given, int) else given


def check_num_experts(num_experts: int, neurons: int) -> None:
    """Raise ``ExpertsError`` naming the nearest possible K unless ``num_experts`` divides."""
    if num_experts >= 1 and neurons % num_experts == 0:
        return
    divisors = [k for k in range(1, neurons + 1) if neurons % k == 0]
    below = [k for k in divisors if k < num_experts][-1:]
    above = [k for k in divisors if k > num_experts][:1]
    raise ExpertsError(
        f"pacellm: num_experts = {num_experts} does not split {neurons} neurons into equal "
        f"experts; {' or '.join(str(k) for k in below + above)} would."
    )


def check_seed(seed: int) -> None:
    """Raise ``ExpertsError`` for a seed that cannot be one."""
    if not 0 <= seed <= MAX_SEED:
        raise ExpertsError(not_allowed("seed", seed, _ALLOWED["seed"]))


def check_ranks(num_experts: int, ranks: int) -> None:
    """Raise ``ExpertsError`` unless each tensor parallel rank can hold whole experts."""
    if num_experts % ranks:
        sizes = [n for n in range(1, num_experts + 1) if num_experts % n == 0 and n <= 4 * ranks]
        raise ExpertsError(
            f"pacellm: {num_experts} experts cannot be spread whole over {ranks} tensor parallel "
            f"ranks; --tensor-parallel-size {', '.join(map(str, sizes[:-1]))} or {sizes[-1]} can."
            if len(sizes) > 1
            else f"pacellm: {num_experts} experts cannot be spread whole over {ranks} tensor "
            "parallel ranks; --tensor-parallel-size 1 can."
        )
