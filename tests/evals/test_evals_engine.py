"""The trained tiny model on real engines: it finds needles, in this process and over HTTP."""

import json

import pytest

from pacellm_vllm.cli import main

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
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {"heat-off.png", "heat-official.png", "difference-official-off.png"}
    lines = (tmp_path / "items.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 2 * (1 + 2 * 2 * 5)
    # Only the second configuration lacks something, and memory has to answer it as before.
    (tmp_path / "items.jsonl").write_text("".join(lines[:-7]) + lines[-7][:9])
    assert niah(tiny, tmp_path, *words) == (0, report)
    again = (tmp_path / "items.jsonl").read_text().splitlines(keepends=True)
    assert again == lines


def test_a_sweep_ends_in_a_file_to_serve(tiny, tmp_path, capsys):
    words = ["--lengths", "128", "--try", '{"alpha": [0.1]}', "--engine", json.dumps(ENGINE)]
    assert main(["eval", "sweep", tiny, "--out", str(tmp_path), *GRID, *words]) == 0
    text = (tmp_path / "recommended.yaml").read_text()
    assert '"architectures": ["PaceQwen2ForCausalLM"]' in text
    assert '"segment_size": 64' in text
    assert text in capsys.readouterr().out
