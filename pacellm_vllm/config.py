"""PaceConfig: the one configuration object, its presets and its error messages.

Read from the checkpoint's ``config.json`` key ``"pacellm"``, then from vLLM's
``--additional-config '{"pacellm": {...}}'``; the later one wins field by field.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    ValidationError,
    field_validator,
    model_validator,
)

from pacellm_vllm import CONFIG_KEY as CONFIG_KEY
from pacellm_vllm.experts.settings import ExpertsConfig, merge_experts
from pacellm_vllm.ops.rules import MemoryRules, UpdateRule
from pacellm_vllm.sentences import PaceError, first_mistake, not_allowed

if TYPE_CHECKING:
    import torch

Preset = Literal["gentle", "official", "paper"]
SiteSetting = Literal["auto", "activation", "output"]
DEFAULT_PRESET: Preset = "gentle"

# Values the presets disagree on. `official` is the published code, `paper` its text (Sec. 4.4 and
# Algorithm 1). `gentle` is official without noise, with a tenth of its alpha, and with slots
# never longer than the tokens that read them: real models lose less than 0.01 nats a token of text
# by it (docs/results.md).
PRESETS: dict[str, dict[str, float]] = {
    "gentle": {"theta_high": 0.75, "theta_low": 0.25, "alpha": 0.02, "noise": 0.0, "clip": True},
    "official": {"theta_high": 0.75, "theta_low": 0.25, "alpha": 0.2, "noise": 0.1, "clip": False},
    "paper": {"theta_high": 0.7, "theta_low": 0.3, "alpha": 1.0, "noise": 0.1, "clip": False},
}

# What was published remembers activations. Where a preset may also take outputs, models without
# activations to remember carry memory as well.
_SITES: dict[str, SiteSetting] = {"gentle": "auto", "official": "activation", "paper": "activation"}

# The paper places its two memory layers at 12 and 26 of 28 (0-based, Sec. 4.4).
PAPER_LAYERS, PAPER_DEPTH = (12, 26), 28

DEFAULT_MAX_INSERTIONS = 16

_ALLOWED = {
    "layers": 'a non-empty list of distinct 0-based layer indices, or "auto"',
    "preset": '"gentle", "official" or "paper"',
    "site": '"auto", "activation" or "output"',
    "bank_size": "an integer from 1 to 1024",
    "theta_high": "a number from -1 to 1",
    "theta_low": "a number from -1 to 1, not above theta_high",
    "top_k": "an integer from 1 to 1024",
    "negative_k": "an integer from 0 to 1024",
    "noise": "a number from 0 to 1",
    "alpha": "a number from 0 to 1",
    "segment_size": "an integer from 1 to 1048576",
    "max_insertions": "an integer from 0 to bank_size",
    "momentum": "a number from 0 to 1",
    "clip": "true or false",
    "bank_dtype": '"auto" (the model dtype) or "float32"',
    "session_tokens": "an integer from 0 to 1000000000",
    "experts": 'an object such as {"path": "DIR"} or {"num_experts": 64}',
}


class PaceConfigError(PaceError):
    """A setting that cannot be served: its message says what, why and what to do instead."""


class PaceConfig(BaseModel):
    """Settings of the memory (PaceLLM, Sec. 3.2.1).

    Raises ``PaceConfigError`` through :meth:`from_sources`; built directly, pydantic's own error.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    layers: Literal["auto"] | tuple[StrictInt, ...] = Field(
        "auto", description="0-based decoder layers that carry memory; auto: the paper's depths"
    )
    preset: Preset = Field(
        DEFAULT_PRESET, description="do no harm, the published code, or the paper's text"
    )
    site: SiteSetting = Field(
        description="what of an FFN is remembered: its activations, its outputs (of mixtures of "
        "experts, too), or auto: activations where all layers have them"
    )
    bank_size: int = Field(100, ge=1, le=1024, strict=True, description="slots M of one bank")
    theta_high: float = Field(
        ge=-1, le=1, strict=True, description="similarity above: replaced by memory"
    )
    theta_low: float = Field(
        ge=-1, le=1, strict=True, description="similarity at or below: left as it is"
    )
    top_k: int = Field(5, ge=1, le=1024, strict=True, description="most similar slots blended in")
    negative_k: int = Field(2, ge=0, le=1024, strict=True, description="least similar slots used")
    noise: float = Field(
        ge=0, le=1, strict=True, description="weight of the least similar slots (lambda)"
    )
    alpha: float = Field(
        ge=0, le=1, strict=True, description="share of the blend in the FFN activation"
    )
    segment_size: int = Field(
        1024, ge=1, le=1 << 20, strict=True, description="tokens that read one committed bank"
    )
    max_insertions: int = Field(
        ge=0, le=1024, strict=True, description="used slots replaced per segment, at most"
    )
    momentum: float = Field(
        0.5, ge=0, le=1, strict=True, description="share of the old slot kept in a merge"
    )
    clip: bool = Field(
        strict=True, description="no slot is longer, when blended in, than the token that reads it"
    )
    bank_dtype: Literal["auto", "float32"] = Field("auto", description="dtype of stored slots")
    session_tokens: int = Field(
        0, ge=0, le=10**9, strict=True, description="text that sessions keep to be read again"
    )
    experts: ExpertsConfig | None = Field(
        None, description="FFN neurons in experts: how many, or a clustered checkpoint's directory"
    )

    @field_validator("experts", mode="before")
    @classmethod
    def _read_experts(cls, given: Any) -> Any:
        return given if given is None else ExpertsConfig.from_settings(given)

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        preset = data.get("preset", DEFAULT_PRESET)
        filled: dict[str, Any] = dict(PRESETS[preset]) if preset in tuple(PRESETS) else {}
        size = data.get("bank_size", cls.model_fields["bank_size"].default)
        if isinstance(size, int):
            filled["max_insertions"] = max(0, min(DEFAULT_MAX_INSERTIONS, size))
        filled["site"] = _SITES.get(preset, "auto") if isinstance(preset, str) else "auto"
        if data.get("experts") is not None:
            filled["layers"] = ()
            # Routed FFNs hand their activations to the memory.
            filled["site"] = "activation"
        return {**filled, **data}

    @model_validator(mode="after")
    def _check_together(self) -> "PaceConfig":
        if self.theta_low > self.theta_high:
            raise PaceConfigError(
                not_allowed("theta_low", self.theta_low, f"at most theta_high = {self.theta_high}")
            )
        if self.max_insertions > self.bank_size:
            raise PaceConfigError(
                not_allowed(
                    "max_insertions", self.max_insertions, f"at most bank_size = {self.bank_size}"
                )
            )
        if self.experts is not None and self.site == "output":
            raise PaceConfigError(
                not_allowed("site", self.site, '"activation" beside experts, which are inside FFNs')
            )
        without_memory = self.layers == () and (self.experts is not None or self.session_tokens > 0)
        if (
            self.layers != "auto"
            and not without_memory
            and (
                not self.layers or min(self.layers) < 0 or len(set(self.layers)) < len(self.layers)
            )
        ):
            raise PaceConfigError(not_allowed("layers", list(self.layers), _ALLOWED["layers"]))
        return self

    @classmethod
    def from_sources(cls, *sources: Any) -> "PaceConfig":
        """Merge mappings (later wins per field) and validate.

        Raises ``PaceConfigError`` with one sentence about the first thing that is wrong.
        """
        merged: dict[str, Any] = {}
        for source in sources:
            if source is None:
                continue
            if not isinstance(source, Mapping):
                raise PaceConfigError(
                    f"pacellm: the configuration {source!r} is not valid: it must be an object "
                    "such as {'layers': [12, 26]}."
                )
            earlier = merged.get("experts")
            merged.update(source)
            if source.get("experts") is not None:
                merged["experts"] = merge_experts(earlier, source["experts"])
        unknown = [name for name in merged if name not in cls.model_fields]
        if unknown:
            raise PaceConfigError(
                f"pacellm: unknown field {unknown[0]!r} = {merged[unknown[0]]!r}; the fields are "
                f"{', '.join(cls.model_fields)}."
            )
        idle = [name for name in merged if name not in ("layers", "experts", "session_tokens")]
        with_experts = merged.get("experts") is not None
        for_sessions = merged.get("session_tokens") and "layers" in merged
        if (with_experts or for_sessions) and not merged.get("layers") and idle:
            raise PaceConfigError(
                f"pacellm: {idle[0]} = {merged[idle[0]]!r} is a setting of the memory, but "
                f"{'beside experts ' if with_experts else ''}there is none without layers; add "
                f'layers (indices, or "auto") or drop {idle[0]}.'
            )
        try:
            return cls.model_validate(merged)
        except ValidationError as error:
            raise PaceConfigError(first_mistake(error, merged, _ALLOWED)) from None

    def resolve_layers(self, num_layers: int) -> tuple[int, ...]:
        """Sorted layers with memory of ``num_layers``; ``PaceConfigError`` if one is out.

        None of them beside experts, unless ``layers`` says which, or where it says none.
        """
        if self.layers == "auto":
            return tuple(
                sorted({math.floor((i + 0.5) * num_layers / PAPER_DEPTH) for i in PAPER_LAYERS})
            )
        for index in self.layers:
            if index >= num_layers:
                raise PaceConfigError(
                    not_allowed("layers", index, f"from 0 to {num_layers - 1} for this model")
                )
        return tuple(sorted(self.layers))

    def at(self, site: SiteSetting) -> "PaceConfig":
        """The same with its ``site`` decided."""
        return self.model_copy(update={"site": site})

    def stored_dtype(self, model_dtype: "torch.dtype") -> "torch.dtype":
        """The dtype a bank's slots are stored in."""
        import torch

        return model_dtype if self.bank_dtype == "auto" else torch.float32

    def rules(self) -> MemoryRules:
        """The numbers the ops work with."""
        paper = self.preset == "paper"
        return MemoryRules(
            bank_size=self.bank_size,
            segment_size=self.segment_size,
            max_insertions=self.max_insertions,
            top_k=self.top_k,
            negative_k=self.negative_k,
            theta_high=self.theta_high,
            theta_low=self.theta_low,
            noise=self.noise,
            alpha=self.alpha,
            momentum=self.momentum,
            mid_self_weight=0.5 if paper else 0.0,
            update=UpdateRule.PAPER if paper else UpdateRule.OFFICIAL,
            clip=self.clip,
        )
