"""The pieces of an evaluation: intervals, records, items, scores, choices."""

import argparse
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from servers import printed_by

from pacellm_vllm import compat
from pacellm_vllm.cli import main
from pacellm_vllm.config import PaceConfigError
from pacellm_vllm.evals.answers import Answer, expected_config
from pacellm_vllm.evals.arguments import add_engine, read_model
from pacellm_vllm.evals.bootstrap import paired_difference
from pacellm_vllm.evals.niah import Grid, exact_match, make_items
from pacellm_vllm.evals.records import EvalError, Records
from pacellm_vllm.evals.rouge import rouge_l_recall
from pacellm_vllm.evals.sessions import run_sessions, tokens_kept
from pacellm_vllm.evals.settings import Setting, parse_settings
from pacellm_vllm.evals.sweep import choose, combinations
from pacellm_vllm.flags import add_settings
from pacellm_vllm.sessions.store import SessionStore


def test_an_interval_covers_the_true_difference_about_95_times_in_100():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        easy = rng.normal(0, 1, 80)
        a, b = easy + rng.normal(0, 0.3, 80), easy + 0.2 + rng.normal(0, 0.3, 80)
        found = paired_difference(a, b, seed=trial)
        covered += found.low <= 0.2 <= found.high
        # Unpaired, items' own spread of 1 would make this five times as wide.
        assert found.high - found.low < 0.3
    assert 180 <= covered <= 198


def test_a_configuration_against_itself_is_exactly_zero():
    found = paired_difference([0, 1, 1, 0.5], [0, 1, 1, 0.5])
    assert (found.mean, found.low, found.high, found.items) == (0, 0, 0, 4)
    assert not found.better


def test_pairs_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match="got 2 and 3"):
        paired_difference([0, 1], [0, 1, 1])


@pytest.mark.parametrize(
    ("answer", "output", "recall"),
    [
        ("the cat sat", "The cat sat.", 1),
        ("the cat sat", "sat the cat", 2 / 3),
        ("a b c d", "d a x c", 2 / 4),
        ("48", "It is 4817", 0),
        ("", "anything", 0),
    ],
)
def test_rouge_l_recall(answer, output, recall):
    assert rouge_l_recall(answer, output) == pytest.approx(recall)


# In a process of its own: the package's logger closes what stderr was then when vLLM sets up its
# own logging, which here is pytest's.
ROUGE = """
import random
from rouge_score.rouge_scorer import RougeScorer
from pacellm_vllm.evals.rouge import rouge_l_recall
scorer, rng = RougeScorer(["rougeL"]), random.Random(0)
for _ in range(400):
    answer, output = (
        "".join(rng.choices("aAbB8é四İß ,.-_\\n", k=rng.randrange(40))) for _ in range(2)
    )
    print(rouge_l_recall(answer, output) - scorer.score(answer, output)["rougeL"].recall)
"""


def test_rouge_l_recall_is_the_packages():
    assert {*map(float, printed_by("-c", ROUGE))} == {0}


def test_an_exact_match_wants_whole_words_together():
    assert exact_match("48", " is 48.") == 1
    assert exact_match("48", " 4817") == 0
    assert exact_match("eat a sandwich", "Eat a sandwich!") == 1
    assert exact_match("eat a sandwich", "a sandwich to eat") == 0
    # Where words are not set apart, a character is one.
    assert exact_match("四二", "答案是四二。") == 1
    assert exact_match("四二", "答案是四三。") == 0


def result(config, item):
    return {"config": config, "id": item}


def test_records_go_on_where_they_stopped_even_within_a_line(tmp_path):
    path = tmp_path / "items.jsonl"
    with Records(path, {"seed": 1, "lengths": (1, 2)}) as records:
        records.add(result("off", "a"))
        records.add(result("off", "b"))
    path.write_bytes(path.read_bytes()[:-4])
    with Records(path, {"seed": 1, "lengths": (1, 2)}) as records:
        assert set(records.done) == {("off", "a")}
        records.add(result("off", "b"))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[1:] == [result("off", "a"), result("off", "b")]


def test_records_of_other_settings_are_refused_and_kept(tmp_path):
    path = tmp_path / "items.jsonl"
    with Records(path, {"seed": 1}) as records:
        records.add(result("off", "a"))
    before = path.read_bytes()
    with pytest.raises(EvalError, match="seed = 1, not 2"):
        Records(path, {"seed": 2})
    assert path.read_bytes() == before
    path.write_text("something else\n")
    with pytest.raises(EvalError, match="not a results file"):
        Records(path, {"seed": 1})


