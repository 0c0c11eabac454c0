"""A bank kept across requests: what it changes in a text that goes on, and in a question.

    PYTHONPATH=.:research/recall python research/recall/carried.py MODEL WORK --data D [--count 60]

(text) The first tokens of a text are one request, those behind them the next, whose loss is
measured alone, with the bank that the first request left, with the bank that another text left, and
behind the first tokens. (needle) A text with needles is one request, the question for one of them
the next. Memory is the package's plain truth (``pacellm_vllm.verify.truth``) in transformers' own
modules, at the layers and with the settings that the engine has by default, but for ``--preset``
and ``--alpha``. A line an item is written to WORK; the same command goes on.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from recall_items import essays, needles
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from pacellm_vllm.config import PaceConfig
from pacellm_vllm.evals.bootstrap import paired_difference
from pacellm_vllm.evals.records import Records
from pacellm_vllm.verify.truth import true_outputs

FIRST, NEXT = 3072, 1024
NEEDLE_TOKENS = 2048

# Of one memory layer, the activations [T, D] of an earlier request.
Left = dict[int, torch.Tensor]


class Remembering:
    """A model whose memory layers start a request with what an earlier one ``left``."""

    def __init__(self, path: Any, **pace: Any) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        config = PaceConfig.from_sources(pace)
        self.rules = config.rules()
        self.layers = config.resolve_layers(self.model.config.num_hidden_layers)
        self._read: dict[int, list[torch.Tensor]] = {}
        self._acts = False
        for index in self.layers:
            down = self.model.model.layers[index].mlp.down_proj
            down.register_forward_pre_hook(lambda _, given, i=index: self._remember(i, given[0]))

    def _remember(self, layer: int, a: torch.Tensor) -> tuple[torch.Tensor] | None:
        if not self._acts:
            return None
        read = self._read.setdefault(layer, [])
        read.append(a[0])
        return (true_outputs(torch.cat(read), self.rules, a.dtype).outputs[None, -a.shape[1] :],)

    def losses(self, ids: Sequence[int], memory: bool, left: Left | None = None) -> torch.Tensor:
        """Of all of ``ids`` but the first, in nats [T - 1]."""
        self._acts = memory
        self._read = {layer: [a] for layer, a in (left or {}).items()}
        cache, found = DynamicCache(), []
        tokens = torch.tensor(ids)
        for begin in range(0, len(ids), self.rules.segment_size):
            part = tokens[begin : begin + self.rules.segment_size]
            with torch.no_grad():
                logits = self.model(part[None], past_key_values=cache).logits[0].float()
            after = tokens[begin + 1 : begin + len(part) + 1]
            found.append(
                torch.nn.functional.cross_entropy(logits[: len(after)], after, reduction="none")
            )
        return torch.cat(found)

    def left(self) -> Left:
        """What the last request leaves: the activations of its whole segments."""
        size = self.rules.segment_size
        read = {layer: torch.cat(parts) for layer, parts in self._read.items()}
        return {layer: a[: len(a) // size * size] for layer, a in read.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--count", type=int, default=60, help="needles, and texts at most")
    parser.add_argument("--preset", default="gentle")
    parser.add_argument("--alpha", type=float, help="the preset's unless said")
    args = parser.parse_args()
    memory = {"preset": args.preset} | ({} if args.alpha is None else {"alpha": args.alpha})
    settings = {"experiment": "carried", "model": Path(args.model).name, **memory}
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = Remembering(args.model, **memory)
    with Records(args.out / f"carried-{args.preset}.jsonl", settings) as records:
        texts = [*essays(tokenizer, args.data, True), *essays(tokenizer, args.data, False)]
        long = [text[: FIRST + NEXT] for text in texts if len(text) >= FIRST + NEXT]
        other: Left | None = None
        for number, text in enumerate(long[: args.count]):
            if ("text", str(number)) in records.done:
                continue
            if other is None:
                model.losses(long[number - 1][:FIRST], True)
                other = model.left()
            first, after = text[:FIRST], text[FIRST:]
            whole = float(model.losses(text, False)[-NEXT + 1 :].mean())
            model.losses(first, True)
            left = model.left()
            records.add(
                {
                    "config": "text",
                    "id": str(number),
                    "alone": float(model.losses(after, False).mean()),
                    "kept": float(model.losses(after, True, left).mean()),
                    "other": float(model.losses(after, True, other).mean()),
                    "whole": whole,
                }
            )
            other = left
            report(records)
        for item in needles(tokenizer, args.data, True, args.count, NEEDLE_TOKENS):
            if ("needle", item.id) in records.done:
                continue
            model.losses(item.context, True)
            left = model.left()
            answer = tokenizer.encode(f" {item.answers[0]}", add_special_tokens=False)
            asked = [*item.question, *answer]
            score = {
                "alone": model.losses(asked, False),
                "kept": model.losses(asked, True, left),
                "whole": model.losses([*item.context, *asked], False),
            }
            means = {name: float(found[-len(answer) :].mean()) for name, found in score.items()}
            records.add({"config": "needle", "id": item.id, **means})
            report(records)


def report(records: Records) -> None:
    """Mean losses so far, and their differences to a request without what was kept."""
    for kind in ("text", "needle"):
        lines = [line for (config, _), line in records.done.items() if config == kind]
        for arm in ("alone", "kept", "other", "whole"):
            scores = [line[arm] for line in lines if arm in line]
            if scores:
                alone = [line["alone"] for line in lines]
                difference = paired_difference(alone, scores)
                mean = sum(scores) / len(scores)
                spread = f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"
                print(f"{kind:8}{arm:8}{mean:8.4f}  {spread}  {len(scores)} items", flush=True)


if __name__ == "__main__":
    main()
