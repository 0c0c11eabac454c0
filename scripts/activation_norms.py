"""Which tokens' FFN activations are enormous, by layer: the attention sinks a memory would store.

    python scripts/activation_norms.py MODEL TEXT [--tokens 1024]

Runs the first tokens of a text file through transformers on the CPU. Prints a Markdown table: for
each layer the first token's norm, the median and the largest norm of the others, and whose it is.
"""

import argparse
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

LAST_LINEARS = ("down_proj", "c_proj", "fc2", "dense_4h_to_h")


def norms_by_layer(model: torch.nn.Module, ids: list[int]) -> list[list[float]]:
    """The norm of what each FFN's last linear is given, for every token."""
    found: list[list[float]] = []
    hooks = [
        module.register_forward_pre_hook(
            lambda _, given: found.append(given[0][0].float().norm(dim=-1).tolist())
        )
        for name, module in model.named_modules()
        if name.endswith(tuple(f"mlp.{last}" for last in LAST_LINEARS))
    ]
    with torch.inference_mode():
        model(torch.tensor([ids]), logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=1024)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    ids = tokenizer(args.text.read_text()).input_ids[: args.tokens]
    print("| layer | first token | median | times | largest of the others |")
    print("|---|---|---|---|---|")
    for layer, norms in enumerate(norms_by_layer(model, ids)):
        middle = median(norms)
        at = max(range(1, len(norms)), key=norms.__getitem__)
        print(
            f"| {layer} | {norms[0]:.1f} | {middle:.1f} | {norms[0] / middle:.1f} | "
            f"{norms[at]:.1f} ({tokenizer.decode([ids[at]])!r} at {at}) |"
        )


if __name__ == "__main__":
    main()
