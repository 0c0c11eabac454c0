"""``pacellm inspect memory MODEL --text FILE``: what the banks of a text hold (paper, Fig. 4)."""

import argparse
import json
from pathlib import Path
from typing import Any

from pacellm_vllm.config import PaceConfig
from pacellm_vllm.evals.arguments import add_engine, given, given_text, guarded, read_model
from pacellm_vllm.evals.records import EvalError, write_whole
from pacellm_vllm.flags import add_settings, given_settings


def add_parser(things: Any) -> None:
    """Register ``inspect memory``; its ``run(args)`` prints what it found."""
    parser = things.add_parser(
        "memory",
        help="what the banks of a text hold",
        description="Runs a text through an engine with memory and reads the banks out of its "
        "pages: what slots and current activations speak for, how slots come and go, how alike "
        "they are.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint directory or hub name")
    parser.add_argument("--text", metavar="FILE", type=Path, required=True, help="a text to read")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens read, at most (4096)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="for memory.json and PNG files")
    add_engine(parser, '{"dtype": "float32"}')
    add_settings(parser)
    parser.set_defaults(run=guarded(_inspect))


def _inspect(args: argparse.Namespace) -> None:
    try:
        from rich.console import Console

        from pacellm_vllm.evals import banks
    except ImportError as error:
        raise EvalError(
            f"pacellm: {error.name} is missing: pip install 'pacellm-vllm[eval]'."
        ) from None
    from pacellm_vllm.evals.plots import memory_map, require_matplotlib, slot_history

    if args.out:
        require_matplotlib()
    tokenizer, tokens, config = _read(args)
    layers = banks.read_banks(_record(args, tokens, config), tokenizer)
    Console().print(banks.table(layers, f"{args.model}: {len(tokens)} tokens of {args.text}"))
    if not args.out:
        return
    about = {
        "model": args.model,
        "text": str(args.text),
        "tokens": len(tokens),
        "settings": config.model_dump(mode="json"),
        "layers": {str(index): layer.as_dict() for index, layer in layers.items()},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_whole(args.out / "memory.json", json.dumps(about, indent=1) + "\n")
    memory_map(args.out / "map.png", {index: layer.map() for index, layer in layers.items()})
    slot_history(
        args.out / "history.png", {index: layer.commits for index, layer in layers.items()}
    )
    print(f"pacellm: {args.out} has memory.json, map.png and history.png.")


def _read(args: argparse.Namespace) -> tuple[Any, list[int], PaceConfig]:
    """The tokenizer, the text's tokens and the settings that the engine will come to."""
    tokenizer, config = read_model(args)
    tokens = tokenizer(given_text(args.text)).input_ids[: max(args.tokens, 0)]
    if len(tokens) <= config.segment_size:
        raise EvalError(
            f"pacellm: {len(tokens)} tokens end within the first segment of {config.segment_size}, "
            "before any bank is read; give a longer text, more --tokens or a smaller "
            "--segment-size."
        )
    return tokenizer, tokens, config


def _record(
    args: argparse.Namespace, tokens: list[int], config: PaceConfig
) -> dict[int, dict[str, Any]]:
    """What the engine's only worker recorded while it read ``tokens``."""
    from vllm import SamplingParams

    from pacellm_vllm.evals.answers import offline_engine
    from pacellm_vllm.evals.banks import TOP_TOKENS
    from pacellm_vllm.serving.recorder import RECORD_METHOD, RECORDED_METHOD

    # One request, read in pieces of one segment, whose activations the recorder keeps.
    ours = {
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "speculative_config": None,
        "max_num_seqs": 1,
        "max_num_batched_tokens": config.segment_size,
        "max_model_len": len(tokens) + 1,
        "enable_prefix_caching": False,
    }
    engine = given(args, "engine")
    for name, value in ours.items():
        if engine.get(name, value) != value:
            raise EvalError(
                f"pacellm: --engine {name} = {engine[name]!r} is not possible here; a text is "
                f"recorded with {value!r}, so drop it."
            )
    with offline_engine(args.model, given_settings(args), {**engine, **ours}) as llm:
        [refusal] = llm.collective_rpc(RECORD_METHOD)
        if refusal:
            raise EvalError(refusal)
        params = SamplingParams(temperature=0, max_tokens=1)
        llm.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False)
        [recorded] = llm.collective_rpc(RECORDED_METHOD, args=(TOP_TOKENS,))
    for index, found in recorded.items():
        if found["unsound"]:
            raise EvalError(
                f"pacellm: of {len(tokens)} tokens layer {index} gave {found['unsound']} "
                "activations that are not finite, or too large to compare, which memory passes "
                'by; fix the model, or run it as --engine \'{"dtype": "float32"}\'.'
            )
    return recorded
