"""The memory that is tried, on plain tensors, and a model read beside any engine.

A store has one compressed FFN state a token of what was read, and the token that followed it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

NEIGHBOURS = 16
SOFTNESS = 0.05  # of the gate, in cosines
Site = tuple[int, str]  # a layer, and "ffn" (its FFN's activation) or "in" (its FFN's input)


@dataclass
class Compressor:
    """Makes states ``[n, D]`` unit keys ``[n, d]``: minus ``mean`` ``[D]``, times ``projection``.

    ``projection`` ``[D, d]`` may be absent: then ``d`` is ``D``.
    """

    mean: Tensor
    projection: Tensor | None = None

    def __call__(self, states: Tensor) -> Tensor:
        centred = states.float() - self.mean
        if self.projection is not None:
            centred = centred @ self.projection
        return F.normalize(centred, dim=-1)


def random_projection(wide: int, narrow: int, seed: int = 0) -> Tensor:
    """``[wide, narrow]``, the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(wide, narrow, generator=generator) / narrow**0.5


def similarities(query: Tensor, keys: Tensor, passage: Tensor, passages: int) -> Tensor:
    """For each query token the best cosine in each passage, ``[passages, m]``.

    ``query`` ``[m, d]`` and ``keys`` ``[n, d]`` are unit, ``passage`` ``[n]`` says where a key is.
    A passage without keys has the worst of the others.
    """
    cosines = query @ keys.T
    best = torch.full((len(query), passages), -torch.inf)
    best.scatter_reduce_(1, passage.expand(len(query), -1), cosines, "amax")
    worst = torch.where(best.isinf(), torch.inf, best).amin(1, keepdim=True)
    return torch.where(best.isinf(), worst, best).T


def relevance(best: Tensor, spread: bool) -> Tensor:
    """How much more than the others each passage is asked about, ``[passages]``.

    ``best`` ``[passages, m]`` is of ``similarities``; the sum over the query's tokens of what is
    above the mean passage, with ``spread`` each token weighted by how much passages differ in it.
    """
    above = best - best.mean(0)
    if spread:
        above = above * best.std(0)
    return above.sum(1)


@dataclass
class Recall:
    """Mixes into a model's distribution what followed the most similar states.

    ``keys`` ``[n, d]`` are unit, ``follow`` ``[n]`` token ids. A distribution over the tokens that
    followed the best ``NEIGHBOURS`` (softmax of cosine / ``temperature``) gets the weight
    ``weight`` * sigmoid((best cosine - ``threshold``) / ``SOFTNESS``).
    """

    compress: Compressor
    keys: Tensor
    follow: Tensor
    temperature: float
    threshold: float
    weight: float

    def look_up(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For states ``[m, D]``: tokens and shares ``[m, k]``, and the best cosine ``[m]``."""
        cosines = self.compress(states) @ self.keys.T
        top = cosines.topk(min(NEIGHBOURS, len(self.keys)))
        shares = torch.softmax(top.values / self.temperature, -1)
        return self.follow[top.indices], shares, top.values[:, 0]

    def mix(self, states: Tensor, logprobs: Tensor) -> Tensor:
        """Log-probabilities ``[m, V]`` with the memory, from those of the model alone."""
        tokens, shares, best = self.look_up(states)
        weight = self.weight * torch.sigmoid((best - self.threshold) / SOFTNESS)[:, None]
        mixed = logprobs.exp() * (1 - weight)
        mixed.scatter_add_(1, tokens, shares * weight)
        return mixed.clamp_min(1e-12).log()


@dataclass
class Reading:
    """Log-probabilities ``[k, V]`` after the last ``k`` tokens, states ``[n, D]`` of all, cache."""

    logprobs: Tensor
    states: dict[Site, Tensor]
    cache: DynamicCache


@dataclass
class Row:
    """A prompt that was read: its cache, what may come next ``[V]``, and its memory if any."""

    cache: DynamicCache
    logprobs: Tensor
    recall: Recall | None = None
    tokens: list[int] = field(default_factory=list)


class Reader:
    """A decoder LLM of transformers on the CPU in bfloat16, with FFN states of ``sites`` kept."""

    def __init__(self, path: str, sites: Sequence[Site] = ()) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        self.layers = len(self.model.model.layers)
        self._seen: dict[Site, Tensor] = {}
        self.watch(sites)

    def watch(self, sites: Sequence[Site]) -> None:
        """Keep the states of ``sites`` too, from the next read on."""
        for site in sites:
            mlp = self.model.model.layers[site[0]].mlp
            module = mlp.down_proj if site[1] == "ffn" else mlp
            module.register_forward_pre_hook(self._keeper(site))

    def _keeper(self, site: Site) -> Any:
        def keep(module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
            self._seen[site] = arguments[0]

        return keep

    @torch.inference_mode()
    def read(self, ids: Sequence[int], last: int = 1, cache: DynamicCache | None = None) -> Reading:
        """Read ``ids`` behind ``cache``, which grows; logits are kept of the ``last`` tokens."""
        output = self.model(
            torch.tensor([list(ids)]),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=last,
        )
        states = {site: seen[0] for site, seen in self._seen.items()}
        return Reading(output.logits[0].float().log_softmax(-1), states, output.past_key_values)

    @torch.inference_mode()
    def write(self, rows: Sequence[Row], say: Site, limit: int, stop: set[int]) -> None:
        """Continue all ``rows`` greedily by at most ``limit`` tokens, each up to one of ``stop``.

        The last token of a row that stopped is the one of ``stop``. ``say`` is the site that
        memories are asked with. Rows' caches are copied.
        """
        lengths = [row.cache.get_seq_length() for row in rows]
        longest = max(lengths)
        layers = []
        for index in range(self.layers):
            kept: list[Any] = [row.cache.layers[index] for row in rows]
            parts = [(layer.keys, layer.values) for layer in kept]
            layers.append(
                tuple(
                    torch.cat(
                        [
                            F.pad(part[which], (0, 0, longest - length, 0))
                            for part, length in zip(parts, lengths, strict=True)
                        ]
                    )
                    for which in range(2)
                )
            )
        cache = DynamicCache(layers)
        seen = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
        mask = torch.cat([seen, torch.ones(len(rows), limit, dtype=torch.bool)], 1).long()
        chosen = torch.stack([row.logprobs.argmax() for row in rows])
        going, positions = list(rows), torch.tensor(lengths)
        for step in range(limit):
            for row, token in zip(going, chosen.tolist(), strict=True):
                row.tokens.append(token)
            left = [i for i, row in enumerate(going) if row.tokens[-1] not in stop]
            if step + 1 == limit or not left:
                break
            if len(left) < len(going):
                cache.batch_select_indices(torch.tensor(left))
                chosen, positions, mask = chosen[left], positions[left], mask[left]
                going = [going[i] for i in left]
            output = self.model(
                chosen[:, None],
                attention_mask=mask[:, : longest + step + 1],
                position_ids=(positions + step)[:, None],
                past_key_values=cache,
                use_cache=True,
            )
            logits = output.logits[:, -1]
            chosen = logits.argmax(-1)
            for i, row in enumerate(going):
                if row.recall is not None:
                    alone = logits[i : i + 1].float().log_softmax(-1)
                    chosen[i] = row.recall.mix(self._seen[say][i], alone).argmax()
