"""The oracle: PaceLLM's memory, of activations or of FFN outputs, in plain PyTorch.

It is written from the rules alone, shares no code with the package, and is meant to be read
beside `docs/architecture.md`, "The rules". It is slow on purpose: one request, one bank per layer,
loops over tokens.

Shapes: T tokens, S tokens in a segment, D = FFN intermediate size (of outputs: hidden size),
M = bank slots, V = vocabulary.
"""

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from hf import load_model
from torch import Tensor
from transformers import DynamicCache

EPS = 1e-8
# Tokens whose squared norm is not a number up to this are unsound: the memory passes them by.
MOST_SQUARE = 1e30
# What families call the projection that ends their FFN.
OUTPUTS = ("down_proj", "dense_4h_to_h", "c_proj", "fc_out", "fc2", "w2", "output_linear")
# What families call their FFN, dense or routed, in a decoder layer.
BLOCKS = ("mlp", "block_sparse_moe", "feed_forward", "ffn", "moe", "shared_mlp")
# Whose recurrent states transformers continues by single tokens only: every forward of these reads
# its sequence from the start.
WITHOUT_CACHE = ("jamba",)

PRESETS: dict[str, dict[str, float]] = {
    "gentle": {"theta_high": 0.75, "theta_low": 0.25, "alpha": 0.02, "noise": 0.0, "clip": True},
    "official": {"theta_high": 0.75, "theta_low": 0.25, "alpha": 0.2, "noise": 0.1, "clip": False},
    "paper": {"theta_high": 0.7, "theta_low": 0.3, "alpha": 1.0, "noise": 0.1, "clip": False},
}
# More than a preset's own, for a wrong bank to be seen in what a tiny model says.
STRONGER = {"gentle": {"alpha": 0.1}}
# w_high, w_mid, w_self
BLEND = {"gentle": (1.0, 0.5, 0.0), "official": (1.0, 0.5, 0.0), "paper": (1.0, 0.5, 0.5)}


@dataclass(frozen=True)
class MemoryRules:
    """The memory's settings under their public names; build it with `MemoryRules.of`."""

    theta_high: float
    theta_low: float
    alpha: float
    noise: float
    clip: bool
    preset: str = "gentle"
    layers: tuple[int, ...] = ()
    site: str = "activation"
    bank_size: int = 100
    top_k: int = 5
    negative_k: int = 2
    segment_size: int = 1024
    max_insertions: int = 16
    momentum: float = 0.5

    @classmethod
    def of(cls, **pace: Any) -> "MemoryRules":
        """The preset's defaults, overridden by whatever `pace` names."""
        preset = pace.get("preset", "gentle")
        settings = {"preset": preset, **PRESETS[preset], **pace}
        return cls(**{**settings, "layers": tuple(settings.get("layers", ()))})


