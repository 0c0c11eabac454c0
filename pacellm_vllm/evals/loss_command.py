"""``pacellm eval loss``: loss on texts by position, with and without memory."""

import argparse
from pathlib import Path
from typing import Any

from pacellm_vllm import __version__
from pacellm_vllm.evals.arguments import (
    add_config_names,
    add_model,
    at_least,
    given,
    read_tokenizer,
    require_room,
    trusted,
)
from pacellm_vllm.evals.records import Records
from pacellm_vllm.evals.settings import parse_settings


def add_parser(kinds: Any) -> argparse.ArgumentParser:
    parser = kinds.add_parser(
        "loss",
        help="loss on texts by position",
        description="Compares the loss of configurations on the same texts, by position. Results "
        "go to OUT line by line; the same command continues an interrupted run.",
        allow_abbrev=False,
    )
    add_model(parser, batch=1)
    add_config_names(parser)
    parser.add_argument("--text", type=Path, nargs="+", default=(), help="text files")
    parser.add_argument(
        "--texts", type=at_least(1), default=8, help="built-in texts, without --text (8)"
    )
    parser.add_argument("--tokens", type=at_least(2), default=4096, help="of each text (4096)")
    parser.add_argument("--step", type=at_least(2), default=512, help="positions in a row (512)")
    return parser


def run(args: argparse.Namespace) -> int:
    from pacellm_vllm.evals.answers import Offline, expected_config, offline_engine
    from pacellm_vllm.evals.loss import as_markdown, measure, ranges, read_texts, write_report
    from pacellm_vllm.evals.plots import require_matplotlib

    require_matplotlib()
    settings = parse_settings(args.configs, given(args, "memory"))
    names = [setting.name for setting in settings]
    tokenizer = read_tokenizer(args)
    given_engine = given(args, "engine")
    served = [expected_config(args.model, setting.memory, trusted(args)) for setting in settings]
    require_room(args.model, given_engine, args.tokens + 1, "a text (--tokens)")
    texts = read_texts(args.text, args.texts, args.tokens, tokenizer, args.seed)
    described = {
        "version": __version__,
        "model": args.model,
        "texts": [text.id for text in texts],
        "tokens": args.tokens,
        "configs": {setting.name: setting.memory for setting in settings},
        "engine": given_engine,
    }
    # Experts act from the first token on, memory from its second segment on.
    acts = [one["segment_size"] if one["layers"] else 0 for one in served if one]
    positions = ranges(args.tokens, args.step, min(acts, default=args.tokens))
    engine = {"max_model_len": args.tokens + 1, "seed": args.seed, **given_engine}
    with Records(args.out / "items.jsonl", described) as records:
        for setting in settings:
            if all((setting.name, text.id) in records.done for text in texts):
                continue
            with offline_engine(args.model, setting.memory, engine) as llm:
                answerer = Offline(llm)
                records.describe(setting.name, answerer.describe())
                measure(texts, setting.name, answerer, records, args.batch)
        report = write_report(args.out, names, texts, positions, records, described)
    print(as_markdown(report, names[0]), end="")
    return 0
