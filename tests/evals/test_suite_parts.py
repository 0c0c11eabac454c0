"""The pieces of a benchmark run: verdicts, categories, prompts, data files, what is planned."""

import json
from functools import partial

import benchmark_files
import lm_eval.tasks
import numpy as np
import pytest
from transformers import AutoTokenizer

from pacellm_vllm.cli import main
from pacellm_vllm.evals.bootstrap import Difference, grouped_difference, paired_difference
from pacellm_vllm.evals.data import DataDirectory
from pacellm_vllm.evals.prompts import Fitter, middle_cut
from pacellm_vllm.evals.protocol import PAPER, Ask, plan
from pacellm_vllm.evals.records import EvalError, Records
from pacellm_vllm.evals.settings import parse_settings
from pacellm_vllm.evals.suite_report import _at_most, _same_prompts
from pacellm_vllm.evals.tasks import Library, Messages, build_items, metric_of, score


@pytest.mark.parametrize(
    ("low", "mean", "high", "verdict"),
    [
        (0.001, 0.01, 0.02, "better"),
        (0, 0.01, 0.02, "no worse"),
        (-0.0059, 0.01, 0.02, "no worse"),
        (-0.0061, 0.01, 0.02, "not told apart"),
        (-0.005, -0.004, -0.001, "worse"),
        (0, 0, 0, "equal on every item"),
    ],
)
def test_what_an_interval_allows_to_say(low, mean, high, verdict):
    assert Difference(mean, low, high, 10).verdict == verdict
    few = Difference(mean, low, high, 9)
    assert few.verdict == (verdict if low == high else "too few items")
    assert not few.better


@pytest.mark.parametrize(
    ("tasks", "items", "by_size"), [(57, 1, True), (57, 2, True), (14, 5, False)]
)
def test_many_small_tasks_are_told_apart_no_more_often_than_an_interval_says(tasks, items, by_size):
    """95 % of intervals hold the truth: of one item a task, resampled alone, none would."""
    rng = np.random.default_rng(0)
    wrong = 0
    for trial in range(60):
        pairs = [(np.zeros(items), rng.choice([-1.0, 1.0], items)) for _ in range(tasks)]
        wrong += grouped_difference(pairs, by_size, seed=trial).verdict in ("better", "worse")
    assert wrong <= 7


def test_a_category_is_a_mean_of_tasks_or_of_items():
    small, large = ([0, 0], [1, 1]), ([0.0] * 8, [0.5] * 8)
    assert grouped_difference([small, large]).mean == pytest.approx(0.75)
    assert grouped_difference([small, large], by_size=True).mean == pytest.approx(0.6)
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 50))
    assert grouped_difference([(a, b)]) == paired_difference(a, b)
    # Two tasks of the same spread: the mean's is smaller by the root of two.
    one, two = paired_difference(a, b), grouped_difference([(a, b), (b, a)])
    assert two.mean == pytest.approx(0)
    assert (two.high - two.low) / (one.high - one.low) == pytest.approx(2**-0.5, rel=0.05)


def test_named_configurations_with_experts():
    shared = {"segment_size": 64, "layers": [1]}
    settings = parse_settings("off,official,ce,paper+ce", shared)
    assert [setting.memory for setting in settings] == [
        None,
        {"segment_size": 64, "layers": [1], "preset": "official", "experts": None},
        {"layers": [], "experts": {"num_experts": 64}},
        {
            "segment_size": 64,
            "layers": [1],
            "preset": "paper",
            "experts": {"num_experts": 64},
        },
    ]
    official, ce = parse_settings("official,ce", {"experts": {"path": "OUT"}})
    assert official.memory == {"experts": None, "preset": "official"}
    assert ce.memory == {"layers": [], "experts": {"path": "OUT"}}
    with pytest.raises(EvalError, match="cannot be named 'a/b', because files are named after it"):
        parse_settings('{"a/b": null}', {})