class Bank:
    """One request's memory in one layer.

    Attributes:
        keys, values: [M, D], slots in use first.
        usage: [M] fp32.
        num_valid: slots in use; they are always [0, num_valid).
        counts: how often each branch was taken. "read" and "write" hold tokens by category
            ("empty" for tokens that met an empty bank, so "low" means a real comparison; "unsound"
            for tokens that ask nothing and leave nothing), "slots" holds slots merged, filled and
            replaced and low tokens dropped.
        closest_call: how near any similarity came to deciding otherwise (a threshold, or the next
            slot in rank). A correct implementation may differ visibly from the oracle when this is
            no larger than its rounding error, so tests choose prompts where it is larger.
    """

    def __init__(self, rules: MemoryRules, dim: int, dtype: torch.dtype = torch.float32):
        self.rules = rules
        self.keys = torch.zeros(rules.bank_size, dim, dtype=dtype)
        self.values = torch.zeros(rules.bank_size, dim, dtype=dtype)
        self.usage = torch.zeros(rules.bank_size)
        self.num_valid = 0
        self.counts: dict[str, Counter[str]] = {
            "read": Counter(),
            "write": Counter(),
            "slots": Counter(),
        }
        self.closest_call = float("inf")

    def similarities(self, a: Tensor) -> Tensor:
        """Cosines of a [T, D] with the valid keys: [T, num_valid]."""
        a, keys = a.float(), self.keys[: self.num_valid].float()
        a_norm = a.norm(dim=-1).clamp_min(EPS)
        key_norm = keys.norm(dim=-1).clamp_min(EPS)
        return ((a @ keys.T) / (a_norm[:, None] * key_norm[None, :])).clamp(-1, 1)

    def unsound(self, a: Tensor) -> list[bool]:
        """Which of a [T, D] hold something that is not finite, or are too long to compare."""
        return [not square <= MOST_SQUARE for square in a.float().square().sum(dim=-1).tolist()]

    def top_slots(self, sim: Tensor) -> Tensor:
        """The k most similar slots for sim [num_valid], best first, ties to the lower slot."""
        return self._first(torch.sort(sim, descending=True, stable=True), self.rules.top_k)

    def bottom_slots(self, sim: Tensor) -> Tensor:
        """The k' least similar slots for sim [num_valid], worst first, ties to the lower slot."""
        return self._first(torch.sort(sim, stable=True), self.rules.negative_k)

    def _first(self, ranked: Any, k: int) -> Tensor:
        ordered, slots = ranked
        if 0 < k < len(slots):
            self.closest_call = min(self.closest_call, abs(ordered[k] - ordered[k - 1]).item())
        return slots[:k]

    def category(self, similarity: float) -> str:
        """Which side of the two thresholds a similarity falls on."""
        for theta in (self.rules.theta_high, self.rules.theta_low):
            self.closest_call = min(self.closest_call, abs(similarity - theta))
        if similarity > self.rules.theta_high:
            return "high"
        return "mid" if similarity > self.rules.theta_low else "low"

    def enhance(self, a: Tensor) -> tuple[Tensor, list[str]]:
        """Blend a [T, D] with what the bank recalls; the bank does not change.

        Returns o [T, D] and each token's read regime, by its largest similarity.
        """
        unsound = self.unsound(a)
        if self.num_valid == 0:
            categories = ["unsound" if bad else "empty" for bad in unsound]
            self.counts["read"].update(categories)
            return a.clone(), categories
        w_high, w_mid, w_self = BLEND[self.rules.preset]
        alpha, noise = self.rules.alpha, self.rules.noise
        outputs, categories = [], []
        for a_t, sim, bad in zip(a, self.similarities(a), unsound, strict=True):
            if bad:
                outputs.append(a_t)
                categories.append("unsound")
                continue
            x = a_t.float()
            mu_pos = self._mean_value(self.top_slots(sim), x)
            mu_neg = self._mean_value(self.bottom_slots(sim), x)
            category = self.category(sim.max().item())
            if category == "high":
                r = w_high * mu_pos + noise * mu_neg
            elif category == "mid":
                r = w_mid * mu_pos + w_self * x + noise * mu_neg
            else:
                r = x
            # In exact arithmetic (1 - alpha) a + alpha a is a, and the low regime means just that.
            outputs.append(a_t if category == "low" else ((1 - alpha) * x + alpha * r).to(a.dtype))
            categories.append(category)
        self.counts["read"].update(categories)
        return torch.stack(outputs), categories

    def _mean_value(self, slots: Tensor, x: Tensor) -> Tensor:
        """Of `slots` as x [D] reads them: [D]."""
        values = self.values[slots].float()
        if self.rules.clip:
            lengths = self.keys[slots].float().norm(dim=-1)
            values[lengths > x.norm()] *= (x.norm() / lengths[lengths > x.norm()])[:, None]
        # No slots (negative_k = 0) contribute nothing, where a mean would be NaN.
        return values.sum(dim=0) / max(len(slots), 1)

    def update(self, a: Tensor, o: Tensor) -> list[str]:
        """Commit a whole segment: a, o [S, D] in position order.

        Returns each token's write category, by the mean of its top-k similarities.
        """
        # Everything is decided against the bank the segment read, before any slot changes.
        unsound = self.unsound(a)
        tops: list[Tensor] = []
        categories: list[str] = []
        if self.num_valid == 0:
            categories = ["unsound" if bad else "empty" for bad in unsound]
        else:
            for sim, bad in zip(self.similarities(a), unsound, strict=True):
                top = torch.tensor([]) if bad else self.top_slots(sim)
                tops.append(top)
                categories.append("unsound" if bad else self.category(sim[top].mean().item()))
        self.counts["write"].update(categories)

        mid = [t for t, category in enumerate(categories) if category == "mid"]
        if mid:
            if self.rules.preset == "paper":
                sound = [t for t, bad in enumerate(unsound) if not bad]
                new_key = new_value = a[sound].float().sum(dim=0) / len(a)
            else:
                new_key, new_value = a[mid].float().mean(dim=0), o[mid].float().mean(dim=0)
            m = self.rules.momentum
            for slot in sorted({int(slot) for t in mid for slot in tops[t]}):
                self.keys[slot] = m * self.keys[slot].float() + (1 - m) * new_key
                self.values[slot] = m * self.values[slot].float() + (1 - m) * new_value
                self.usage[slot] += 1
                self.counts["slots"]["merged"] += 1

        if self.rules.preset == "paper":
            for t, category in enumerate(categories):
                if category == "high":
                    self.usage[tops[t]] += 1

        low = [t for t, category in enumerate(categories) if category in ("low", "empty")]
        free = list(range(self.num_valid, self.rules.bank_size))
        by_usage = torch.argsort(self.usage[: self.num_valid], stable=True).tolist()
        replaceable = by_usage[: self.rules.max_insertions]
        # Tokens beyond the open slots are dropped, so the two lists may differ in length.
        for t, slot in zip(low, free + replaceable, strict=False):
            self.counts["slots"]["filled" if slot in free else "replaced"] += 1
            self.keys[slot] = a[t]
            self.values[slot] = o[t]
            self.usage[slot] = 1
        self.counts["slots"]["dropped"] += max(len(low) - len(free) - len(replaceable), 0)
        self.num_valid = min(self.num_valid + len(low), self.rules.bank_size)
        return categories


