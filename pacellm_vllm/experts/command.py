"""``pacellm cluster MODEL OUT``: a checkpoint with its FFN neurons in equal, contiguous experts."""

import argparse
import signal
import sys
from pathlib import Path
from typing import Any, get_args

from pacellm_vllm.experts.errors import ExpertsError
from pacellm_vllm.experts.settings import Assignment, ClusterSettings, Features
from pacellm_vllm.sentences import first_line


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register ``cluster``; its ``run(args)`` is :func:`main_cluster`."""
    parser = subparsers.add_parser(
        "cluster",
        help="group FFN neurons into experts",
        description="Writes MODEL to OUT with the neurons of each FFN grouped into equal experts "
        "(PaceLLM, Sec. 3.2.2). OUT computes what MODEL computes. A run that was interrupted "
        "continues where it stopped.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint directory or hub name")
    parser.add_argument("out", metavar="OUT", help="directory to create")
    parser.add_argument("--experts", type=int, default=64, help="experts per layer (64)")
    parser.add_argument(
        "--layers", type=parse_layers, help="such as 12,26 or 0-15 (0-based; default: all)"
    )
    parser.add_argument(
        "--features",
        choices=get_args(Features),
        default="gate",
        help="what neurons are compared by: rows of the gate projection (default), of gate and "
        "up, or given activations",
    )
    parser.add_argument(
        "--activations",
        metavar="FILE",
        help="safetensors with [neurons, samples] tensors named layers.<i>",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first centres (0)")
    parser.add_argument(
        "--assignment",
        choices=get_args(Assignment),
        default="auto",
        help="exact (flow, needs OR-tools) or swaps; default: flow where installed",
    )
    parser.add_argument("--cache", metavar="DIR", help="per-layer results (~/.cache/pacellm)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.set_defaults(run=main_cluster)
    return parser


def parse_layers(text: str) -> list[int] | None:
    """``12,26``, ``0-15`` and mixtures of them as a list; ``all`` as None."""
    if text == "all":
        return None
    layers: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            layers += range(int(first), int(last or first) + 1)
    except ValueError:
        layers = []
    if not layers:
        raise argparse.ArgumentTypeError("a list such as 12,26 or 0-15, or all")
    return layers


def main_cluster(args: argparse.Namespace) -> int:
    """Run ``pacellm cluster``; returns the exit status: 0, or 130 (Ctrl-C).

    Raises ``ExpertsError`` as :func:`cluster_checkpoint`.
    """
    # vLLM, torch and scikit-learn take seconds to import: not for --help or a typo.
    from pacellm_vllm.experts.rewrite import cluster_checkpoint
    from pacellm_vllm.models.table import experts_architecture

    settings = ClusterSettings(args.experts, args.features, args.seed, args.assignment)
    # An ordinary kill has to clean up as Ctrl-C does.
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        results = cluster_checkpoint(
            find_model(args.model),
            args.out,
            settings,
            layers=args.layers,
            activations=args.activations,
            cache=args.cache,
            rename=experts_architecture,
            progress=not args.quiet,
        )
    except KeyboardInterrupt:
        print(
            "pacellm: interrupted; the output directory was not made, and the same command "
            "continues from the layers that were done.",
            file=sys.stderr,
        )
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    found = [r.explained for r in results.values() if r.explained is not None]
    explained = (
        f"they explain {100 * min(found):.1f} to {100 * max(found):.1f} % of the variance between "
        "neurons, beyond a random split"
        if found
        else "any split is as good, since nothing varies between neurons beyond it"
    )
    print(f"pacellm: {args.out} has {len(results)} layers of {args.experts} experts; {explained}.")
    return 0


def find_model(model: str) -> Path:
    """The directory of a checkpoint; a hub name is downloaded. ``ExpertsError`` if that fails."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py", "*.md"]
    try:
        return Path(snapshot_download(model, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ExpertsError(
            f"pacellm: {model} is neither a directory nor a model that can be downloaded: "
            f"{first_line(error)}"
        ) from error


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt
