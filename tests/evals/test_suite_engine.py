"""Benchmarks in their own schemas on real engines, in this process and over HTTP."""

import json
import socket

import benchmark_files
import pytest
import torch
from hf import load_model
from transformers import AutoTokenizer

from pacellm_vllm.cli import main

ENGINE = {"dtype": "float32", "block_size": 16, "kv_cache_memory_bytes": 32 << 20}
TASKS = "longbench_triviaqa,longbench_lcc,infinitebench_passkey,niah_single_1,mmlu_anatomy"
TASKS += ",qa_numbers,qa_numbers_logprob"
WORDS = ["--tasks", TASKS, "--limit", "3", "--batch", "2", "--max-length", "300", "--quiet"]
WORDS += ["--memory", '{"segment_size": 64}']
CONFIGS = '{"off": null, "again": null, "official": {"preset": "official"}}'

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return benchmark_files.write_all(tmp_path_factory.mktemp("data"))


def suite(model, out, data, *words):
    command = ["eval", "suite", model, "--out", str(out), "--data", str(data)]
    assert main([*command, *WORDS, *words]) == 0
    return json.loads((out / "report.json").read_text())


def flat(value, path=()):
    """Every leaf of nested dicts and lists, by its path."""
    if not isinstance(value, dict | list):
        return {path: value}
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    return {at: leaf for key, below in inside for at, leaf in flat(below, (*path, key)).items()}


def results(out):
    lines = [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]
    return {(line["config"], line["id"]): line for line in lines if "id" in line}


@pytest.fixture(scope="module")
def in_process(tiny, data, tmp_path_factory):
    """Three configurations in this process: where the results are, and which hosts were asked."""
    out = tmp_path_factory.mktemp("suite")
    asked = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
        look_up = socket.getaddrinfo
        patch.setattr(
            socket,
            "getaddrinfo",
            lambda *args, **named: asked.add(args[0]) or look_up(*args, **named),
        )
        engine = json.dumps({**ENGINE, "max_model_len": 640})
        report = suite(tiny, out, data, "--configs", CONFIGS, "--engine", engine)
    return out, report, asked


def test_each_score_is_of_its_own_item(in_process):
    out, report, _ = in_process
    for name in ("infinitebench_passkey", "niah_single_1@128", "niah_single_1@256"):
        task = report["tasks"][name]
        assert task["items"] == 3
        assert task["scores"]["off"] == task["scores"]["again"] == 1
        # What memory changes may fall either way by rounding, but it finds most.
        assert task["scores"]["official"] > 0.5
    # The answer is one of 25 words or so.
    assert 0.05 < report["tasks"]["longbench_triviaqa"]["scores"]["off"] < 0.1
    found = results(out)
    assert len(found) == 3 * 8 * 3
    keys = [row for row in found.values() if row["id"].startswith("infinitebench_passkey")]
    assert len({row["target"] for row in keys}) > 1
    for row in keys:
        right = row["output"][0].split(".")[0].strip() == row["target"]
        assert row["scores"]["score"] == right
    choices = found["off", "mmlu_anatomy/0"]["output"]
    likeliest = max(range(4), key=lambda i: choices[i][0])
    right = found["off", "mmlu_anatomy/0"]["scores"]["acc"]
    assert right == (likeliest == found["off", "mmlu_anatomy/0"]["target"])


def test_a_given_answer_is_scored_as_transformers_scores_it(in_process, tiny, data):
    out, report, _ = in_process
    found = results(out)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    model = load_model(tiny, dtype=torch.float32)
    rows = [json.loads(line) for line in (data / "qa/numbers.jsonl").open()]
    for i, row in enumerate(rows[:3]):
        prompt = tokenizer(f"{row['context']}\n\nQuestion: {row['question']}\nAnswer:").input_ids
        answer = tokenizer(f" {row['answers'][0]}").input_ids
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt + answer])).logits[0].log_softmax(dim=-1)
        places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        truth = sum(logprobs[at, token].item() for at, token in zip(places, answer, strict=True))
        got = found["off", f"qa_numbers_logprob/{i}"]["scores"]["logprob"]
        assert got == pytest.approx(truth, abs=1e-3)
    shown = next(
        line for line in (out / "report.md").read_text().splitlines() if "_logprob | 3" in line
    )
    mean = report["tasks"]["qa_numbers_logprob"]["scores"]["off"]
    assert f"| {mean:.4f} |" in shown


def test_a_configuration_against_itself_is_exactly_zero(in_process):
    _, report, _ = in_process
    for task in report["tasks"].values():
        again = task["differences"]["again"]
        assert [again[name] for name in ("mean", "low", "high")] == [0, 0, 0]
        assert again["verdict"] == "equal on every item"


def test_no_host_is_asked_for_data_in_files(in_process):
    _, _, asked = in_process
    assert asked <= {None, "localhost", "127.0.0.1", "0.0.0.0", "::1", socket.gethostname()}


def test_the_report_says_how_it_was_measured(in_process):
    out, report, _ = in_process
    text = (out / "report.md").read_text()
    for name in ("pacellm-vllm", "vllm", "torch", "transformers", "lm_eval"):
        assert f"{name} {report['settings']['versions'][name]}" in text
    engine = report["engines"]["official"]
    assert engine["config"]["segment_size"] == 64
    assert engine["engine"]["max_num_batched_tokens"] > 0
    assert engine["engine"]["dtype"] == "float32"
    assert report["engines"]["off"]["config"] is None
    assert report["tasks"]["longbench_triviaqa"]["cut"] == 0


def test_an_interrupted_run_goes_on_to_the_same_report(tiny, in_process, data, tmp_path):
    out, report, _ = in_process
    lines = (out / "items.jsonl").read_text().splitlines(keepends=True)
    # In the middle of the last configuration, and of a line.
    (tmp_path / "items.jsonl").write_text("".join(lines[:-5]) + lines[-5][:30])
    engine = json.dumps({**ENGINE, "max_model_len": 640})
    again = suite(tiny, tmp_path, data, "--configs", CONFIGS, "--engine", engine)
    # A question whose answer was asked for before the interruption is read whole by the scored
    # one, not from the prefix cache: other rounding.
    assert flat(again) == pytest.approx(flat(report), abs=1e-4)
    continued = (tmp_path / "items.jsonl").read_text().splitlines(keepends=True)
    assert continued[: len(lines) - 5] == lines[:-5]
    items = [[json.loads(line) for line in file[-5:]] for file in (continued, lines)]
    assert flat(items[0]) == pytest.approx(flat(items[1]), abs=1e-4)


def test_other_data_is_another_measurement(tiny, in_process, tmp_path, capsys):
    out, _, _ = in_process
    other = benchmark_files.write_all(tmp_path)
    path = other / "InfiniteBench" / "passkey.jsonl"
    path.write_text(path.read_text().replace("The magic number", "One magic number", 1))
    command = ["eval", "suite", tiny, "--out", str(out), "--data", str(other), *WORDS]
    engine = json.dumps({**ENGINE, "max_model_len": 640})
    assert main([*command, "--configs", CONFIGS, "--engine", engine]) == 2
    assert "was measured with tasks = " in capsys.readouterr().err
