"""Questions about texts, from files, as tasks of lm-eval's: answered, or an answer scored."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pacellm_vllm.evals.matching import has_words, words
from pacellm_vllm.sentences import shown

PREFIX, SCORED = "qa_", "_logprob"
# The metric of a scored answer, in nats; all others are shares.
LOGPROB = "logprob"
_PROMPT = "{{context}}\n\nQuestion: {{question}}\nAnswer:"
_MOST_TOKENS = 32


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

    Both after SQuAD's normalisation: without case, punctuation and articles.
    """
    from lm_eval.tasks.longbench.metrics import normalize_answer, qa_f1_score

    said, right = results[0], doc["answers"]
    normal = normalize_answer(said)
    return {
        "found": float(any(has_words(normal, normalize_answer(answer)) for answer in right)),
        "f1": max(float(qa_f1_score(said, answer)) for answer in right),
    }


def read_question(row: Mapping[str, Any]) -> dict[str, Any]:
    """A line of a file; ``ValueError`` says what its answers must be."""
    from lm_eval.tasks.longbench.metrics import normalize_answer

    answers = row["answers"]
    if not (
        isinstance(answers, list)
        and answers
        and all(isinstance(answer, str) and words(normalize_answer(answer)) for answer in answers)
    ):
        raise ValueError(
            f"answers = {shown(answers)} is not allowed; it must be a list of texts, each with a "
            "word that is no article"
        )
    return dict(row)