def test_a_file_without_results_is_begun_again_and_engines_must_agree(tmp_path):
    path = tmp_path / "items.jsonl"
    with Records(path, {"seed": 1}) as records:
        records.describe("off", {"dtype": "float32"})
    with Records(path, {"seed": 2}) as records:
        assert records.engines == {}
        records.describe("off", {"dtype": "float16"})
        records.add({"config": "off", "id": "a"})
    with Records(path, {"seed": 2}) as records:
        records.describe("off", {"dtype": "float16"})
        with pytest.raises(EvalError, match="dtype = 'float16', not 'float32'"):
            records.describe("off", {"dtype": "float32"})
    assert len(path.read_text().splitlines()) == 3


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny)


def test_the_middle_is_cut():
    assert middle_cut([1, 2, 3], 3) == [1, 2, 3]
    assert middle_cut([1, 2, 3, 4, 5], 4) == [1, 2, 4, 5]
    assert middle_cut([1, 2, 3, 4, 5], 3) == [1, 4, 5]
    assert middle_cut([1, 2, 3], 1) == [3]


def test_a_text_fits_its_limit_or_the_model(tokenizer):
    text = benchmark_files.needle(0)[0]
    ids = tokenizer(text).input_ids
    for fitter, room, length in (
        (Fitter(tokenizer, 40), 50, 40),
        (Fitter(tokenizer, None), 50, 50),
    ):
        fitted = fitter.fit(text, room)
        assert fitted.ids == [*ids[: length // 2], *ids[-length // 2 :]]
        assert fitted.cut == len(ids) - length
    whole = Fitter(tokenizer, None).fit(text, 10_000)
    assert (whole.ids, whole.cut) == (ids, 0)


def test_a_continuation_stays_whole(tokenizer):
    text, question, _ = benchmark_files.needle(0)
    fitted, n = Fitter(tokenizer, 30).fit_pair(f"{text} {question} ", "47. The old", 1000)
    assert tokenizer.decode(fitted.ids[-n:]) == " 47. The old"
    assert len(fitted.ids) == 30 + n
    assert tokenizer.decode(fitted.ids[:-n]).endswith(question)
    alone, n = Fitter(tokenizer, None).fit_pair("", " 47", 1000)
    assert (len(alone.ids), n) == (2, 1)


def test_a_chat_keeps_its_template_and_loses_the_middle_of_its_text(tokenizer):
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path, chat_template=template)
    text, question, _ = benchmark_files.needle(0)
    chat = Messages(
        [
            {"role": "system", "content": "The farmer"},
            {"role": "user", "content": text},
            {"role": "assistant", "content": question},
        ]
    )
    fitted = Fitter(tokenizer, 20).fit(chat, 10_000)
    assert [m["content"] for m in fitted.messages][::2] == ["The farmer", question]
    kept = fitted.messages[1]["content"]
    assert len(tokenizer(kept).input_ids) == 20
    assert text.startswith(kept[:20])
    assert text.endswith(kept[-20:])
    rendered = tokenizer.decode(fitted.ids)
    assert rendered.startswith("<system>The farmer<user>")
    assert rendered.endswith(f"<assistant>{question}")
    tight = Fitter(tokenizer, None).fit(chat, 100)
    assert len(tight.ids) <= 100 < len(Fitter(tokenizer, None).fit(chat, 10_000).ids)
    with pytest.raises(EvalError, match="a chat template alone needs more than 5 tokens"):
        Fitter(tokenizer, None).fit(chat, 5)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return benchmark_files.write_all(tmp_path_factory.mktemp("data"))


def library(data, *names, lengths=()):
    return Library(names, "unused", DataDirectory(data), lengths)


def test_the_papers_protocol(data):
    names = ["longbench", "infinitebench", "mmlu"]
    asks, categories = plan(library(data, *names), names, "paper", Ask("", chat=True))
    by_task = {ask.task: ask for ask in asks}
    longbench = [ask for ask in asks if ask.task.startswith("longbench_")]
    assert len(longbench) == 14
    assert {ask.max_length for ask in longbench} == {31_500}
    plain = {ask.task.removeprefix("longbench_") for ask in longbench if not ask.chat}
    assert plain == {"trec", "triviaqa", "samsum", "lcc", "repobench-p"}
    assert by_task["infinitebench_longbook_qa_en"].max_length == 128_000
    assert by_task["infinitebench_longbook_qa_en"].chat
    assert (by_task["mmlu_anatomy"].fewshot, by_task["mmlu_anatomy"].chat) == (5, False)
    sizes = {category.name: (len(category.tasks), category.by_size) for category in categories}
    assert {sizes[name] for name in ("SQA", "MQA", "Sum", "FSL")} == {(3, False)}
    assert sizes["Code"] == (2, False)
    assert sizes["mmlu"] == (57, True)
    assert sizes["mmlu_stem"][1] is True
    with pytest.raises(EvalError, match="knows longbench, infinitebench, mmlu, not 'ruler'"):
        plan(library(data, "ruler"), ["ruler"], "paper", Ask(""))


def test_every_task_of_the_papers_protocol_is_lm_evals(data):
    for part in PAPER.values():
        names = [part.prefix + task for tasks in part.categories.values() for task in tasks]
        assert library(data, *names).expand(names[0])[0] == names[:1] if names else True


@pytest.mark.parametrize("name", benchmark_files.LONGBENCH)
def test_longbench_tasks_read_their_own_files(data, name):
    task = library(data, f"longbench_{name}").load(f"longbench_{name}")
    items = build_items(task, 2, None, chat=False, seed=0)
    rows = [json.loads(line) for line in (data / "LongBench/data" / f"{name}.jsonl").open()]
    assert [item.id for item in items] == [f"longbench_{name}/{i}" for i in range(2)]
    assert metric_of(task) == "score"
    for item, row in zip(items, rows[:2], strict=True):
        [instance] = item.instances
        assert row["context"] in instance.args[0]
        assert row["input"] in instance.args[0]
        right, wrong = (score(task, item, [said])["score"] for said in (row["answers"][0], "zzz"))
        assert wrong == 0
        # trec's answers are the names of classes.
        assert right == pytest.approx(0 if name == "trec" else 1, abs=1e-6)


def test_questions_of_ones_own(data):
    task = library(data, "qa_numbers").load("qa_numbers")
    item, *_ = build_items(task, 2, None, chat=False, seed=0)
    [row, *_] = [json.loads(line) for line in (data / "qa/numbers.jsonl").open()]
    prompt = f"{row['context']}\n\nQuestion: {row['question']}\nAnswer:"
    assert item.instances[0].args[0] == prompt
    number = row["answers"][0]
    assert score(task, item, [f" It is the {number}."]) == {"found": 1, "f1": 0.5}
    assert score(task, item, [" No one"]) == {"found": 1, "f1": 1}
    assert score(task, item, [" seven"]) == {"found": 0, "f1": 0}
    # Within another number it is not that number.
    assert score(task, item, [f" 1{number}5"])["found"] == 0
    for said in (f" {number}-fold", f" {number}'s", f" the {number}/7"):
        assert score(task, item, [said])["found"] == 1
    assert metric_of(task) == "found"
    scored = library(data, "qa_numbers_logprob").load("qa_numbers_logprob")
    item, *_ = build_items(scored, 2, None, chat=False, seed=0)
    assert [instance.args for instance in item.instances] == [(prompt, f" {number}")]
    assert score(scored, item, [(-3.5, False)]) == {"logprob": -3.5}
    with pytest.raises(EvalError, match="no task or group 'qa_nowhere'"):
        library(data, "qa_nowhere")


@pytest.mark.parametrize("answers", ["Paris", [], ["Rome", "A"], [7], [""], ["?!"]])
def test_answers_that_no_one_could_give_are_refused(answers, tmp_path):
    row = {"question": "Where?", "context": "There.", "answers": answers}
    benchmark_files.write_lines(tmp_path / "qa/own.jsonl", [row])
    with pytest.raises(EvalError, match=r"own\.jsonl, row 1: answers = .*; it must be a list of"):
        library(tmp_path, "qa_own").load("qa_own")


def test_rulers_lengths_are_parts_with_no_upper_end(tmp_path):
    benchmark_files.ruler(tmp_path, lengths=(128, 200_000), items=3)
    task = library(tmp_path, "niah_single_1").load("niah_single_1")
    items = build_items(task, 2, None, chat=False, seed=0)
    assert [item.part for item in items] == ["128", "128", "200000", "200000"]
    last = items[-1]
    assert last.instances[0].args[0].endswith(" is")
    assert score(task, last, [f" {last.instances[0].doc['outputs'][0]}."]) == {"score": 1.0}
    assert score(task, last, [" farmer"]) == {"score": 0.0}
    one = library(tmp_path, "niah_single_1", lengths=[128]).load("niah_single_1")
    assert {item.part for item in build_items(one, None, None, False, 0)} == {"128"}


def test_examples_go_before_a_question_but_not_of_itself(data):
    task = library(data, "mmlu_anatomy").load("mmlu_anatomy")
    items = build_items(task, 2, 5, chat=False, seed=0)
    assert len(items[0].instances) == 4
    prompt = items[0].instances[0].args[0]
    assert prompt.count("Answer:") == 6
    rows = [json.loads(line) for line in (data / "mmlu/anatomy/dev.jsonl").open()]
    assert rows[0]["question"] in prompt
    assert score(task, items[0], [(-1, False), (-9, False), (-9, False), (-9, False)]) == {"acc": 1}
    assert score(task, items[1], [(-1, False), (-9, False), (-9, False), (-9, False)]) == {"acc": 0}


def test_wrong_data_says_which_file_what_it_holds_and_whence(tmp_path):
    def says(name, folder=tmp_path):
        with pytest.raises(EvalError) as raised:
            library(folder, name).load(name)
        return str(raised.value)

    missing = says("longbench_qasper")
    assert str(tmp_path / "LongBench/data/qasper.jsonl") in missing
    assert "one JSON object per line with input, context, answers" in missing
    assert "huggingface.co/datasets/THUDM/LongBench" in missing
    assert "InfiniteBench/longbook_qa_en.jsonl" in says("infinitebench_longbook_qa_en")
    assert "github.com/NVIDIA/RULER" in says("niah_single_1")
    benchmark_files.mmlu(tmp_path)
    (tmp_path / "mmlu/anatomy/dev.jsonl").unlink()
    assert "anatomy/dev.jsonl is missing" in says("mmlu_anatomy")
    path = tmp_path / "LongBench/data/qasper.jsonl"
    benchmark_files.write_lines(path, [{"input": "a", "context": "b"}])
    assert "qasper.jsonl, row 1, has no answers; the file holds" in says("longbench_qasper")
    path.write_text("{]\n")
    assert "qasper.jsonl cannot be read" in says("longbench_qasper")
    path.write_text("")
    assert "qasper.jsonl is empty" in says("longbench_qasper")
    with pytest.raises(EvalError, match="is not a directory"):
        DataDirectory(tmp_path / "nowhere")


def test_a_model_with_less_room_than_the_protocol_is_named():
    assert _at_most(31_500, 32_768) == "31500"
    assert _at_most(31_500, 8192) == "31500, but the model has 8192"
    assert _at_most(None, 8192) == "the model's 8192"


def test_other_prompts_are_not_compared():
    rows = {"off": [{"id": "a/0", "prompt": "1"}], "official": [{"id": "a/0", "prompt": "2"}]}
    with pytest.raises(EvalError, match="off and official were asked different prompts in a"):
        _same_prompts("a", rows)


def test_wrong_words_stop_before_an_engine(tiny, data, tmp_path, capsys, monkeypatch):
    # Reading all of lm-eval's tasks for a name that is none takes long.
    few = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", few)

    def says(*words):
        assert main(["eval", "suite", tiny, "--out", str(tmp_path / "out"), *words]) == 2
        return capsys.readouterr().err

    assert "name --tasks" in says()
    assert "--route chat is of a server" in says("--tasks", "mmlu", "--route", "chat")
    files = ["--data", str(data), "--quiet"]
    assert "lm-eval has no task or group 'longbench_qaspr'" in says(
        "--tasks", "longbench_qaspr", *files
    )
    unfit = says("--tasks", "mmlu_anatomy", *files, "--route", "chat", "--base-url", "http://x/v1",
                 "--configs", "off")  # fmt: skip
    assert "mmlu_anatomy scores given answers" in unfit
