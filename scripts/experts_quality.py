"""Loss of a model on a text when each token computes a share of its experts; CPU, transformers.

    python scripts/experts_quality.py MODEL [TEXT] [--experts 64] [--tokens 6144]

Without TEXT it reads the built-in haystack with needles, which ``scripts/tiny`` was trained on.

Three rows: the router of this package; experts at random; and the experts that are in fact the
most active, which would need the dense FFN to know. Each on clustered experts and on a random
split of the same size. MODEL is a local checkpoint of the Llama kind (gate_proj, up_proj).
"""

import argparse
import random
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pacellm_vllm.evals.text import KEYS, NEEDLE, sentences
from pacellm_vllm.experts.cluster import cluster
from pacellm_vllm.experts.ffn import masked
from pacellm_vllm.experts.routing import ExpertRouter, choose

SHARES = (1.0, 0.9, 0.75, 0.5, 0.25)
MASSES = (0.95, 0.9, 0.75, 0.5)
WINDOW = 256

Rule = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def haystack() -> str:
    """30 texts with three numbers in each, which are said again at its end."""
    rng = random.Random(12345)
    texts = []
    for _ in range(30):
        text = list(islice(sentences(rng), 36))
        for key in rng.sample(KEYS, 3):
            needle = NEEDLE.format(key=key, value=rng.randrange(10, 100))
            text.insert(rng.randrange(30), needle)
            text.append(needle)
        texts.append(" ".join(text))
    return "\n".join(texts)


class Routed:
    """The forward of one transformers FFN; ``rule(x, a)`` says which experts a token computes."""

    def __init__(self, mlp: Any, num_experts: int, order: torch.Tensor) -> None:
        with torch.no_grad():
            mlp.gate_proj.weight.copy_(mlp.gate_proj.weight[order])
            mlp.up_proj.weight.copy_(mlp.up_proj.weight[order])
            mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order])
        self.mlp = mlp

        def act(x: torch.Tensor) -> torch.Tensor:
            gate, up = x.chunk(2, dim=-1)
            return mlp.act_fn(gate) * up

        self.router = ExpertRouter(num_experts, mlp.gate_proj.in_features, act, top_k=1)
        self.router.fill(mlp.gate_proj.weight, mlp.up_proj.weight)
        self.rule: Rule | None = None
        self.computed = self.held = self.tokens = 0.0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        a = self.mlp.act_fn(self.mlp.gate_proj(x)) * self.mlp.up_proj(x)
        if self.rule is not None:
            flat = a.flatten(0, 1)
            chosen = self.rule(x.flatten(0, 1), flat)
            kept = masked(flat, chosen)
            self.computed += float(chosen.float().mean(-1).sum())
            self.held += float((kept.abs().sum(-1) / flat.abs().sum(-1)).sum())
            self.tokens += len(flat)
            a = kept.view_as(a)
        return self.mlp.down_proj(a)


def rules(ffn: Routed, name: str, top_k: int | None, mass: float | None) -> Rule:
    experts = ffn.router.num_experts
    if name == "router":
        score = ffn.router.scores if mass is None else ffn.router.expected_mass
        return lambda x, a: choose(score(x), top_k, mass)
    if name == "random":
        return lambda x, a: choose(torch.rand(len(x), experts), top_k, mass)
    return lambda x, a: choose(a.abs().unflatten(-1, (experts, -1)).sum(-1), top_k, mass)


@torch.inference_mode()
def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = args.text.read_text() if args.text else haystack()
    tokens = torch.tensor(tokenizer(text)["input_ids"][: args.tokens])
    batches = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW).split(4)
    for split in ("clustered", "random split"):
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
        ffns = []
        for layer in model.model.layers:
            rows = layer.mlp.gate_proj.weight
            order = cluster(rows, args.experts).order
            if split != "clustered":
                order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
            ffns.append(Routed(layer.mlp, args.experts, order))
            layer.mlp.forward = ffns[-1]

        def loss(model: Any = model) -> float:
            total = sum(model(b, labels=b).loss.item() * len(b) for b in batches)
            return total / sum(len(b) for b in batches)

        if split == "clustered":
            print(f"{args.experts} experts, {sum(map(len, batches)) * WINDOW} tokens, ", end="")
            print(f"loss when dense {loss():.3f}", flush=True)
        cases = [("top_k", s, round(s * args.experts), None) for s in SHARES]
        cases += [("mass", m, None, m) for m in MASSES]
        for name in ("router", "random", "most active"):
            for kind, value, top_k, mass in cases:
                if kind == "mass" and (name != "router" or split != "clustered"):
                    continue
                for ffn in ffns:
                    ffn.rule = rules(ffn, name, top_k, mass)
                    ffn.computed = ffn.held = ffn.tokens = 0.0
                found = loss()
                computed = sum(f.computed for f in ffns) / sum(f.tokens for f in ffns)
                held = sum(f.held for f in ffns) / sum(f.tokens for f in ffns)
                print(
                    f"{split:12} | {name:11} | {kind} {value:4.0%} | computed {computed:4.0%} | "
                    f"activation {held:4.0%} | loss {found:.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("text", metavar="TEXT", type=Path, nargs="?")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=6144)
    parser.add_argument("--threads", type=int, default=1)
    main(parser.parse_args())