class NearTie(Exception):
    """A decision lies so near a tie that a test has no use for what follows."""


class OracleModel:
    """A Hugging Face causal LM whose chosen FFNs have a memory; one request at a time.

    Args:
        path: a checkpoint directory of any decoder, loaded in fp32; of dense FFNs where the site is
            "activation".
        pace: what one writes in {"pacellm": {...}}; no layers means no memory, and no site
            "activation".
        config: overrides of fields of its Hugging Face configuration.

    After `forward` or `generate`, `banks[layer]` holds each layer's committed memory and its
    counts. Both raise `NearTie` once a bank's closest call is not above `least_gap`.
    """

    least_gap = -1.0

    def __init__(self, path: Any, pace: dict[str, Any], **config: Any):
        self.model = self.load(path, dtype=torch.float32, attn_implementation="eager", **config)
        self.pace = pace
        self.banks: dict[int, Bank] = {}
        self.widths: dict[int, int] = {}
        for index, layer in enumerate(_decoder_layers(self.model)):
            if pace.get("site") == "output":
                self.widths[index] = self.model.config.get_text_config().hidden_size
                *added, ffn = _ffns(layer)
                for part in added:
                    part.register_forward_hook(partial(self._set_aside, index))
                ffn.register_forward_hook(partial(self._remember_output, index))
            elif output := _output_projection(layer):
                self.widths[index] = getattr(output, "in_features", None) or output.weight.shape[0]
                output.register_forward_pre_hook(partial(self._remember, index))

    load = staticmethod(load_model)

    def forward(self, token_ids: list[int], **overrides: Any) -> Tensor:
        """Logits [T, V] of a sequence seen from an empty memory; overrides are pace settings."""
        self._reset(overrides)
        return self._feed(token_ids)

    def generate(
        self, prompt: list[int], max_tokens: int, **overrides: Any
    ) -> tuple[list[int], list[float]]:
        """Greedy decoding of exactly max_tokens tokens.

        Returns the tokens and the log-probability of each prompt token after the first. What was
        generated passes through the memory like the prompt; the last token never enters the model.
        """
        self._reset(overrides)
        logits = self._feed(prompt)
        logprobs = logits[:-1].log_softmax(dim=-1)
        prompt_logprobs = [logprobs[t, token].item() for t, token in enumerate(prompt[1:])]
        tokens = [int(logits[-1].argmax())]
        while len(tokens) < max_tokens:
            tokens.append(int(self._feed(tokens[-1:])[-1].argmax()))
        return tokens, prompt_logprobs

    def _reset(self, overrides: dict[str, Any]) -> None:
        self.rules = MemoryRules.of(**{**self.pace, **overrides})
        self.banks = {layer: Bank(self.rules, self.widths[layer]) for layer in self.rules.layers}
        self._segment: dict[int, list[tuple[Tensor, Tensor]]] = {i: [] for i in self.banks}
        self._cache = self._new_cache()
        self._position = 0
        self._tokens: list[int] = []
        self._outputs: dict[int, list[Tensor]] = {i: [] for i in self.banks}
        self._aside: dict[int, Tensor] = {}

    def _new_cache(self) -> DynamicCache | None:
        config = self.model.config
        if config.model_type in WITHOUT_CACHE:
            return None
        cache = DynamicCache(config=config)
        recurrent = any("Linear" in type(layer).__name__ for layer in cache.layers)
        return cache if recurrent else DynamicCache()

    @torch.no_grad()
    def _feed(self, tokens: Any) -> Tensor:
        """Append tokens to the sequence: logits [T, V]. No forward crosses a segment boundary."""
        logits = []
        size = self.rules.segment_size
        while len(tokens):
            room = size - self._position % size
            now, tokens = tokens[:room], tokens[room:]
            positions = torch.arange(self._position, self._position + len(now))[None]
            logits.append(self._logits(now, positions))
            if any(bank.closest_call <= self.least_gap for bank in self.banks.values()):
                raise NearTie
            self._position += len(now)
            if self._position % size == 0:
                self._commit()
        return torch.cat(logits)

    def _logits(self, token_ids: list[int], positions: Tensor) -> Tensor:
        """Logits [T, V] of the next tokens, at positions [1, T]."""
        if self._cache is None:
            self._tokens += token_ids
            out = self.model(input_ids=torch.tensor([self._tokens]), use_cache=False)
            return out.logits[0, -len(token_ids) :]
        out = self.model(
            input_ids=torch.tensor([token_ids]),
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        return out.logits[0]

    def _remember(self, index: int, module: Any, args: tuple[Tensor]) -> tuple[Tensor] | None:
        """What the output projection of layer `index` reads instead of a [..., T, D]."""
        if index not in self.banks:
            return None
        (a,) = args
        return (self._pass(index, a),)

    def _remember_output(self, index: int, module: Any, args: Any, returned: Any) -> Any:
        """What the FFN of layer `index` returns instead: [..., T, H], or a tuple that starts so."""
        if index not in self.banks:
            return None
        if isinstance(returned, tuple):
            return (self._pass(index, returned[0]), *returned[1:])
        return self._pass(index, self._aside.pop(index, 0) + returned)

    def _set_aside(self, index: int, module: Any, args: Any, returned: Tensor) -> Tensor | None:
        """Nothing, for what `_remember_output` adds to what comes next in layer `index`."""
        if index not in self.banks:
            return None
        self._aside[index] = returned
        return torch.zeros_like(returned)

    def _pass(self, index: int, a: Tensor) -> Tensor:
        """What the bank of layer `index` makes of a [..., T, D]."""
        flat = a.flatten(0, -2)
        if self._cache is None:
            flat = flat[self._position :]
        o, _ = self.banks[index].enhance(flat)
        self._segment[index].append((flat, o))
        if self._cache is None:
            self._outputs[index].append(o)
            o = torch.cat(self._outputs[index])
        return o.view(a.shape)

    def _commit(self) -> None:
        for index, bank in self.banks.items():
            a, o = (torch.cat(part) for part in zip(*self._segment[index], strict=True))
            bank.update(a, o)
            self._segment[index] = []


def _decoder_layers(model: Any) -> Any:
    number = model.config.get_text_config().num_hidden_layers
    (layers,) = (
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList)
        and len(module) == number
        and not any(part in name for part in ("vision", "visual"))
    )
    return layers


def _ffns(layer: torch.nn.Module) -> list[Any]:
    """The whole FFN of a Hugging Face decoder layer, or the parts that Granite's adds up."""
    found = {name: module for name, module in layer.named_children() if name in BLOCKS}
    # In the order of their calls.
    assert len(found) == 1 or sorted(found) == ["block_sparse_moe", "shared_mlp"]
    return [found[name] for name in sorted(found)]


def _output_projection(layer: torch.nn.Module) -> Any:
    """The last projection of a Hugging Face FFN, whose input is the activation a, or None."""
    found = [
        module
        for name, module in layer.named_modules()
        if name.rsplit(".", 1)[-1] in OUTPUTS and "attn" not in name
    ]
    assert len(found) <= 1
    return found[0] if found else None
