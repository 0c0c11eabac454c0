"""``pacellm inspect experts MODEL --text FILE``: what the experts of a model do on a text.

Those of a mixture are its own; those of a dense model are clusters of neurons.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pacellm_vllm.experts.command import find_model, parse_layers
from pacellm_vllm.experts.errors import ExpertsError
from pacellm_vllm.experts.settings import ExpertsConfig


def add_parser(things: Any) -> argparse.ArgumentParser:
    """Register ``inspect experts``; its ``run(args)`` prints what it found."""
    parser = things.add_parser(
        "experts",
        help="what FFN experts do on a text",
        description="Runs MODEL on a text with transformers, on this machine's CPU, and reports "
        "how few experts hold most of a token's activation, against random splits of the same "
        "size, how neurons correlate within and between experts, and which tokens experts "
        "answer to. Of a mixture of experts it reports its own: their shares of the tokens, which "
        "are chosen together, and which tokens they answer to.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint directory or hub name")
    parser.add_argument("--text", metavar="FILE", required=True, help="a text to read")
    parser.add_argument("--experts", type=int, help="cluster into so many experts first")
    parser.add_argument("--path", metavar="DIR", help="orders written by pacellm cluster")
    parser.add_argument("--layers", type=parse_layers, help="such as 12,26 (default: all)")
    parser.add_argument(
        "--tokens",
        type=int,
        default=2048,
        help="tokens read (2048); activations take 2 bytes x layers x neurons for each in bf16",
    )
    parser.add_argument("--out", metavar="DIR", help="directory to create: experts.json, .png")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.set_defaults(run=_inspect)
    return parser


def _inspect(args: argparse.Namespace) -> None:
    try:
        from rich.console import Console

        from pacellm_vllm.experts import mixture, picture
    except ImportError as error:
        raise ExpertsError(
            f"pacellm: {error.name} is missing: pip install 'pacellm-vllm[experts]'."
        ) from None
    from pacellm_vllm.experts.folders import check_absent, clear_disk_errors, whole_directory

    if args.out:
        check_absent(Path(args.out))
    model = find_model(args.model)
    number = _routed_experts(model)
    shown: Any = mixture if number else picture
    reports, how = _measure_mixture(args, model, number) if number else _measure(args, model)
    title = f"{Path(args.model).name}: {how}"
    Console().print(shown.table(reports, title))
    if args.out:
        with clear_disk_errors(), whole_directory(Path(args.out)) as folder:
            about = {"model": args.model, "experts": how, "text": args.text, "tokens": args.tokens}
            about["layers"] = {layer: asdict(report) for layer, report in reports.items()}
            (folder / "experts.json").write_text(json.dumps(about, indent=1) + "\n")
            shown.draw(reports, title, folder / "experts.png")
        print(f"pacellm: {args.out} has experts.json and experts.png.")


def _routed_experts(folder: Path) -> int:
    from transformers import AutoConfig

    from pacellm_vllm.experts.mixture import routed_experts

    try:
        return routed_experts(AutoConfig.from_pretrained(folder))
    except (OSError, ValueError):
        # What opens the checkpoint says what is wrong with it.
        return 0


def _read(args: argparse.Namespace, folder: Path) -> tuple[Any, dict[int, str]]:
    """The text's tokens [T], and what each of them says."""
    from transformers import AutoTokenizer

    from pacellm_vllm.experts.report import read_text

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ExpertsError(
            f"pacellm: {folder} has no tokenizer that can be read ({error})."
        ) from None
    tokens = read_text(Path(args.text), tokenizer, args.tokens)
    return tokens, {int(t): str(tokenizer.decode([int(t)])) for t in tokens.unique()}


def _measure_mixture(
    args: argparse.Namespace, folder: Path, number: int
) -> tuple[dict[int, Any], str]:
    from transformers import AutoModelForCausalLM

    from pacellm_vllm.experts.mixture import measure_routing, read_routing

    if args.experts is not None or args.path is not None:
        raise ExpertsError(
            "pacellm: a mixture has experts of its own, which --experts and --path do not change; "
            "drop them."
        )
    tokens, names = _read(args, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    routing = read_routing(model, tokens, args.layers, not args.quiet)
    reports = {
        layer: measure_routing(chosen, weights, number, tokens, names)
        for layer, (chosen, weights) in routing.items()
    }
    return reports, f"its own {number} experts in {len(reports)} layers"


def _measure(args: argparse.Namespace, folder: Path) -> tuple[dict[int, Any], str]:
    from transformers import AutoModelForCausalLM

    from pacellm_vllm.experts.cache import ResultCache, default_cache
    from pacellm_vllm.experts.checkpoint import feed_forwards, open_checkpoint, read_features
    from pacellm_vllm.experts.loading import ExpertsPlan
    from pacellm_vllm.experts.orders import StoredExperts
    from pacellm_vllm.experts.report import collect, measure

    given = {"num_experts": args.experts, "path": args.path, "layers": args.layers}
    given = {name: value for name, value in given.items() if value is not None}
    if args.experts is None and args.path is None:
        given["path"] = str(folder)
    config = ExpertsConfig.from_settings(given)
    checkpoint = open_checkpoint(folder)
    ffns = feed_forwards(checkpoint, None)
    plan = ExpertsPlan.of(config, checkpoint.num_layers, ffns[0].neurons)
    tokens, names = _read(args, folder)
    orders = {}
    for layer in plan.layers:
        gate = read_features(checkpoint, ffns[layer], "gate")
        orders[layer] = (
            plan.source.order_for(layer, gate)
            if isinstance(plan.source, StoredExperts)
            else ResultCache(default_cache()).cluster(gate, plan.source).order
        )
    # The down projection, by the name that the loaded model has for it.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    outputs = {layer: ffns[layer].output for layer in plan.layers}
    named = {n for n, _ in model.named_modules()}
    modules = {i: next(n for n in named if n.endswith(name)) for i, name in outputs.items()}
    activations = collect(model, modules, tokens, not args.quiet)
    reports = {}
    for layer in plan.layers:
        a, order = activations.pop(layer), orders[layer]
        a = a if order is None else a[:, order]
        reports[layer] = measure(a, plan.num_experts, tokens, names)
    made = "clustered for this report" if args.experts else "in stored order"
    return reports, f"{plan.num_experts} experts in {len(plan.layers)} layers, {made}"
