"""What does not fit, never ends or says nothing is told, and not measured wrongly."""

import shutil
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from pacellm_vllm.cli import main
from pacellm_vllm.evals.answers import Answer, offline_engine
from pacellm_vllm.evals.loss import Text, measure
from pacellm_vllm.evals.niah import Grid, make_items, run_grid
from pacellm_vllm.evals.prompts import Fitter
from pacellm_vllm.evals.records import EvalError, Records
from pacellm_vllm.evals.report import as_markdown, write_report
from pacellm_vllm.evals.suite import _ended
from pacellm_vllm.evals.tasks import Library, Messages


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny)


@pytest.mark.parametrize("room", [0, -1, -300])
def test_an_answer_that_leaves_no_room_for_its_prompt(tokenizer, room):
    for prompt in ("The old farmer", Messages([{"role": "user", "content": "The old"}])):
        with pytest.raises(EvalError, match="larger max_model_len"):
            Fitter(tokenizer, None).fit(prompt, room)


def test_an_answer_to_score_that_is_longer_than_the_model(tokenizer):
    fitter, answer = Fitter(tokenizer, None), " The old farmer walks slowly"
    n = len(tokenizer(answer).input_ids)
    fitted, _ = fitter.fit_pair("The market", answer, n + 1)
    assert len(fitted.ids) == n + 1
    for room in (n, n - 1, 0, -5):
        with pytest.raises(EvalError, match=f"has {n} tokens"):
            fitter.fit_pair("The market", answer, room)


def test_a_chat_without_a_template_stops_before_an_engine(tiny, tmp_path, capsys):
    bare = AutoTokenizer.from_pretrained(tiny)
    bare.chat_template = None
    bare.save_pretrained(tmp_path / "bare")
    shutil.copy(f"{tiny}/config.json", tmp_path / "bare")
    with pytest.raises(EvalError, match="no chat template that fits"):
        next(make_items(Grid((100,), (50,), chat=True), bare))
    model, out = str(tmp_path / "bare"), ["--out", str(tmp_path / "out"), "--quiet"]
    # There are no weights, which an engine would say.
    assert main(["eval", "niah", model, "--chat", "--lengths", "100", *out]) == 2
    assert "ask without --chat" in capsys.readouterr().err


def test_a_template_that_refuses_the_messages(tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(
        tokenizer.name_or_path, chat_template="{{ raise_exception('no assistants here') }}"
    )
    with pytest.raises(EvalError, match="no assistants here"):
        Fitter(tokenizer, None).fit(Messages([{"role": "user", "content": "Hi"}]), 100)


@pytest.mark.parametrize("task", ["ruler_cwe", "ruler_vt"])
def test_rulers_tasks_that_never_end_below_4096_tokens(tiny, task):
    with pytest.raises(EvalError, match=f"never ends making {task} of 2048 tokens"):
        Library([task], tiny, lengths=(4096, 2048)).load(task)


class Thinking:
    """Begins to think, and is cut; or has nothing to say."""

    def answer(self, prompts, max_tokens, stop=()):
        said = [Answer("<think> The user asks", True), Answer(" \n", False), Answer("47", False)]
        return [said[i % 3] for i in range(len(prompts))]


def test_cut_and_empty_answers_are_counted(tokenizer, tmp_path):
    grid = Grid((100,), (0.0, 50.0), samples=3)
    given = {"grid": grid.describe()}
    with Records(tmp_path / "items.jsonl", given) as records:
        records.describe("off", {})
        run_grid(grid, tokenizer, "off", Thinking(), records, 6, progress=False)
        report = write_report(tmp_path, grid, ["off"], records, given)
    counts = report["configs"]["off"]
    assert (counts["answers"], counts["cut"], counts["empty"]) == (6, 2, 2)
    said = "Of 6 answers of `off`, 2 were cut at the limit and 2 were empty"
    assert said in as_markdown(report, "off")


def test_how_a_benchmarks_answer_ended():
    outputs = [Answer("47", False), Answer("4", True), Answer(" ", False), (-1.5, True)]
    assert [_ended(output) for output in outputs] == ["whole", "cut", "empty", "whole"]


def test_memory_among_the_engines_arguments_is_refused_and_the_rest_kept(tiny, monkeypatch):
    """Each configuration would replace it."""

    class Made(Exception):
        pass

    def made(**given):
        raise Made(given["additional_config"])

    monkeypatch.setattr("vllm.LLM", made)
    other = {"other": 1}
    for additional, raised, said in (
        ({**other, "pacellm": {"segment_size": 256}}, EvalError, "hold pacellm in additional_conf"),
        (other, Made, "{'other': 1, 'pacellm': {'alpha': 0.5}}"),
        (None, Made, "{'pacellm': {'alpha': 0.5}}"),
    ):
        engine = {"additional_config": additional}
        with (
            pytest.raises(raised, match=said),
            offline_engine(str(tiny), {"alpha": 0.5}, engine),
        ):
            pass


def test_a_loss_that_is_no_number_is_not_kept(tmp_path):
    """A position that a model has none for makes one, and means over it would be none either."""
    texts = [Text("good", [1, 2, 3]), Text("long", [1, 2, 3, 4])]
    losses = {3: [0.5, 0.25], 4: [0.5, 0.25, float("nan")]}
    answerer = SimpleNamespace(losses=lambda asked: [losses[len(ids)] for ids in asked])
    with Records(tmp_path / "items.jsonl", {}) as records:
        with pytest.raises(EvalError, match="with off the token at position 3 of long"):
            measure(texts, "off", answerer, records, batch=2)
        assert list(records.done) == [("off", "good")]
