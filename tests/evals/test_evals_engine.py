"""The trained tiny model on real engines: it finds needles, in this process and over HTTP."""

import json
from statistics import fmean

import benchmark_files
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pacellm_vllm.cli import main
from pacellm_vllm.evals.answers import Offline, offline_engine

ENGINE = {"dtype": "float32", "block_size": 16, "kv_cache_memory_bytes": 32 << 20}
GRID = ["--needles", "3", "--digits", "2", "--max-tokens", "3", "--depths", "0,100"]
GRID += ["--samples", "5", "--quiet", "--memory", '{"segment_size": 64}']

pytestmark = pytest.mark.usefixtures("in_this_process")


def niah(model, out, *words):
    status = main(["eval", "niah", model, "--out", str(out), *GRID, *words])
    return status, json.loads((out / "report.json").read_text())


def test_needles_with_and_without_memory_and_again_after_an_interruption(tiny, tmp_path):
    words = ["--lengths", "128,256", "--configs", "off,official", "--engine", json.dumps(ENGINE)]
    status, report = niah(tiny, tmp_path, *words)
    assert status == 0
    assert report["configs"]["off"]["exact"] >= 0.85
    assert "too narrow" not in (tmp_path / "report.md").read_text()
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {"heat-off.png", "heat-official.png", "difference-official-off.png"}
    lines = (tmp_path / "items.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 2 * (1 + 2 * 2 * 5)
    # Only the second configuration lacks something, and memory has to answer it as before.
    (tmp_path / "items.jsonl").write_text("".join(lines[:-7]) + lines[-7][:9])
    assert niah(tiny, tmp_path, *words) == (0, report)
    again = (tmp_path / "items.jsonl").read_text().splitlines(keepends=True)
    assert again == lines


def test_needles_of_a_session_and_again_after_an_interruption(tiny, tmp_path):
    words = ["eval", "sessions", tiny, "--out", str(tmp_path), "--lengths", "300,900", "--quiet"]
    words += ["--depths", "0,50,100", "--samples", "2", "--digits", "2", "--max-tokens", "3"]
    words += ["--piece", "128", "--engine", json.dumps({**ENGINE, "max_model_len": 448})]
    assert main(words) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    found = {name: config["exact"] for name, config in report["configs"].items()}
    assert found["alone"] < 0.2
    assert found["session"] > found["window"]
    assert found["session"] > 0.6
    lines = (tmp_path / "items.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 3 + 3 * 2 * 3 * 2
    # Of the last text's session two questions are lacking: it is fed and asked again.
    (tmp_path / "items.jsonl").write_text("".join(lines[:-2]) + lines[-2][:9])
    assert main(words) == 0
    assert json.loads((tmp_path / "report.json").read_text()) == report
    # Pages would be cut elsewhere.
    words[words.index("128")] = "96"
    assert main(words) == 2


def test_a_score_takes_from_the_prefix_cache_what_it_does_not_score(tiny):
    prompts, expected = benchmark_files.scored(tiny)
    with offline_engine(tiny, None, {**ENGINE, "max_model_len": 128}) as llm:
        answerer, outputs, generate = Offline(llm), [], llm.generate
        llm.generate = lambda *args, **more: outputs.append(generate(*args, **more)) or outputs[-1]
        benchmark_files.assert_near(answerer.loglikelihood(prompts[:3]), expected[:3])
        [cold] = outputs
        assert cold[0].num_cached_tokens == 0
        benchmark_files.assert_near(answerer.loglikelihood(prompts), expected)
        _, warm, again = outputs
    assert [output.num_cached_tokens for output in warm] == [48] * 4
    assert [output.prompt_token_ids for output in again] == [prompts[3][0]]
    assert again[0].num_cached_tokens == 0


def transformers_losses(model, text, tokens):
    ids = AutoTokenizer.from_pretrained(model)(text, return_tensors="pt").input_ids[:, :tokens]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model)(ids).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").tolist()


def test_loss_by_position_is_transformers_and_memory_changes_what_follows_a_segment(
    tiny, tmp_path, capsys
):
    files = []
    for name, key in (("a", "Oslo"), ("b", "Rome")):
        files.append(tmp_path / f"{name}.txt")
        files[-1].write_text(
            f"The old farmer carries the basket. The magic number of {key} is 7. " * 20
        )
    out = tmp_path / "out"
    words = ["eval", "loss", tiny, "--out", str(out), "--text", *map(str, files)]
    words += ["--tokens", "160", "--step", "64", "--configs", "off,gentle,paper"]
    words += ["--memory", '{"segment_size": 64}', "--engine", json.dumps(ENGINE)]
    assert main(words) == 0
    assert "| 64 to 128 |" in capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert report["positions"] == [[0, 64], [64, 128], [128, 160], [64, 160]]
    assert "fewer than 10 texts tend to be too narrow" in (out / "report.md").read_text()
    truth = [transformers_losses(tiny, path.read_text(), 160) for path in files]
    parts = [slice(0, 63), slice(63, 127), slice(127, 159), slice(63, 159)]
    for loss, part in zip(report["loss"]["off"], parts, strict=True):
        assert loss == pytest.approx(fmean(fmean(text[part]) for text in truth), abs=1e-3)
    for name in ("gentle", "paper"):
        first, *others = report["differences"][name]
        assert (first["low"], first["high"]) == (0, 0)
        assert all(row["low"] != row["high"] for row in others)
    lines = (out / "items.jsonl").read_text().splitlines(keepends=True)
    (out / "items.jsonl").write_text("".join(lines[:-1]))
    assert main(words) == 0
    assert json.loads((out / "report.json").read_text()) == report


def test_a_text_that_is_too_short_stops_before_a_model_is_read(tiny, tmp_path, capsys):
    short = tmp_path / "short.txt"
    short.write_text("The old farmer.")
    words = ["eval", "loss", tiny, "--out", str(tmp_path / "out"), "--text", str(short)]
    assert main([*words, "--tokens", "64"]) == 2
    said = capsys.readouterr().err
    assert "short.txt" in said
    assert "fewer than --tokens 64; drop it or lower --tokens" in said


def test_a_sweep_ends_in_a_file_to_serve(tiny, tmp_path, capsys):
    words = ["--lengths", "128", "--try", '{"alpha": [0.1]}', "--engine", json.dumps(ENGINE)]
    assert main(["eval", "sweep", tiny, "--out", str(tmp_path), *GRID, *words]) == 0
    text = (tmp_path / "recommended.yaml").read_text()
    assert '"architectures": ["PaceQwen2ForCausalLM"]' in text
    assert '"segment_size": 64' in text
    assert text in capsys.readouterr().out
