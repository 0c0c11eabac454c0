"""Changes to the memory that might make it help, tried beside the package on transformers.

    python scripts/attempts.py MODEL [--names "centred;gated"] [--texts 8] [--items 36] [--seed 0]

Each row of VARIANTS is one change to what is stored, what is read back or when it is written.
Prints text loss by position and needles found beyond the training length, with differences to no
memory and paired bootstrap 95 % intervals. ``official`` and ``paper`` are restated here; their
losses agree with the engine's (`pacellm eval loss`).
"""

import argparse
import random
from dataclasses import dataclass

import torch
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from pacellm_vllm.evals.bootstrap import paired_difference
from pacellm_vllm.evals.niah import Grid, make_items
from pacellm_vllm.evals.text import sentences

SEGMENT, SLOTS, INSERTIONS = 64, 100, 16
RANGES = ((0, 320), (320, 1280), (1280, 2560))
LENGTHS = (1280, 2560)
BATCH = 12


@dataclass(frozen=True)
class Variant:
    """The published rules with a change.

    ``centre``: activations are compared after the mean of all earlier segments is taken off.
    ``whole``: a middling match is read like a close one, not at half weight. ``gate``: alpha grows
    with the best similarity, from 0 at theta_low to alpha at 1. ``write``: ``low`` as published;
    ``surprise`` keeps those of all tokens whose next token was least expected.
    ``value``: a token's ``own`` output; that of the ``next`` token; or the ``outcome``, the
    direction of activation that would have raised the next token's logit over what was expected,
    which is added instead of blended (last layer only).
    """

    layers: tuple[int, ...] = (1, 3)
    alpha: float = 0.2
    theta_high: float = 0.75
    theta_low: float = 0.25
    top_k: int = 5
    negative_k: int = 2
    noise: float = 0.1
    self_weight: float = 0.0
    momentum: float = 0.5
    paper: bool = False
    centre: bool = False
    whole: bool = False
    gate: bool = False
    write: str = "low"
    value: str = "own"


PAPER = {"alpha": 1.0, "theta_high": 0.7, "theta_low": 0.3, "self_weight": 0.5, "paper": True}
OUTCOME = {"layers": (3,), "write": "surprise", "value": "outcome", "noise": 0.0, "gate": True}
VARIANTS = {
    "official": Variant(),
    "paper": Variant(**PAPER),
    "no noise": Variant(noise=0.0),
    "no merging": Variant(momentum=1.0),
    "no merging, no noise, one slot": Variant(momentum=1.0, noise=0.0, top_k=1),
    "centred": Variant(centre=True),
    "whole": Variant(whole=True, noise=0.0),
    "gated": Variant(gate=True, noise=0.0),
    "centred, whole, gated": Variant(centre=True, whole=True, gate=True, noise=0.0),
    "surprising tokens": Variant(write="surprise", noise=0.0),
    "next token's value": Variant(value="next", noise=0.0),
    "outcome": Variant(**OUTCOME, alpha=0.5),
    "outcome, less": Variant(**OUTCOME, alpha=0.25),
    "outcome, one slot": Variant(**OUTCOME, alpha=0.5, top_k=1),
    "outcome, one slot, centred": Variant(**OUTCOME, alpha=0.5, top_k=1, centre=True),
}


