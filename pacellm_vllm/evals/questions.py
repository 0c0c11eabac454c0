"""Questions about texts, from files, as tasks of lm-eval's: answered, or an answer scored."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from pacellm_vllm.evals.matching import has_words, words
from pacellm_vllm.sentences import shown

PREFIX, SCORED = "qa_", "_logprob"
# The metric of a scored answer, in nats; all others are shares.
LOGPROB = "logprob"
_PROMPT = "{{context}}\n\nQuestion: {{question}}\nAnswer:"
_MOST_TOKENS = 32
_ARTICLES = frozenset({"a", "an", "the"})


def file_of(task: str) -> str | None:
    """The name of the file that ``task`` is about; None if it is not a task of these."""
    if not task.startswith(PREFIX):
        return None
    return task.removeprefix(PREFIX).removesuffix(SCORED)


def task_config(task: str, read: Callable[..., Any]) -> dict[str, Any]:
    """What lm-eval makes the task of; ``read`` returns its splits."""
    common = {
        "custom_dataset": read,
        "dataset_path": "",
        "test_split": "test",
        "doc_to_text": _PROMPT,
        "metadata": {"version": "files"},
    }
    if task.endswith(SCORED):
        return {
            **common,
            "output_type": "multiple_choice",
            "doc_to_choice": _first_answer,
            "doc_to_target": _first,
            "process_results": _score_given,
            "metric_list": _metrics(LOGPROB),
        }
    return {
        **common,
        "output_type": "generate_until",
        "doc_to_target": "{{answers}}",
        "process_results": _score_free,
        "metric_list": _metrics("found", "f1"),
        "generation_kwargs": {"max_gen_toks": _MOST_TOKENS, "until": ["\n"]},
    }


def _metrics(*names: str) -> list[dict[str, Any]]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]


def _first_answer(doc: Mapping[str, Any]) -> list[str]:
    return [doc["answers"][0]]


def _first(_: Mapping[str, Any]) -> int:
    return 0


def _score_given(_: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Log-probability of the whole answer, nats."""
    return {LOGPROB: results[0][0]}


def _score_free(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """``found``: 1 where the words of some right answer stand together in what was said; ``f1``:
    of words, the best.

    Both without case, punctuation and articles, as SQuAD has it. That deletes what joins words
    ("CNN-based"), so they are also looked for apart.
    """
    from lm_eval.tasks.longbench.metrics import normalize_answer, qa_f1_score

    said, right = results[0], doc["answers"]
    normal = normalize_answer(said)
    found = any(
        has_words(said, answer, _ARTICLES) or has_words(normal, normalize_answer(answer))
        for answer in right
    )
    return {
        "found": float(found),
        "f1": max(float(qa_f1_score(said, answer)) for answer in right),
    }


def reader_of(task: str) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """What reads a line of the task's file; ``ValueError`` says what its answers must be.

    One that is looked for in what was said has a word besides articles.
    """
    if task.endswith(SCORED):
        return partial(_read, needed="with a letter or a digit", has_it=words)
    return partial(
        _read, needed="with a word that is no article", has_it=lambda a: {*words(a)} - _ARTICLES
    )


def _read(row: Mapping[str, Any], needed: str, has_it: Callable[[str], Any]) -> dict[str, Any]:
    answers = row["answers"]
    fine = isinstance(answers, list) and all(isinstance(a, str) and has_it(a) for a in answers)
    if not answers or not fine:
        raise ValueError(
            f"answers = {shown(answers)} is not allowed; it must be a list of texts, each {needed}"
        )
    return dict(row)
