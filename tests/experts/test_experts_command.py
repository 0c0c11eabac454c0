"""``pacellm cluster`` as it is called."""

import argparse
import json

import pytest
import torch
from checkpoints import make_checkpoint
from safetensors.torch import load_file, save_file

from pacellm_vllm import cli
from pacellm_vllm.experts import command
from pacellm_vllm.experts.orders import EXPERTS_JSON


@pytest.fixture
def call(tmp_path):
    def call(*arguments):
        cache = ("--cache", tmp_path / "cache")
        return cli.main(["cluster", *map(str, (*arguments, *cache))])

    return call


def test_a_checkpoint_is_clustered(call, tmp_path, capsys):
    source = make_checkpoint(tmp_path / "model", "qwen2")
    assert call(source, tmp_path / "out", "--experts", 8, "--layers", "0,2-3", "--seed", 3) == 0
    about = json.loads((tmp_path / "out" / EXPERTS_JSON).read_text())
    assert (list(about["layers"]), about["num_experts"], about["seed"]) == (["0", "2", "3"], 8, 3)
    out, err = capsys.readouterr()
    assert "3 layers of 8 experts" in out
    assert "clustering: 100%" in err
    assert "writing: 100%" in err


def fill_gates(source, value):
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("gate_proj.weight"):
            tensor.fill_(value)
    save_file(tensors, source / "model.safetensors")


@pytest.mark.parametrize(
    ("experts", "value"), [(344, None), (8, 0.0), (8, 0.1), (344, 0.0), (1, 0.0)]
)
def test_neurons_that_no_split_tells_apart(call, tmp_path, capsys, experts, value):
    source = make_checkpoint(tmp_path / "model", "qwen2")
    if value is not None:
        fill_gates(source, value)
    capsys.readouterr()
    out = tmp_path / "out"
    assert call(source, out, "--experts", experts, "--layers", "0,2", "--quiet") == 0
    said, error = capsys.readouterr()
    assert f"2 layers of {experts} experts" in said
    assert "any split is as good" in said
    assert error == ""
    about = json.loads((out / EXPERTS_JSON).read_text())["layers"]["2"]
    assert about["expert_size"] == 344 // experts
    order = load_file(out / "pacellm_experts" / "orders.safetensors")["layers.2.order"]
    assert torch.equal(order.sort().values, torch.arange(344))
    config = json.loads((out / "config.json").read_text())
    assert config["pacellm"]["experts"] == {"path": "."}


def test_layers_without_a_difference_are_not_counted(call, tmp_path, capsys):
    source = make_checkpoint(tmp_path / "model", "qwen2")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.gate_proj.weight"].zero_()
    save_file(tensors, source / "model.safetensors")
    assert call(source, tmp_path / "out", "--experts", 8, "--layers", "0-1", "--quiet") == 0
    explained = float(capsys.readouterr().out.split("they explain ")[1].split(" ")[0])
    assert explained > 1


def test_quiet_shows_no_progress(call, tmp_path, capsys):
    source = make_checkpoint(tmp_path / "model", "qwen2")
    assert call(source, tmp_path / "out", "--experts", 8, "--layers", "1", "--quiet") == 0
    assert "clustering:" not in capsys.readouterr().err


def test_what_is_wrong_is_one_line_and_status_2(call, tmp_path, capsys):
    source = make_checkpoint(tmp_path / "model", "qwen2")
    capsys.readouterr()
    assert call(source, tmp_path / "out", "--experts", 10) == 2
    assert "8 or 43 would" in capsys.readouterr().err
    assert call(source, tmp_path / "out", "--no-such-flag") == 2
    assert "--no-such-flag" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_nowhere_is_one_line(call, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert call("no-such-owner/no-such-model", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "neither a directory nor a model that can be downloaded" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "layers"),
    [("12,26", [12, 26]), ("0-3", [0, 1, 2, 3]), ("1,4-5", [1, 4, 5]), ("all", None)],
)
def test_layers_are_lists_and_ranges(text, layers):
    assert command.parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,,2", "-1"])
def test_other_layers_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="12,26"):
        command.parse_layers(text)