def test_records_that_another_run_writes_are_refused_until_it_ends(tmp_path):
    path = tmp_path / "items.jsonl"
    with Records(path, {"seed": 1}) as records:
        records.add(result("off", "a"))
        with pytest.raises(EvalError, match="another run is writing to"):
            Records(path, {"seed": 1})
        records.add(result("off", "b"))
    with Records(path, {"seed": 1}) as records:
        assert len(records.done) == 2


def test_an_edited_haystack_is_another_grid(tmp_path):
    text = tmp_path / "hay.txt"
    grid = Grid((64,), (0.0,), haystack=(text,))
    with pytest.raises(EvalError, match="cannot be read"):
        grid.describe()
    text.write_text("One sentence. Another one.")
    before = grid.describe()
    assert grid.describe() == before
    text.write_text("One sentence. Another two.")
    assert grid.describe() != before


class Words:
    """A tokenizer of one token per word."""

    def __init__(self):
        self.words = []

    def __call__(self, text, add_special_tokens=True):
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
        ids = [self.words.index(word) for word in text.split()]
        return type("Encoding", (), {"input_ids": ids})

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert add_generation_prompt
        assert not tokenize
        return f"<user> {messages[0]['content']} <assistant>"


def texts(grid):
    words = Words()
    for item in make_items(grid, words):
        yield item, " ".join(words.words[i] for i in item.prompt)


class Beginning(Words):
    """One that begins texts with a token of its own, which a template writes itself."""

    def __call__(self, text, add_special_tokens=True):
        return super().__call__(f"<s> {text}" if add_special_tokens else text)

    def decode(self, tokens, skip_special_tokens):
        kept = [self.words[token] for token in tokens]
        return " ".join(word for word in kept if word != "<s>" or not skip_special_tokens)

    def apply_chat_template(self, messages, **how):
        return f"<s> {super().apply_chat_template(messages, **how)}"


@pytest.mark.parametrize("chat", [False, True])
def test_prompts_of_sessions_begin_as_texts_or_messages_do(chat, tmp_path):
    asked, words = [], Beginning()

    class Answering:
        max_model_len = 90

        def answer(self, prompts, max_tokens, extra_args):
            asked.extend(" ".join(words.words[token] for token in prompt) for prompt in prompts)
            assert max(map(len, prompts)) + max_tokens <= self.max_model_len
            return [Answer("", False)] * len(prompts)

    grid = Grid((200,), (0.0, 100.0), samples=1, max_tokens=4, chat=chat)
    with Records(tmp_path / "items.jsonl", {}) as records:
        run_sessions(grid, words, Answering(), records, 50, progress=False)
    begin = "<s> <user> " if chat else "<s> "
    for prompt in asked:
        assert prompt.startswith(begin)
        assert prompt.count("<s>") == 1
        assert prompt.count("<assistant>") == chat
    alone, windows, fed = asked[:2], asked[2:4], asked[4:-2]
    assert len(fed) >= 200 // 50
    assert asked[-2:] == alone
    question = alone[0].removeprefix(begin).removesuffix(" <assistant>")
    assert question in windows[0]
    assert len(windows[0].split()) == 86
    text = " ".join(part.removeprefix(begin).removesuffix(" <assistant>") for part in fed)
    assert windows[0].removeprefix(begin).partition(f" {question}")[0] in text


@pytest.mark.parametrize(("length", "piece"), [(1000, 32), (900, 128), (5000, 1024), (300, 300)])
def test_a_text_fits_the_session_it_is_fed_to(length, piece):
    kept = SessionStore(math.ceil(tokens_kept(length, piece, 3) / 128), lambda tokens: "a text")
    text = list(range(length))
    for begin in range(0, length, piece):
        kept.add(b"one", [1, 2, 3, *text[begin : begin + piece]], [7])
    assert kept.counts().evicted == 0


def test_items_fill_their_length_and_hide_the_needle_at_its_depth():
    grid = Grid(lengths=(150, 900), depths=(0, 50, 100), samples=2, needles=3)
    for item, text in texts(grid):
        assert item.length - 14 < len(item.prompt) <= item.length
        key = text.split()[-2]
        needle = f"The magic number of {key} is {item.answer}."
        assert text.count(needle) == 1
        assert text.count("The magic number of") == 4
        before = len(text.split(needle)[0].split()) / len(item.prompt)
        assert before == pytest.approx(item.depth / 100, abs=0.25 if item.length < 900 else 0.06)