class Bank:
    """One text's memory in one layer: keys, values [m, D], m at most SLOTS, and usage [m].

    Where surprising tokens are kept, ``usage`` is how surprising they were.
    """

    def __init__(self, variant: Variant, width: int) -> None:
        self.variant = variant
        self.keys = torch.zeros(0, width)
        self.values = torch.zeros(0, width)
        self.usage = torch.zeros(0)
        self.total, self.count = torch.zeros(width), 0

    def similarities(self, a: torch.Tensor) -> torch.Tensor:
        """Cosines [S, m] of a [S, D] with the keys."""
        mean = self.total / max(self.count, 1) if self.variant.centre else 0.0
        return normalize(a - mean, dim=1) @ normalize(self.keys - mean, dim=1).T

    def read(self, a: torch.Tensor) -> torch.Tensor:
        """What the FFN continues with, [S, D], in place of a [S, D]."""
        v = self.variant
        if not len(self.keys):
            return a
        sims = self.similarities(a)
        best, top = sims.topk(min(v.top_k, len(self.keys)))
        found = self.values[top].mean(1)
        high = best[:, :1] > v.theta_high
        reads = best[:, :1] > v.theta_low
        alpha = torch.full_like(best[:, :1], v.alpha)
        if v.gate:
            alpha = alpha * ((best[:, :1] - v.theta_low) / (1 - v.theta_low)).clamp(0, 1)
        if v.value == "outcome":
            return torch.where(reads, a + alpha * found, a)
        if v.noise:
            least = (-sims).topk(min(v.negative_k, len(self.keys))).indices
            noise = v.noise * self.values[least].mean(1)
        else:
            noise = 0.0
        middling = found if v.whole else 0.5 * found + v.self_weight * a
        recalled = torch.where(high, found, middling) + noise
        return torch.where(reads, (1 - alpha) * a + alpha * recalled, a)

    def write(self, a: torch.Tensor, value: torch.Tensor, surprise: torch.Tensor) -> None:
        """Commit a segment: a, value [n, D], surprise [n] of the tokens after each."""
        if self.variant.write == "surprise":
            self.usage = torch.cat([self.usage, surprise])
            kept = self.usage.topk(min(SLOTS, len(self.usage))).indices.sort().values
            self.keys = torch.cat([self.keys, a])[kept]
            self.values = torch.cat([self.values, value])[kept]
            self.usage = self.usage[kept]
        else:
            self._write_published(a, value)
        self.total, self.count = self.total + a.sum(0), self.count + len(a)

    def _write_published(self, a: torch.Tensor, value: torch.Tensor) -> None:
        v, m, p = self.variant, len(self.keys), self.variant.momentum
        low = torch.ones(len(a), dtype=torch.bool)
        if m:
            best, top = self.similarities(a).topk(min(v.top_k, m))
            mean = best.mean(1)
            high, low = mean > v.theta_high, mean <= v.theta_low
            mid = ~(high | low)
            if mid.any():
                slots = top[mid].unique()
                key, new = (a, a) if v.paper else (a[mid], value[mid])
                self.keys[slots] = p * self.keys[slots] + (1 - p) * key.mean(0)
                self.values[slots] = p * self.values[slots] + (1 - p) * new.mean(0)
                self.usage[slots] += 1
            if v.paper:
                hits = top[high].flatten()
                self.usage.index_add_(0, hits, torch.ones(len(hits)))
        a, value = a[low], value[low]
        free = SLOTS - m
        replaced = self.usage.argsort(stable=True)[: min(INSERTIONS, max(len(a) - free, 0))]
        self.keys = torch.cat([self.keys, a[:free]])
        self.values = torch.cat([self.values, value[:free]])
        self.usage = torch.cat([self.usage, torch.ones(min(len(a), free))])
        for old, new in ((self.keys, a), (self.values, value)):
            old[replaced] = new[free : free + len(replaced)]
        self.usage[replaced] = 1


