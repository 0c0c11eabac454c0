"""What is wrong with input, settings or disk is one sentence, and nothing is written."""

import errno
import json
import os
import shutil

import pytest
import torch
from clustered import left_behind
from ffn_models import NEURONS
from safetensors.torch import load_file, save_file

from pacellm_vllm.experts import cache, orders, rewrite
from pacellm_vllm.experts.errors import ExpertsError
from pacellm_vllm.experts.settings import ClusterSettings


def edit_config(**changes):
    def edit(source):
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, **changes}))

    return edit


def edit_weights(change):
    def edit(source):
        tensors = load_file(source / "model.safetensors")
        change(tensors)
        save_file(tensors, source / "model.safetensors")

    return edit


GATE, UP, DOWN = (f"model.layers.1.mlp.{n}_proj.weight" for n in ("gate", "up", "down"))


def set_nan(name):
    return edit_weights(lambda t: t[name].view(-1).__setitem__(7, float("nan")))


def truncate(source):
    shard = source / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


FAILURES = {
    "no config": (lambda s: (s / "config.json").unlink(), r"config\.json cannot be read"),
    "broken config": (lambda s: (s / "config.json").write_text("{"), "not valid JSON"),
    "no weights": (lambda s: (s / "model.safetensors").unlink(), "no model.*safetensors"),
    "truncated": (truncate, "truncated or damaged"),
    "not safetensors": (
        lambda s: (s / "model.safetensors").write_bytes(b"x" * 99),
        "truncated or damaged",
    ),
    "quantised": (edit_config(quantization_config={"bits": 4}), "quantise the result"),
    "int8 weights": (
        edit_weights(lambda t: t.__setitem__(GATE, t[GATE].to(torch.int8))),
        f"{GATE} is I8.*quantise the result",
    ),
    "fp8 weights": (
        edit_weights(lambda t: t.__setitem__(DOWN, t[DOWN].to(torch.float8_e4m3fn))),
        f"{DOWN} is F8_E4M3",
    ),
    "missing gate": (edit_weights(lambda t: t.pop(GATE)), f"{GATE} is missing"),
    "missing up": (edit_weights(lambda t: t.pop(UP)), f"{UP} is missing"),
    "missing down": (edit_weights(lambda t: t.pop(DOWN)), f"{DOWN} is missing"),
    "missing layer": (
        edit_weights(lambda t: [t.pop(n) for n in (GATE, UP, DOWN)]),
        "layer 1 has no known FFN",
    ),
    "another shape": (
        edit_weights(lambda t: t.__setitem__(UP, t[UP][:-8].contiguous())),
        r"up_proj\.weight has shape \[88, 32\]",
    ),
    "bias of another shape": (
        edit_weights(lambda t: t.__setitem__(UP.replace("weight", "bias"), torch.zeros(32))),
        r"up_proj\.bias is F32 of shape \[32\]",
    ),
    "unknown tensor": (
        edit_weights(
            lambda t: t.__setitem__("model.layers.1.mlp.norm.weight", torch.ones(NEURONS))
        ),
        "not one of the tensors known",
    ),
    "mixture": (
        edit_weights(
            lambda t: t.__setitem__("model.layers.1.mlp.experts.0.up_proj.weight", t.pop(UP))
        ),
        "mixture of experts already",
    ),
    "nan in gate": (set_nan(GATE), f"{GATE} has NaN"),
    "nan in down": (set_nan(DOWN), f"{DOWN} has NaN"),
}


def one_sentence(error):
    text = str(error)
    assert text.startswith("pacellm: ")
    assert "\n" not in text
    assert text.endswith(".")


@pytest.mark.parametrize("what", FAILURES)
def test_bad_input_is_one_sentence_and_nothing_is_written(save, run_cluster, tmp_path, what):
    damage, sentence = FAILURES[what]
    source = save()
    damage(source)
    with pytest.raises(ExpertsError, match=sentence) as raised:
        run_cluster(source)
    one_sentence(raised.value)
    assert left_behind(tmp_path) == []


def test_a_shard_or_tensor_that_only_the_index_knows_is_missing(save, run_cluster, tmp_path):
    source = save(shard_size="40KB")
    index = source / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    shard = listed["weight_map"][GATE]
    tensors = load_file(source / shard)
    save_file({name: t for name, t in tensors.items() if name != GATE}, source / shard)
    with pytest.raises(ExpertsError, match=f"{GATE} is missing from .*{shard}"):
        run_cluster(source)
    (source / shard).unlink()
    with pytest.raises(ExpertsError, match=f"{shard} is missing, truncated or damaged"):
        run_cluster(source)
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(
    ("settings", "kwargs", "sentence"),
    [
        (ClusterSettings(10), {}, "does not split 96 neurons into equal experts; 8 or 12 would"),
        (ClusterSettings(8), {"layers": [0, 3]}, "layers = 3 is not allowed.*from 0 to 2"),
        (ClusterSettings(8), {"layers": []}, "no layers were chosen"),
        (ClusterSettings(8, "rows"), {}, "features = 'rows' is not allowed"),
        (ClusterSettings(8, "activations"), {}, "need a file of activations"),
        (ClusterSettings(8, "gate"), {"activations": "x"}, "need a file of activations"),
        (ClusterSettings(8, "activations"), {"activations": "x"}, "layers.0 of x"),
    ],
)
def test_wrong_settings_are_refused(save, run_cluster, tmp_path, settings, kwargs, sentence):
    with pytest.raises(ExpertsError, match=sentence):
        run_cluster(save(), settings, **kwargs)
    assert left_behind(tmp_path) == []


def test_an_output_that_exists_is_refused_and_kept(save, run_cluster, tmp_path):
    source = save()
    (tmp_path / "out").mkdir()
    with pytest.raises(ExpertsError, match="exists already"):
        run_cluster(source)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("where", ["copy", "write", "cache", "orders"])
def test_a_full_disk_is_one_sentence_and_nothing_is_left(
    save, run_cluster, tmp_path, monkeypatch, where
):
    source = save(shard_size="40KB")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    calls = []

    def fail(*args, **kwargs):
        calls.append(args)
        if where != "copy" or len(calls) > 4:
            raise full
        return real(*args, **kwargs)

    owner, name = {
        "copy": (rewrite.shutil, "copyfile"),
        "write": (rewrite, "permute"),
        "cache": (cache.os, "replace"),
        "orders": (orders, "save_file"),
    }[where]
    real = getattr(owner, name)
    if where == "orders":
        run_cluster(source)
        shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(ExpertsError, match="No space left on device") as raised:
        run_cluster(source)
    monkeypatch.undo()
    one_sentence(raised.value)
    assert calls
    assert left_behind(tmp_path) == []
    run_cluster(source)


def test_a_disk_that_is_too_small_is_known_beforehand(save, run_cluster, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(rewrite.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ExpertsError, match=r"its disk has 0\.0 GB free"):
        run_cluster(save())
    assert left_behind(tmp_path) == []