def test_items_depend_on_their_place_and_seed_alone():
    one = {item.id: text for item, text in texts(Grid((150,), (50,), samples=2))}
    more = {item.id: text for item, text in texts(Grid((90, 150), (0, 50), samples=3))}
    assert all(more[name] == text for name, text in one.items())
    other = {item.id: text for item, text in texts(Grid((150,), (50,), samples=2, seed=1))}
    assert all(other[name] != text for name, text in one.items())
    assert len(set(more.values())) == len(more)


def test_items_from_files(tmp_path):
    hay, needles = tmp_path / "hay.txt", tmp_path / "needles.jsonl"
    hay.write_text("One first thing. Another second thing! A third thing?\n" * 3)
    needle = {"needle": "Oil lasts.", "question": "What lasts?", "answer": "Oil"}
    needles.write_text(json.dumps(needle) + "\n")
    grid = Grid((60,), (50,), 1, haystack=(hay,), needle_file=needles, chat=True)
    [(item, text)] = texts(grid)
    assert item.answer == "Oil"
    assert text.startswith("<user> ")
    assert text.endswith("What lasts? <assistant>")
    assert "thing. Another second thing!" in text
    assert " Oil lasts. " in text
    with pytest.raises(EvalError, match="2 needles are more than"):
        list(texts(Grid((60,), (50,), 1, needles=2, needle_file=needles)))
    with pytest.raises(EvalError, match=r"'.*hay\.txt' must hold one JSON object per line"):
        list(texts(Grid((60,), (50,), 1, needle_file=hay)))
    for answer in ("🙂", "3.14", "", "one\ntwo", 42):
        needles.write_text(json.dumps({**needle, "answer": answer}) + "\n")
        with pytest.raises(EvalError, match="cannot be found in what is said"):
            list(texts(Grid((60,), (50,), 1, needle_file=needles)))
    with pytest.raises(EvalError, match="'nowhere' is not a file"):
        list(texts(Grid((60,), (50,), 1, haystack=(type(hay)("nowhere"),))))


def test_a_length_too_short_for_its_needles_is_refused():
    with pytest.raises(EvalError, match="--lengths 20 is too short"):
        list(texts(Grid((20,), (50,), needles=4)))


def test_configurations_by_name_and_by_json():
    off, official, paper = parse_settings("off,official,paper", {"segment_size": 64})
    assert off == Setting("off", None)
    assert official.memory == {"segment_size": 64, "preset": "official", "experts": None}
    assert paper.memory == {"segment_size": 64, "preset": "paper", "experts": None}
    plain, mine = parse_settings('{"plain": null, "mine": {"alpha": 0.5}}', {"alpha": 0.1})
    assert (plain.memory, mine.memory) == (None, {"alpha": 0.5})
    with pytest.raises(EvalError, match="'offical' is not known"):
        parse_settings("off,offical", {})
    with pytest.raises(EvalError, match="twice"):
        parse_settings("off,off", {})
    with pytest.raises(PaceConfigError, match="alpha = 2"):
        parse_settings('{"mine": {"alpha": 2}}', {})


