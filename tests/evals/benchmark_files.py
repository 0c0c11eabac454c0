"""Small files in each benchmark's own schema, some of whose items the tiny model can answer.

The tiny model (``scripts/tiny``) goes on with "The magic number of Rome is" where a text said so.
"""

import json
import random
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pacellm_vllm.evals.text import KEYS, NEEDLE, QUESTION, sentences

SENTENCES = 12
LONGBENCH = {
    "narrativeqa": "summary", "qasper": "paper", "multifieldqa_en": "text", "hotpotqa": "passages",
    "2wikimqa": "passages", "musique": "passages", "gov_report": "report", "qmsum": "meeting",
    "multi_news": "news", "trec": "examples", "triviaqa": "examples", "samsum": "examples",
    "lcc": "code", "repobench-p": "code",
}  # fmt: skip


def needle(seed, sentences_=SENTENCES):
    """A text with three magic numbers, a question for one of them and its answer."""
    rng = random.Random(seed)
    text = list(islice(sentences(rng), sentences_))
    keys = rng.sample(KEYS, 3)
    for key in keys:
        value = rng.randrange(10, 100)
        text.insert(rng.randrange(len(text)), NEEDLE.format(key=key, value=value))
    return " ".join(text), QUESTION.format(key=keys[-1]), str(value)


def scored(model):
    """Prompts as (ids, n), and of each what transformers says of its last n ids: their
    log-probability, and whether each is the likeliest, which is so of the first two.

    Three are one question with continuations; the last is the first's second half.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    text, question, answer = needle("loglikelihood", 2)
    asked = tokenizer(f"{text} {question}").input_ids
    whole = [
        tokenizer(f"{text} {question}{end}").input_ids
        for end in (f" {answer}", f" {answer}. The", " farmer the")
    ]
    prompts = [(ids, len(ids) - len(asked)) for ids in whole] + [(whole[0], len(whole[0]) // 2)]
    truth = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    expected = []
    for ids, n in prompts:
        with torch.no_grad():
            logits = truth(torch.tensor([ids])).logits[0, -n - 1 : -1].log_softmax(-1)
        last = torch.tensor(ids[-n:])
        value = logits.gather(1, last[:, None]).sum().item()
        expected.append((value, bool((logits.argmax(-1) == last).all())))
    assert [greedy for _, greedy in expected] == [True, True, False, False]
    return prompts, expected


def assert_near(a, b):
    """``a`` and ``b``: lists of (log-probability, greedy)."""
    assert [greedy for _, greedy in a] == [greedy for _, greedy in b]
    assert [value for value, _ in a] == pytest.approx([value for value, _ in b], abs=1e-3)


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def questions(root, items=4):
    """Questions of one's own about texts."""
    rows = []
    for i in range(items):
        context, question, answer = needle(f"qa{i}")
        rows.append({"question": question, "context": context, "answers": [answer, "no one"]})
    write_lines(root / "qa" / "numbers.jsonl", rows)


def longbench(root, items=4, tasks=tuple(LONGBENCH)):
    """As ``data.zip`` of THUDM/LongBench has it."""
    for task in tasks:
        rows = []
        for i in range(items):
            context, question, answer = needle(f"{task}{i}")
            rows.append(
                {
                    "input": "" if task in ("gov_report", "multi_news", "lcc") else question,
                    "context": context,
                    "answers": [answer],
                    "length": len(context.split()),
                    "dataset": task,
                    "language": "python" if task == "lcc" else "en",
                    "all_classes": ["Number", "City"] if task == "trec" else None,
                    "_id": f"{task}{i}",
                }
            )
        write_lines(root / "LongBench" / "data" / f"{task}.jsonl", rows)


def infinitebench(root, items=4):
    """As xinrongzhang2022/InfiniteBench has it."""
    for split in ("passkey", "longbook_qa_eng", "longbook_choice_eng"):
        rows = []
        for i in range(items):
            context, question, answer = needle(f"{split}{i}")
            options = ["Rome", "Oslo", "Lima", answer] if "choice" in split else []
            rows.append(
                {"id": i, "context": context, "input": question, "answer": [answer],
                 "options": options}
            )  # fmt: skip
        write_lines(root / "InfiniteBench" / f"{split}.jsonl", rows)


def ruler(root, lengths=(128, 256), items=4):
    """As prepare.py of NVIDIA/RULER writes it."""
    for length in lengths:
        rows = []
        for i in range(items):
            context, question, answer = needle(f"{length}/{i}", length // 16)
            rows.append(
                {"index": i, "input": context, "outputs": [answer], "length": length,
                 "answer_prefix": f" {question}"}
            )  # fmt: skip
        path = root / "ruler" / str(length) / "data" / "niah_single_1" / "validation.jsonl"
        write_lines(path, rows)


def mmlu(root, items=4, subject="anatomy"):
    """As cais/mmlu has it."""
    for split in ("dev", "test"):
        rows = [
            {"question": f"Which {word} is it?", "subject": subject, "answer": i % 4,
             "choices": ["farmer", "doctor", "teacher", "sailor"]}
            for i, word in enumerate(random.Random(split).sample(KEYS, items + 5))
        ]  # fmt: skip
        write_lines(root / "mmlu" / subject / f"{split}.jsonl", rows)


def write_all(root: Path, items: int = 4) -> Path:
    longbench(root, items)
    infinitebench(root, items)
    ruler(root, items=items)
    mmlu(root, items)
    questions(root, items)
    return root
