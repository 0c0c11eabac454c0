"""``pacellm cluster`` as it is called."""

import argparse
import json

import pytest
from checkpoints import make_checkpoint

from pacellm_vllm.experts import command
from pacellm_vllm.experts.orders import EXPERTS_JSON
from pacellm_vllm.experts.settings import Assignment, Features


@pytest.fixture
def call(tmp_path):
    def call(*arguments):
        parser = argparse.ArgumentParser(prog="pacellm")
        command.add_parser(parser.add_subparsers())
        args, rest = parser.parse_known_args(["cluster", *map(str, arguments)])
        args.cache = args.cache or str(tmp_path / "cache")
        return args.run(args, rest)

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


def test_choices_are_those_of_the_library():
    assert Features.__args__ == command.FEATURES
    assert Assignment.__args__ == command.ASSIGNMENTS
