"""What is wrong with input, settings or disk is one sentence, and nothing is written."""

import errno
import json
import os
import shutil

import pytest
import torch
from clustered import left_behind, logits, relative
from ffn_models import NEURONS
from safetensors.torch import load_file, save_file

from pacellm_vllm.experts import cache, orders, rewrite
from pacellm_vllm.experts.errors import ExpertsError
from pacellm_vllm.experts.settings import ClusterSettings
from pacellm_vllm.models.table import experts_architecture


def edit_config(**changes):
    def edit(source):
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, **changes}))

    return edit


def write_config(text):
    return lambda source: (source / "config.json").write_text(text)


def edit_weights(change):
    def edit(source):
        tensors = load_file(source / "model.safetensors")
        change(tensors)
        save_file(tensors, source / "model.safetensors")

    return edit


def split(source):
    """Every tensor in two shards beside an index; returns the index's weight_map."""
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = sorted(tensors)
    listed = {}
    for number, mine in enumerate((names[::2], names[1::2]), 1):
        shard = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in mine}, source / shard)
        listed |= dict.fromkeys(mine, shard)
    (source / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return listed


def write_index(make):
    """An index that is ``make(weight_map)`` instead."""

    def edit(source):
        listed = split(source)
        (source / INDEX).write_text(json.dumps(make(listed)))

    return edit


def overlay(shard, indexed=True):
    """GATE of other values in ``shard``, too, where the index has it or does not."""

    def edit(source):
        listed = split(source)
        changed = load_file(source / listed[GATE])[GATE] + 1
        save_file({GATE: changed, "other": torch.ones(1)}, source / shard)
        of_index = {**listed, "other": shard} | ({GATE: shard} if indexed else {})
        (source / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": of_index}))

    return edit


def other_shape(source):
    """GATE of another shape in a file between the one of the index and the first."""
    overlay("z.safetensors")(source)
    save_file({GATE: torch.ones(8, 8), "another": torch.ones(1)}, source / "y.safetensors")
    index = json.loads((source / INDEX).read_text())
    index["weight_map"]["another"] = "y.safetensors"
    (source / INDEX).write_text(json.dumps(index))


def without_index(source):
    """``model.safetensors`` and shards of the same tensors."""
    whole = (source / "model.safetensors").read_bytes()
    split(source)
    (source / INDEX).unlink()
    (source / "model.safetensors").write_bytes(whole)


INDEX = "model.safetensors.index.json"
GATE, UP, DOWN = (f"model.layers.1.mlp.{n}_proj.weight" for n in ("gate", "up", "down"))


def set_nan(name):
    return edit_weights(lambda t: t[name].view(-1).__setitem__(7, float("nan")))


def truncate(source):
    shard = source / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


FAILURES = {
    "no config": (lambda s: (s / "config.json").unlink(), r"config\.json cannot be read"),
    "broken config": (lambda s: (s / "config.json").write_text("{"), "not valid JSON"),
    "config is a list": (write_config("[1]"), r"config\.json is not a JSON object"),
    "config is null": (write_config("null"), r"config\.json is not a JSON object"),
    "config is a number": (write_config("3"), r"config\.json is not a JSON object"),
    "config is deep": (write_config("[" * 100_000), r"config\.json is not valid JSON"),
    "config is no text": (
        lambda s: (s / "config.json").write_bytes(b"\xff\xfe\x00"),
        r"config\.json is not valid JSON",
    ),
    "config is a directory": (
        lambda s: ((s / "config.json").unlink(), (s / "config.json").mkdir()),
        r"config\.json cannot be read",
    ),
    "text_config is a list": (edit_config(text_config=[]), r"text_config = \[\].*an object"),
    "text_config is text": (edit_config(text_config="x"), "text_config = 'x'.*an object"),
    "no number of layers": (edit_config(num_hidden_layers=None), "does not say num_hidden_layers"),
    "layers as text": (edit_config(num_hidden_layers="3"), "num_hidden_layers = '3'.*integer"),
    "layers as truth": (edit_config(num_hidden_layers=True), "num_hidden_layers = True.*integer"),
    "no layers": (edit_config(num_hidden_layers=0), "num_hidden_layers = 0.*integer"),
    "layers without end": (
        edit_config(num_hidden_layers=10**15),
        "num_hidden_layers = 1000000000000000, but",
    ),
    "pacellm is text": (edit_config(pacellm="x"), "pacellm = 'x'.*an object"),
    "pacellm is a list": (edit_config(pacellm=[]), r"pacellm = \[\].*an object"),
    "pacellm is a number": (edit_config(pacellm=3), "pacellm = 3.*an object"),
    "pacellm is wrong": (edit_config(pacellm={"alpha": 7}), "alpha = 7 is not allowed"),
    "more experts for a token than there are": (
        edit_config(pacellm={"experts": {"path": "x", "top_k": 12}}),
        r"experts\.top_k = 12 is not allowed",
    ),
    "experts are wrong": (
        edit_config(pacellm={"experts": {"num_experts": []}}),
        r"experts\.num_experts = \[\] is not allowed",
    ),
    "architectures is a number": (edit_config(architectures=3), "architectures = 3.*a list"),
    "architectures is an object": (edit_config(architectures={}), r"architectures = \{\}.*a list"),
    "architectures holds null": (edit_config(architectures=[None]), r"\[None\].*a list"),
    "index is a list": (write_index(lambda listed: [listed]), "is not a JSON object"),
    "index is null": (write_index(lambda listed: None), "is not a JSON object"),
    "index without a map": (write_index(lambda listed: {}), "has no weight_map"),
    "map is null": (write_index(lambda listed: {"weight_map": None}), "has no weight_map"),
    "map is a list": (write_index(lambda listed: {"weight_map": [*listed]}), "has no weight_map"),
    "map is text": (write_index(lambda listed: {"weight_map": "x"}), "has no weight_map"),
    "map is empty": (write_index(lambda listed: {"weight_map": {}}), "has no weight_map"),
    "map to a number": (
        write_index(lambda listed: {"weight_map": {**listed, GATE: 3}}),
        f"weight_map has {GATE} in 3.*a file name",
    ),
    "map to a list": (
        write_index(lambda listed: {"weight_map": {**listed, GATE: []}}),
        rf"weight_map has {GATE} in \[\].*a file name",
    ),
    "map to null": (
        write_index(lambda listed: {"weight_map": {**listed, GATE: None}}),
        f"weight_map has {GATE} in None.*a file name",
    ),
    "map to another folder": (
        write_index(lambda listed: {"weight_map": {**listed, GATE: "../model/x.safetensors"}}),
        "a file name",
    ),
    "map to other files": (
        write_index(lambda listed: {"weight_map": {**listed, GATE: "config.json"}}),
        "a file name",
    ),
    "the same tensors twice": (
        without_index,
        r"lm_head\.weight is in both model-00001-of-00002\.safetensors and model\.safetensors",
    ),
    "an overlay that loaders pass over": (
        overlay("a.safetensors"),
        rf"{GATE} of .* is in a\.safetensors by the index, but loaders take it from model-",
    ),
    "an overlay that is not in the index": (
        overlay("z.safetensors", indexed=False),
        rf"{GATE} of .* is in model-.* by the index, but loaders take it from z\.safetensors",
    ),
    "copies of several shapes": (
        other_shape,
        rf"{GATE} of .* is F32 of shape \[96, 32\] in z.safetensors, but F32 of shape \[8, 8\] in",
    ),
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
        run_cluster(source, rename=experts_architecture)
    one_sentence(raised.value)
    assert left_behind(tmp_path) == []
    # What can be told beforehand is not told after the clustering.
    assert what.startswith("nan") or not (tmp_path / "cache").exists()


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


NULLS = ("text_config", "quantization_config", "compression_config", "pacellm", "n_layer")


@pytest.mark.parametrize("changes", [dict.fromkeys(NULLS), {"text_config": {}}])
def test_null_in_config_means_absent(save, run_cluster, tmp_path, changes):
    source = save("llama")
    edit_config(**changes)(source)
    run_cluster(source, rename=experts_architecture)
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert after["pacellm"] == {"experts": {"path": "."}}
    assert {name: after[name] for name in changes if name != "pacellm"} == {
        name: value for name, value in changes.items() if name != "pacellm"
    }


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("LlamaForCausalLM", ["PaceLlamaForCausalLM"]),
        (["LlamaForCausalLM", "Other"], ["PaceLlamaForCausalLM"]),
        (None, None),
        ([], []),
    ],
)
def test_the_architecture_may_be_a_name_or_a_list(save, run_cluster, tmp_path, given, named):
    source = save("llama")
    edit_config(architectures=given)(source)
    run_cluster(source, rename=experts_architecture)
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert after["architectures"] == named
    assert after.get("pacellm") == ({"experts": {"path": "."}} if named else None)


def test_nulls_within_text_config_are_absent_too(save, run_cluster):
    source = save()
    text = {"quantization_config": None, "num_hidden_layers": 3}
    edit_config(text_config=text, num_hidden_layers=None)(source)
    assert len(run_cluster(source)) == 3


def test_the_index_decides_which_copy_of_a_tensor_counts(save, run_cluster, tmp_path):
    source = save("llama")
    overlay("z.safetensors")(source)
    listed = json.loads((source / INDEX).read_text())["weight_map"]
    model = sorted({shard for shard in listed.values() if shard.startswith("model-")})
    base = next(shard for shard in model if GATE in load_file(source / shard))
    run_cluster(source, rename=experts_architecture)
    out = tmp_path / "out"
    assert (out / INDEX).read_bytes() == (source / INDEX).read_bytes()
    written = [load_file(out / shard)[GATE] for shard in (base, "z.safetensors")]
    assert torch.equal(*written)
    assert relative(logits(out), logits(source)) <= 1e-5
    # Not vacuous: the other copy makes another model.
    (source / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {**listed, GATE: base}}))
    save_file({"other": torch.ones(1)}, source / "z.safetensors")
    assert relative(logits(out), logits(source)) > 1e-2


def test_copies_that_are_alike_are_one_tensor(save, run_cluster, tmp_path):
    source = save("llama")
    listed = split(source)
    save_file({GATE: load_file(source / listed[GATE])[GATE]}, source / "a.safetensors")
    (source / INDEX).write_text(
        json.dumps({"metadata": {}, "weight_map": {**listed, GATE: "a.safetensors"}})
    )
    run_cluster(source)
    assert relative(logits(tmp_path / "out"), logits(source)) <= 1e-5


@pytest.mark.parametrize(
    ("settings", "kwargs", "sentence"),
    [
        (ClusterSettings(10), {}, "does not split 96 neurons into equal experts; 8 or 12 would"),
        (ClusterSettings(8), {"layers": [0, 3]}, "layers = 3 is not allowed.*from 0 to 2"),
        (ClusterSettings(8), {"layers": []}, "no layers were chosen"),
        (ClusterSettings(8, seed=-1), {}, "seed = -1 is not allowed"),
        (ClusterSettings(8, seed=2**32), {}, "seed = 4294967296 is not allowed"),
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
