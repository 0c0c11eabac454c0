"""``pacellm eval suite``: benchmarks through lm-eval, configurations side by side."""

import argparse
from pathlib import Path
from typing import Any

from pacellm_vllm import __version__
from pacellm_vllm.evals.arguments import (
    add_configs,
    add_model,
    at_least,
    given,
    list_of,
    read_tokenizer,
    servers_of,
    token_room,
)
from pacellm_vllm.evals.records import EvalError, Records, version_of
from pacellm_vllm.evals.settings import parse_settings

# Beside its text, of at most --max-length, what a chat template may add to a prompt.
_TEMPLATE_ROOM = 512


def add_parser(kinds: Any) -> argparse.ArgumentParser:
    parser = kinds.add_parser(
        "suite",
        help="LongBench, InfiniteBench, RULER, MMLU and any other task of lm-eval",
        description="Asks every configuration the same items of lm-eval's tasks and compares them "
        "item by item. Results go to OUT line by line; the same command continues an interrupted "
        "run.",
        allow_abbrev=False,
    )
    add_model(parser, batch=32)
    add_configs(parser)
    parser.add_argument(
        "--tasks",
        type=_names,
        metavar="NAMES",
        help="lm-eval's tasks and groups, such as longbench,infinitebench,ruler,mmlu",
    )
    parser.add_argument(
        "--protocol",
        choices=["paper"],
        help="as the paper measured: longbench (the default then) is 14 tasks of at most 31,500 "
        "tokens, infinitebench 6 of 128,000, with the chat template but for few-shot and code",
    )
    parser.add_argument("--limit", type=at_least(1), help="items of each task, the first ones")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="benchmarks' files; nothing is downloaded"
    )
    parser.add_argument(
        "--max-length", type=at_least(2), help="tokens of a prompt; its middle is cut to fit"
    )
    parser.add_argument("--lengths", type=list_of(int, 1), default=(), help="of ruler")
    parser.add_argument("--num-fewshot", type=at_least(0), help="examples before each item")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="use the model's chat template, but for few-shot and code tasks",
    )
    parser.add_argument(
        "--route",
        choices=["completions", "chat"],
        default="completions",
        help="of a server: token ids, or messages for the server to render (%(default)s)",
    )
    return parser


def _names(text: str) -> list[str]:
    names = text.split(",")
    if not all(names) or len({*names}) < len(names):
        raise argparse.ArgumentTypeError("distinct names such as longbench,mmlu")
    return names


def run(args: argparse.Namespace) -> int:
    settings = parse_settings(args.configs, given(args, "memory"))
    names = [setting.name for setting in settings]
    servers = servers_of(args.base_url, names)
    tasks = args.tasks or (["longbench"] if args.protocol else None)
    chat = args.chat or args.protocol == "paper" or args.route == "chat"
    if tasks is None:
        raise EvalError("pacellm: name --tasks such as longbench,mmlu, or a --protocol.")
    if args.route == "chat" and not servers:
        raise EvalError("pacellm: --route chat is of a server; name one with --base-url.")

    from pacellm_vllm.evals.data import DataDirectory, stay_offline

    data = None
    if args.data is not None:
        data = DataDirectory(args.data)
        stay_offline()

    from pacellm_vllm.evals.answers import answering, check_settings
    from pacellm_vllm.evals.prompts import require_chat_template
    from pacellm_vllm.evals.protocol import Ask, plan
    from pacellm_vllm.evals.suite import load, longest_generation, missing, run_tasks
    from pacellm_vllm.evals.suite_report import as_markdown, write_report
    from pacellm_vllm.evals.tasks import Library

    tokenizer = read_tokenizer(args)
    check_settings(args.model, settings, given(args, "engine"))
    library = Library(tasks, args.model, data, args.lengths)
    ask = Ask("", args.max_length, chat, args.num_fewshot)
    asks, categories = plan(library, tasks, args.protocol, ask)
    loaded = load(library, asks, args.limit, args.seed, not args.quiet)
    if args.route == "chat":
        _refuse_choices(loaded)
    elif any(ask.chat for ask in asks):
        require_chat_template(tokenizer)
    engine = given(args, "engine")
    engine.setdefault("seed", args.seed)
    longest = [ask.max_length for ask in asks if ask.max_length is not None]
    if len(longest) == len(asks):
        wanted = max(longest) + longest_generation(loaded) + _TEMPLATE_ROOM
        engine.setdefault("max_model_len", min(token_room(args.model, engine) or wanted, wanted))
    described = {
        "versions": {
            "pacellm-vllm": __version__,
            **{name: version_of(name) for name in ("vllm", "torch", "transformers", "lm_eval")},
        },
        "model": args.model,
        "configs": {setting.name: setting.memory for setting in settings},
        "tasks": {task.ask.task: task.describe() for task in loaded},
        "protocol": args.protocol,
        "limit": args.limit,
        "data": "lm-eval's sources" if data is None else "files",
        "seed": args.seed,
        "batch": args.batch,
        "engine": {} if servers else engine,
        "server": bool(servers),
        "route": args.route,
    }
    with Records(args.out / "items.jsonl", described) as records:
        for setting in settings:
            if not missing(loaded, setting.name, records):
                continue
            with answering(args, setting, engine, servers) as answerer:
                records.describe(setting.name, answerer.describe())
                run_tasks(
                    loaded,
                    tokenizer,
                    setting.name,
                    answerer,
                    records,
                    args.batch,
                    render=args.route == "completions",
                    progress=not args.quiet,
                )
        report = write_report(args.out, loaded, categories, names, records, described)
    print(as_markdown(report), end="")
    return 0


def _refuse_choices(loaded: Any) -> None:
    for task in loaded:
        kind = task.items[0].instances[0].request_type
        if kind != "generate_until":
            raise EvalError(
                f"pacellm: {task.ask.task} scores given answers, which chat completions cannot; "
                "ask with --route completions."
            )
