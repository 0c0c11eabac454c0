"""What is asked of each task: its share of a prompt, chat template and examples."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pacellm_vllm.evals.records import EvalError
from pacellm_vllm.evals.tasks import Category, Library


@dataclass(frozen=True)
class Ask:
    """One task: prompt tokens at most (None: what the model has), chat template, examples."""

    task: str
    max_length: int | None = None
    chat: bool = False
    fewshot: int | None = None


@dataclass(frozen=True)
class Part:
    """A benchmark as the paper's numbers have it; ``prefix`` goes before its tasks' names.

    Without ``categories``, all of lm-eval's group.
    """

    prefix: str
    categories: dict[str, tuple[str, ...]]
    max_length: int | None = None
    fewshot: int | None = None


# The evaluation of Activation Beacon, on which the paper builds. It does not say how many
# examples MMLU has; five are customary.
PAPER = {
    "longbench": Part(
        "longbench_",
        {
            "SQA": ("narrativeqa", "qasper", "multifieldqa_en"),
            "MQA": ("hotpotqa", "2wikimqa", "musique"),
            "Sum": ("gov_report", "qmsum", "multi_news"),
            "FSL": ("trec", "triviaqa", "samsum"),
            "Code": ("lcc", "repobench-p"),
        },
        max_length=31_500,
    ),
    "infinitebench": Part(
        "infinitebench_",
        {
            "En.Dia": ("longdialogue_qa_en",),
            "En.Sum": ("longbook_sum_en",),
            "En.QA": ("longbook_qa_en",),
            "Zh.QA": ("longbook_qa_chn",),
            "En.MC": ("longbook_choice_en",),
            "Code.Run": ("code_run",),
        },
        max_length=128_000,
    ),
    "mmlu": Part("", {}, fewshot=5),
}

# LongBench's few-shot and code tasks are texts to go on with, not questions to an assistant.
_CONTINUED = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}


def plan(
    library: Library, names: Sequence[str], protocol: str | None, ask: Ask
) -> tuple[list[Ask], list[Category]]:
    """What to ask of each task, and the categories to report; ``ask`` holds for all of them.

    With the paper's protocol its own lengths and examples stand where ``ask`` has none.
    """
    asks: dict[str, Ask] = {}
    categories: list[Category] = []
    for name in names:
        default = ask
        if protocol == "paper":
            if name not in PAPER:
                raise EvalError(
                    f"pacellm: --protocol paper knows {', '.join(PAPER)}, not {name!r}; leave it "
                    "out of --tasks, or the protocol."
                )
            part = PAPER[name]
            default = replace(
                ask,
                max_length=part.max_length if ask.max_length is None else ask.max_length,
                fewshot=part.fewshot if ask.fewshot is None else ask.fewshot,
            )
            found = [
                Category(title, tuple(part.prefix + task for task in tasks))
                for title, tasks in part.categories.items()
            ]
            tasks = [task for category in found for task in category.tasks]
        if protocol != "paper" or not found:
            tasks, found = library.expand(name)
        categories += [category for category in found if len(category.tasks) > 1]
        for task in tasks:
            chat = default.chat and not default.fewshot and not _is_continued(task)
            asks[task] = replace(default, task=task, chat=chat)
    return list(asks.values()), categories


def _is_continued(task: str) -> bool:
    return task.startswith("longbench_") and (
        task.removeprefix("longbench_").removesuffix("_e") in _CONTINUED
    )
