"""The trained tiny model on real engines: it finds needles, in this process and over HTTP."""

import json
from pathlib import Path

import pytest
from servers import PACELLM, serving

from pacellm_vllm.cli import main

ROOT = Path(__file__).parent.parent.parent
TINY = ROOT / "scripts" / "tiny"
ENGINE = {"dtype": "float32", "block_size": 16, "kv_cache_memory_bytes": 32 << 20}
GRID = ["--needles", "3", "--digits", "2", "--max-tokens", "3", "--depths", "0,100"]
GRID += ["--samples", "5", "--quiet", "--memory", '{"segment_size": 64}']


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")


def niah(out, *words):
    status = main(["eval", "niah", str(TINY), "--out", str(out), *GRID, *words])
    return status, json.loads((out / "report.json").read_text())


def test_needles_with_and_without_memory_and_again_after_an_interruption(tmp_path):
    words = ["--lengths", "128,256", "--configs", "off,official", "--engine", json.dumps(ENGINE)]
    status, report = niah(tmp_path, *words)
    assert status == 0
    assert report["configs"]["off"]["exact"] >= 0.85
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {"heat-off.png", "heat-official.png", "difference-official-off.png"}
    lines = (tmp_path / "items.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 2 * 2 * 2 * 5
    # Only the second configuration lacks something, and memory has to answer it as before.
    (tmp_path / "items.jsonl").write_text("".join(lines[:-7]) + lines[-7][:9])
    assert niah(tmp_path, *words) == (0, report)
    again = (tmp_path / "items.jsonl").read_text().splitlines(keepends=True)
    assert again == lines


def test_a_server_says_what_the_engine_in_this_process_says(tmp_path):
    words = ["--lengths", "128", "--configs", "official"]
    engine = {**ENGINE, "max_model_len": 512}
    status, here = niah(tmp_path / "here", *words, "--engine", json.dumps(engine))
    assert status == 0
    command = [*PACELLM, "serve", str(TINY), "--segment-size", "64"]
    command += ["--dtype", "float32", "--block-size", "16", "--max-model-len", "512"]
    command += ["--kv-cache-memory-bytes", str(32 << 20), "--served-model-name", "tiny"]
    with serving(command, tmp_path / "server.log") as base:
        url = ["--base-url", f"{base}/v1", "--served-model-name", "tiny"]
        status, there = niah(tmp_path / "there", *words, *url)
    assert status == 0
    assert there["configs"] == here["configs"]


def test_a_sweep_ends_in_a_file_to_serve(tmp_path, capsys):
    words = ["--lengths", "128", "--try", '{"alpha": [0.1]}', "--engine", json.dumps(ENGINE)]
    assert main(["eval", "sweep", str(TINY), "--out", str(tmp_path), *GRID, *words]) == 0
    text = (tmp_path / "recommended.yaml").read_text()
    assert '"architectures": ["PaceQwen2ForCausalLM"]' in text
    assert '"segment_size": 64' in text
    assert text in capsys.readouterr().out