def test_memory_alone_is_what_a_preset_names_on_a_clustered_checkpoint_too(tiny, tmp_path):
    config = json.loads((Path(tiny) / "config.json").read_text())
    config["pacellm"] = {"experts": {"path": "."}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    [gentle] = parse_settings("gentle", {})
    found = expected_config(str(tmp_path), gentle.memory)
    assert (found["experts"], found["preset"]) == (None, "gentle")
    assert found["layers"]


@pytest.mark.parametrize("trust", [False, True])
def test_a_model_is_read_as_its_engine_will_read_it(trust, tiny, tmp_path, monkeypatch):
    config = json.loads((Path(tiny) / "config.json").read_text())
    config["pacellm"] = {"layers": [1], "experts": {"path": "stored"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    told = {}
    tokenizers = SimpleNamespace(from_pretrained=lambda model, **words: told.update(words))
    monkeypatch.setattr("transformers.AutoTokenizer", tokenizers)
    read = compat.checkpoint_config
    monkeypatch.setattr(
        compat, "checkpoint_config", lambda model, code: told.update(code=code) or read(model, code)
    )
    engine = json.dumps({"trust_remote_code": trust})
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    add_engine(parser, "")
    add_settings(parser)
    args = parser.parse_args([str(tmp_path), "--alpha", "0.5", "--engine", engine])
    _, found = read_model(args)
    assert told == {"trust_remote_code": trust, "code": trust}
    assert (found.layers, found.alpha) == ((1,), 0.5)
    assert found.experts.path == str(tmp_path / "stored")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["niah", "--memory", '{"layers": [99]}'], "layers = 99 is not allowed"),
        (["loss", "--memory", '{"layers": [99]}'], "layers = 99 is not allowed"),
        (["sweep", "--try", '{"layers": [[99]]}'], "layers = 99 is not allowed"),
        (["niah", "--lengths", "64,990000"], "a prompt of 990000 tokens (--lengths) needs 990016"),
        (["loss", "--tokens", "990000"], "a text (--tokens) needs 990001 tokens with its"),
        (
            ["niah", "--lengths", "64,500", "--engine", '{"max_model_len": 512}'],
            "needs 516 tokens with its answer, and this engine has room for 512",
        ),
    ],
)
def test_what_cannot_be_measured_to_its_end_is_not_begun(words, sentence, tiny, tmp_path, capsys):
    def begun(*args, **more):
        raise AssertionError("an engine was made")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm.LLM", begun)
        assert main(["eval", words[0], tiny, "--out", str(tmp_path), *words[1:]]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.startswith("pacellm: ")
    assert said.count("\n") == 1


def test_an_engine_that_refuses_is_a_sentence_and_what_nobody_foresaw_another_status(
    tiny, tmp_path, capsys, monkeypatch
):
    words = ["eval", "niah", tiny, "--out", str(tmp_path), "--lengths", "64", "--quiet"]
    assert (
        main([*words, "--configs", "gentle", "--engine", '{"kv_sharing_fast_prefill": true}']) == 2
    )
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("pacellm: memory does not work with fast prefill: ")
    assert "[type=" not in said
    assert main([*words, "--configs", "off", "--engine", '{"max_num_batched_tokens": 0}']) == 2
    assert "pacellm: the engine cannot be made: " in capsys.readouterr().err
    monkeypatch.setattr("vllm.LLM", lambda **more: 1 / 0)
    assert main([*words, "--configs", "off"]) == 3
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_sweep_tries_one_thing_at_a_time_or_everything():
    tried = {"alpha": [0.1, 0.2], "layers": [[0], [1]]}
    alone = combinations(tried, {"alpha": 0.1}, product=False)
    assert [s.name for s in alone] == ["base", "alpha=0.2", "layers=[0]", "layers=[1]"]
    assert alone[2].memory == {"alpha": 0.1, "layers": [0]}
    assert len(combinations(tried, {}, product=True)) == 4
    with pytest.raises(EvalError, match=r"--try alpha = 0\.1 must be a list"):
        combinations({"alpha": 0.1}, {}, product=False)


@pytest.mark.parametrize(("gain", "warned"), [(0.0, True), (1.0, False)])
def test_a_sweep_recommends_the_best_and_warns_when_it_is_not_better(tmp_path, gain, warned):
    good, bad = Setting("good", {"alpha": 0.1}), Setting("bad", {"alpha": 0.9})
    scores = {"off": 0.0, "bad": -1.0, "good": gain}
    with Records(tmp_path / "items.jsonl", {}) as records:
        for name, score in scores.items():
            for sample in range(40):
                extra = {"length": 64, "sample": sample, "exact": score}
                records.add({**result(name, f"64/0/{sample}"), **extra})
        table, text = choose(records, [bad, good], {"model": "m"})
    assert yaml.safe_load(text) == {
        "model": "m",
        "additional-config": '{"pacellm": {"alpha": 0.1}}',
    }
    assert ("WARNING" in text) is warned
    assert f"| good | {gain:.3f} |" in table


def test_wrong_words_stop_before_a_model_is_read(tmp_path, capsys):
    def says(*words):
        status = main(["eval", "niah", str(tmp_path), "--out", str(tmp_path / "out"), *words])
        assert status == 2
        return capsys.readouterr().err

    assert "'offical' is not known" in says("--configs", "offical")
    assert "--memory '[1]' must be a JSON object" in says("--memory", "[1]")
    assert "one server for each of off, gentle" in says("--base-url", "http://x/v1")
    assert f"the tokenizer of '{tmp_path}' cannot be read" in says()