class Reader:
    """A model that reads texts of one length in segments, with a memory or without."""

    def __init__(self, path: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.banks: dict[int, list[Bank]] = {}
        self.seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for index, layer in enumerate(self.model.model.layers):
            layer.mlp.down_proj.register_forward_pre_hook(
                lambda _, given, index=index: self._look_up(index, given[0])
            )

    def _look_up(self, index: int, a: torch.Tensor) -> torch.Tensor | None:
        if index not in self.banks:
            return None
        o = torch.stack([bank.read(row) for bank, row in zip(self.banks[index], a, strict=True)])
        self.seen[index] = (a, o)
        return o

    @torch.no_grad()
    def read(
        self, tokens: torch.Tensor, variant: Variant | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses [B, L - 1] of tokens [B, L] after the first, and the likeliest next ones [B]."""
        width = self.model.config.intermediate_size
        layers = variant.layers if variant else ()
        self.banks = {i: [Bank(variant, width) for _ in tokens] for i in layers}
        cache, losses = DynamicCache(), []
        for begin in range(0, tokens.shape[1], SEGMENT):
            now = tokens[:, begin : begin + SEGMENT]
            logits = self.model(now, past_key_values=cache, use_cache=True).logits
            after = tokens[:, begin + 1 : begin + SEGMENT + 1]
            log_p = logits[:, : after.shape[1]].log_softmax(-1)
            losses.append(-log_p.gather(2, after[..., None])[..., 0])
            if now.shape[1] == SEGMENT and begin + SEGMENT < tokens.shape[1]:
                self._commit(variant, log_p, after, losses[-1])
        return torch.cat(losses, 1), logits[:, -1].argmax(-1)

    def _commit(
        self,
        variant: Variant | None,
        log_p: torch.Tensor,
        after: torch.Tensor,
        loss: torch.Tensor,
    ) -> None:
        """At a segment's end what follows its last token is not known: it stores nothing there."""
        for index, banks in self.banks.items():
            a, o = self.seen[index]
            kept = slice(None) if variant.write == "low" and variant.value == "own" else slice(-1)
            if variant.value == "outcome":
                values = self._outcome(index, a, log_p, after)
            else:
                values = o if variant.value == "own" else torch.cat([o[:, 1:], o[:, -1:]], 1)
            for b, bank in enumerate(banks):
                bank.write(a[b, kept], values[b, kept], loss[b, kept])

    def _outcome(
        self, index: int, a: torch.Tensor, log_p: torch.Tensor, after: torch.Tensor
    ) -> torch.Tensor:
        """Directions [B, S, D] as long as a that raise the next token's logit over the expected."""
        head = self.model.lm_head.weight * self.model.model.norm.weight
        wanted = head[after] - log_p.exp() @ head
        down = self.model.model.layers[index].mlp.down_proj.weight
        return normalize(wanted @ down, dim=-1) * a.norm(dim=-1, keepdim=True)


def texts_of(tokenizer: object, count: int, tokens: int, seed: int) -> torch.Tensor:
    """[count, tokens]: with seed 0, the built-in texts of `pacellm eval loss`."""
    rows = []
    for number in range(count):
        source = sentences(random.Random(1000 * seed + number))
        words = " ".join(next(source) for _ in range(tokens // 8))
        rows.append(tokenizer(words).input_ids[:tokens])
    return torch.tensor(rows)


def needles_of(
    tokenizer: object, length: int, items: int, seed: int
) -> list[tuple[torch.Tensor, list[int]]]:
    """Batches of prompts [B, L] of about ``length`` tokens, their oldest cut off to be of one
    length, and the tokens of the answers."""
    depths = (10, 30, 50, 70, 90)
    grid = Grid((length,), depths, samples=-(-items // len(depths)), needles=3, digits=2, seed=seed)
    made = list(make_items(grid, tokenizer))[:items]
    batches = []
    for begin in range(0, len(made), BATCH):
        group = made[begin : begin + BATCH]
        shortest = min(len(item.prompt) for item in group)
        prompts = torch.tensor([item.prompt[-shortest:] for item in group])
        answers = [tokenizer(f" {item.answer}").input_ids[0] for item in group]
        batches.append((prompts, answers))
    return batches


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    tokenizer, reader = AutoTokenizer.from_pretrained(args.model), Reader(args.model)
    texts = texts_of(tokenizer, args.texts, RANGES[-1][1], args.seed)
    needles = {length: needles_of(tokenizer, length, args.items, args.seed) for length in LENGTHS}
    names = args.names.split(";") if args.names else list(VARIANTS)
    print("| | " + " | ".join(f"loss, {a} to {b}" for a, b in RANGES), end=" | ")
    print(" | ".join(f"found in {length}" for length in LENGTHS) + " |")
    print("|---" * (1 + len(RANGES) + len(LENGTHS)) + "|")
    first: list[list[float]] = []
    for name in ["off", *names]:
        variant = VARIANTS.get(name)
        loss, _ = reader.read(texts, variant)
        scores = [loss[:, a : min(b, loss.shape[1])].mean(1).tolist() for a, b in RANGES]
        for batches in needles.values():
            said = [reader.read(prompts, variant)[1].tolist() for prompts, _ in batches]
            answers = [answer for _, batch in batches for answer in batch]
            tokens = [token for batch in said for token in batch]
            scores.append([float(t == a) for t, a in zip(tokens, answers, strict=True)])
        if first:
            cells = [str(paired_difference(a, b)) for a, b in zip(first, scores, strict=True)]
        else:
            first, cells = scores, [f"{sum(row) / len(row):.3f}" for row in scores]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--names", help="rows of VARIANTS with ; between (all)")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--items", type=int, default=36)
    parser.add_argument("--seed", type=int, default=0, help="of texts and items")
    main(parser.parse_args())
