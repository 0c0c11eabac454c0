"""Does a memory of FFN states bring back what left the context? On real models, beside the engine.

A context is read and forgotten; then a question about it is asked alone. What was kept of the
context is one compressed FFN state a token, the token that followed, and, where passages are read
again, the tokens themselves. In this order, with D the data's folder, M a model's, W for results:

    PYTHONPATH=. python research/recall/recall.py dev M W --data D --task qa      # development
    PYTHONPATH=. python research/recall/recall.py dev-text M W --data D --task qa
    PYTHONPATH=. python research/recall/recall.py choose W --task qa              # the knobs
    PYTHONPATH=. python research/recall/recall.py ask M W --data D --task qa      # held-out items
    PYTHONPATH=. python research/recall/recall.py unneeded-qa M W --data D        # harm to answers
    PYTHONPATH=. python research/recall/recall.py lexical-gate M W --data D --task qa  # BM25's gate
    PYTHONPATH=. python research/recall/recall.py unneeded-lexical M W --data D
    PYTHONPATH=. python research/recall/recall.py unneeded-text M W --data D --task qa
    PYTHONPATH=. python research/recall/recall.py report W --task qa              # tables

``--task needles`` is the same for needles in real text. Each writes one JSON line an item and goes
on where it stopped. D has nq-open-oracle.jsonl.gz (nelson-liu/lost-in-the-middle) and
leval-natural_question.jsonl.gz (L-Eval).
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from recall_ask import ask
from recall_choose import choose, develop, develop_text
from recall_report import report
from recall_unneeded import lexical_gate, unneeded_lexical, unneeded_questions, unneeded_text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    experiments: dict[str, tuple[Callable[[argparse.Namespace], None], int]] = {
        "dev": (develop, 80),
        "dev-text": (develop_text, 80),
        "ask": (ask, 200),
        "unneeded-qa": (unneeded_questions, 216),
        "lexical-gate": (lexical_gate, 216),
        "unneeded-lexical": (unneeded_lexical, 216),
        "unneeded-text": (unneeded_text, 200),
    }
    for name, (function, count) in experiments.items():
        command = commands.add_parser(name)
        command.add_argument("model")
        command.add_argument("out", type=Path)
        command.add_argument("--data", type=Path, required=True)
        command.add_argument("--count", type=int, default=count, help="items")
        if not name.startswith("unneeded-") or name == "unneeded-text":
            command.add_argument("--task", choices=("qa", "needles"), required=True)
        if name not in ("dev", "dev-text", "ask", "unneeded-text"):
            command.add_argument("--skip", type=int, default=600, help="held-out items before")
        command.set_defaults(function=function)
    for name, function in (("choose", choose), ("report", report)):
        command = commands.add_parser(name)
        command.add_argument("out", type=Path)
        command.add_argument("--task", choices=("qa", "needles"), required=True)
        command.set_defaults(function=function)
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
