"""``pacellm inspect experts``: its numbers on activations that are known, and the command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pacellm_vllm import cli
from pacellm_vllm.experts import picture
from pacellm_vllm.experts.report import measure
from pacellm_vllm.experts.rewrite import cluster_checkpoint
from pacellm_vllm.experts.settings import ClusterSettings

ROOT = Path(__file__).parent.parent.parent
LICENSE = ROOT / "LICENSE"


def test_numbers_are_those_of_the_definitions():
    generator = torch.Generator().manual_seed(0)
    experts, size, count = 4, 6, 300
    tokens = torch.randint(4, (count,), generator=generator)
    # Token i wakes expert i: its neurons together, with signs of their own.
    a = 0.1 * torch.randn(count, experts * size, generator=generator)
    signs = torch.randn(experts, size, generator=generator).sign()
    for t, token in enumerate(tokens.tolist()):
        a[t, token * size : (token + 1) * size] += 3 * signs[token]
    a[:, 5] = 0
    found = measure(a, experts, tokens, {i: f"t{i}" for i in range(4)})

    mass = a.abs().view(count, experts, size).sum(2)
    for share, needed in zip((0.5, 0.9, 0.95), found.needed, strict=True):
        counts = []
        for row in mass:
            ranked = sorted(row.tolist(), reverse=True)
            held = [sum(ranked[: n + 1]) for n in range(experts)]
            counts.append((1 + sum(h < share * sum(ranked) for h in held)) / experts)
        assert needed == pytest.approx(sum(counts) / count, abs=1e-6)
    assert found.needed_random[0] > found.needed[0] == 1 / experts

    alive = [i for i in range(experts * size) if i != 5]
    matrix = torch.corrcoef(a.abs()[:, alive].T)
    same = torch.tensor([[i // size == j // size for j in alive] for i in alive])
    apart = torch.tensor([[i != j for j in alive] for i in alive])
    assert found.within == pytest.approx(float(matrix[same & apart].mean()), abs=1e-4)
    assert found.between == pytest.approx(float(matrix[~same].mean()), abs=1e-4)
    assert found.within > 0.8 > 0 > found.between
    assert found.dead == 1
    assert [found.answers[e][0][0] for e in range(4)] == ["t0", "t1", "t2", "t3"]
    assert found.curve[-1] == pytest.approx(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "model"
    script = ROOT / "scripts" / "make_tiny_model.py"
    subprocess.run([sys.executable, str(script), str(path)], check=True, capture_output=True)
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def inspect(*words):
    return cli.main(["inspect", "experts", *map(str, words), "--quiet"])


def test_three_ways_to_name_the_experts_give_one_report(model, tmp_path, capsys):
    clustered = tmp_path / "clustered"
    cluster_checkpoint(model, clustered, ClusterSettings(8), progress=False)
    common = ["--text", LICENSE, "--tokens", 700, "--layers", "1,3"]
    ways = {
        "number": [model, "--experts", 8],
        "path": [model, "--path", clustered],
        "stored": [clustered],
    }
    reports = {}
    for name, words in ways.items():
        assert inspect(*words, *common, "--out", tmp_path / name) == 0
        reports[name] = json.loads((tmp_path / name / "experts.json").read_text())["layers"]
        assert (tmp_path / name / "experts.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == [
            "experts.json",
            "experts.png",
        ]
    assert "8 experts in 2 layers, in stored order" in capsys.readouterr().out
    for layer in ("1", "3"):
        for name in ("path", "stored"):
            for key in ("needed", "curve"):
                assert reports[name][layer][key] == pytest.approx(
                    reports["number"][layer][key], rel=1e-3
                )
            assert reports[name][layer]["within"] == pytest.approx(
                reports["number"][layer]["within"], abs=1e-4
            )


def test_activations_are_those_of_the_layer(model, tmp_path):
    assert inspect(
        model, "--experts", 1, "--layers", 2, "--text", LICENSE, "--tokens", 600, "--out",
        tmp_path / "out",
    ) == 0  # fmt: skip
    found = json.loads((tmp_path / "out" / "experts.json").read_text())["layers"]["2"]["within"]
    loaded = AutoModelForCausalLM.from_pretrained(model)
    tokens = torch.tensor(AutoTokenizer.from_pretrained(model)(LICENSE.read_text())["input_ids"])
    kept = []
    loaded.model.layers[2].mlp.down_proj.register_forward_pre_hook(
        lambda module, inputs: kept.append(inputs[0][0])
    )
    with torch.no_grad():
        for window in (tokens[:512], tokens[512:600]):
            loaded(window[None])
    matrix = torch.corrcoef(torch.cat(kept).abs().T)
    count = len(matrix)
    assert found == pytest.approx(float((matrix.sum() - count) / (count * (count - 1))), abs=1e-4)


def test_what_is_wrong_is_one_line_and_no_file(model, tmp_path, capsys, monkeypatch):
    (tmp_path / "short.txt").write_text("Three short words.")
    out = tmp_path / "out"
    for words, sentence in (
        ([model, "--text", LICENSE], "has no pacellm_experts.json"),
        ([model, "--experts", 7, "--text", LICENSE], "does not split 384 neurons"),
        ([model, "--experts", 8, "--text", tmp_path / "no.txt"], "cannot be read"),
        ([model, "--experts", 8, "--text", tmp_path / "short.txt"], "correlations need"),
        ([model, "--experts", 8, "--text", LICENSE, "--port", 1], "unknown argument '--port'"),
    ):
        assert inspect(*words, "--out", out) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("pacellm: ")
        assert sentence in said
    monkeypatch.setattr(picture, "draw", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        inspect(model, "--experts", 8, "--text", LICENSE, "--tokens", 99, "--out", out)
    assert not list(tmp_path.glob("*out*"))
