"""A clustered checkpoint is the same model; what goes wrong leaves nothing behind."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ffn_models import NEURONS, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pacellm_vllm.experts import cache, folders, orders, rewrite
from pacellm_vllm.experts.checkpoint import open_checkpoint
from pacellm_vllm.experts.cluster import cluster
from pacellm_vllm.experts.errors import ExpertsError
from pacellm_vllm.experts.orders import EXPERTS_JSON, EXPERTS_ORDERS
from pacellm_vllm.experts.rewrite import cluster_checkpoint, write_permuted
from pacellm_vllm.experts.settings import ClusterSettings

ARCHITECTURES = ("qwen2", "qwen3", "llama", "mistral", "phi3", "starcoder2", "gpt2", "opt")
ARCHITECTURES += ("phi", "gpt_neox")
SETTINGS = ClusterSettings(8)


@pytest.fixture
def save(tmp_path):
    def save(arch="qwen2", shard_size="1GB", dtype=torch.float32, **sizes):
        path = tmp_path / "model"
        tiny_model(arch, **sizes).to(dtype).save_pretrained(path, max_shard_size=shard_size)
        return path

    return save


@pytest.fixture
def run(tmp_path):
    """Cluster into ``tmp_path/out`` with a cache of its own."""

    def run(source, settings=SETTINGS, **kwargs):
        kwargs = {"cache": tmp_path / "cache", "progress": False, **kwargs}
        return cluster_checkpoint(source, tmp_path / "out", settings, **kwargs)

    return run


def logits(path):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokens = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tokens).logits


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def digests(path):
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def weights(path):
    return {
        k: v for file in sorted(path.glob("model*.safetensors")) for k, v in load_file(file).items()
    }


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_clustered_model_computes_what_the_original_does(save, run, tmp_path, arch):
    source = save(arch)
    results = run(source)
    before, after = weights(source), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(results) == 3
    assert all(any(f".{layer}." in name for name in changed) for layer in range(3))
    # Not vacuous: without its biases and rows in step the model is another one.
    assert relative(logits(tmp_path / "out"), logits(source)) <= 1e-5


def test_tensors_that_move_are_the_ffns_and_no_others(save, run, tmp_path):
    source = save("llama")
    results = run(source)
    before, after = weights(source), weights(tmp_path / "out")
    order = results[1].order
    prefix = "model.layers.1.mlp"
    for name in ("gate_proj.weight", "up_proj.weight", "gate_proj.bias", "up_proj.bias"):
        assert torch.equal(after[f"{prefix}.{name}"], before[f"{prefix}.{name}"][order])
    assert torch.equal(
        after[f"{prefix}.down_proj.weight"], before[f"{prefix}.down_proj.weight"][:, order]
    )
    still = [n for n in before if ".mlp." not in n or n.endswith("down_proj.bias")]
    assert len(still) > 10
    assert all(torch.equal(before[name], after[name]) for name in still)


def test_only_the_chosen_layers_move(save, run, tmp_path):
    source = save()
    assert list(run(source, layers=[2, 1])) == [1, 2]
    before, after = weights(source), weights(tmp_path / "out")
    moved = {n.split(".")[2] for n in before if not torch.equal(before[n], after[n])}
    assert moved == {"1", "2"}
    assert "layers.0.order" not in load_file(tmp_path / "out" / EXPERTS_ORDERS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arch", ["qwen2", "phi3", "starcoder2", "gpt2"])
def test_the_inverse_order_restores_every_byte(save, run, tmp_path, arch, dtype):
    source = save(arch, shard_size="40KB", dtype=dtype)
    assert len(list(source.glob("*.safetensors"))) > 1
    results = run(source)
    assert digests(source) != digests(tmp_path / "out")
    orders = load_file(tmp_path / "out" / EXPERTS_ORDERS)
    inverse = {layer: orders[f"layers.{layer}.order"].argsort() for layer in range(len(results))}
    write_permuted(open_checkpoint(tmp_path / "out"), tmp_path / "back", inverse, progress=False)
    assert digests(tmp_path / "back") == digests(source)


def test_a_layer_may_lie_in_several_shards(save, run, tmp_path):
    source = save(shard_size="20KB")
    shards = open_checkpoint(source).entries
    of_layer = {shards[n].shard for n in shards if n.startswith("model.layers.1.mlp")}
    assert len(of_layer) > 1
    run(source)
    assert relative(logits(tmp_path / "out"), logits(source)) <= 1e-5
    one = tmp_path / "one"
    tiny_model("qwen2").save_pretrained(one)
    whole = cluster_checkpoint(
        one, tmp_path / "whole", SETTINGS, cache=tmp_path / "c2", progress=False
    )
    orders = load_file(tmp_path / "out" / EXPERTS_ORDERS)
    assert all(torch.equal(whole[i].order, orders[f"layers.{i}.order"]) for i in range(3))


def test_orders_and_what_made_them_are_beside_the_weights(save, run, tmp_path):
    results = run(save())
    about = json.loads((tmp_path / "out" / EXPERTS_JSON).read_text())
    assert (about["num_experts"], about["features"], about["seed"]) == (8, "gate", 0)
    assert about["layers"]["2"]["expert_size"] == NEURONS // 8
    assert about["layers"]["2"]["inertia"] == results[2].inertia < results[2].random_inertia
    orders = load_file(tmp_path / "out" / EXPERTS_ORDERS)
    assert {n: o.sort().values.tolist() for n, o in orders.items()} == {
        f"layers.{layer}.order": list(range(NEURONS)) for layer in range(3)
    }


def test_tied_embeddings_and_other_files_come_along(save, run, tmp_path):
    source = save(tie_word_embeddings=True)
    (source / "tokenizer.json").write_text('{"a": 1}')
    (source / "extra").mkdir()
    (source / "extra" / "note.txt").write_text("note")
    (source / "pytorch_model.bin").write_bytes(b"other weights")
    (source / "consolidated.safetensors").write_bytes(b"other weights")
    (source / ".git").mkdir()
    (source / ".git" / "HEAD").write_text("ref")
    run(source)
    out = tmp_path / "out"
    names = set(digests(out))
    assert {"tokenizer.json", "extra/note.txt", "config.json", "generation_config.json"} <= names
    assert not {"pytorch_model.bin", "consolidated.safetensors", ".git/HEAD"} & names
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert "lm_head.weight" not in weights(out)
    assert relative(logits(out), logits(source)) <= 1e-5


def test_links_of_a_hub_snapshot_are_followed(save, run, tmp_path):
    source = save()
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in source.iterdir():
        (snapshot / file.name).symlink_to(file)
    before = digests(source)
    run(snapshot)
    assert digests(source) == before
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("features", ["gate", "gate_up", "activations"])
def test_features_decide_the_order_and_never_the_model(save, run, tmp_path, features):
    source = save("phi3")
    given = tmp_path / "activations.safetensors"
    generator = torch.Generator().manual_seed(0)
    save_file(
        {f"layers.{i}": torch.randn(NEURONS, 50, generator=generator) for i in range(3)}, given
    )
    settings = ClusterSettings(8, features)
    results = run(source, settings, activations=given if features == "activations" else None)
    assert relative(logits(tmp_path / "out"), logits(source)) <= 1e-5
    rows = {
        "gate": weights(source)["model.layers.0.mlp.gate_up_proj.weight"][:NEURONS],
        "activations": load_file(given)["layers.0"],
    }
    if features in rows:
        expected = cluster(rows[features], 8)
        assert torch.equal(results[0].order, expected.order)
    else:
        halves = weights(source)["model.layers.0.mlp.gate_up_proj.weight"].chunk(2)
        both = torch.cat([torch.nn.functional.normalize(h, dim=1) for h in halves], dim=1)
        assert torch.equal(results[0].order, cluster(both, 8).order)


def count_calls(monkeypatch, stop_at=None):
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    real = cluster
    monkeypatch.setattr(cache, "cluster", counted)
    return calls


def left_behind(tmp_path):
    return [p.name for p in tmp_path.iterdir() if p.name not in ("model", "cache")]


def test_an_interrupted_run_leaves_nothing_and_the_next_one_continues(
    save, run, tmp_path, monkeypatch
):
    source = save()
    with monkeypatch.context() as patch:
        count_calls(patch, stop_at=3)
        with pytest.raises(KeyboardInterrupt):
            run(source)
    assert left_behind(tmp_path) == []
    calls = count_calls(monkeypatch)
    results = run(source)
    assert len(calls) == 1
    cold = cluster_checkpoint(
        source, tmp_path / "cold", SETTINGS, cache=tmp_path / "other", progress=False
    )
    assert len(calls) == 4
    assert all(torch.equal(results[i].order, cold[i].order) for i in range(3))
    assert digests(tmp_path / "out") == digests(tmp_path / "cold")


def test_the_cache_knows_weights_and_settings_apart(save, run, tmp_path, monkeypatch):
    source = save()
    run(source)
    calls = count_calls(monkeypatch)

    def again(settings=SETTINGS):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        before = len(calls)
        run(source, settings)
        return len(calls) - before

    assert again() == 0
    assert again(ClusterSettings(12)) == 3
    assert again(ClusterSettings(8, seed=1)) == 3
    assert again(ClusterSettings(8, "gate_up")) == 3
    shard = source / "model.safetensors"
    changed = load_file(shard)
    changed["model.layers.1.mlp.gate_proj.weight"][5, 5] += 1
    save_file(changed, shard)
    assert again() == 1


@pytest.mark.parametrize("damage", ["truncate", "wrong order", "no json", "pickle"])
def test_a_damaged_cache_is_not_trusted(save, run, tmp_path, monkeypatch, damage):
    source = save()
    run(source)
    shutil.rmtree(tmp_path / "out")
    files = sorted((tmp_path / "cache").glob("*.safetensors"))
    assert len(files) == 3
    if damage == "truncate":
        files[0].write_bytes(files[0].read_bytes()[:-8])
    elif damage == "wrong order":
        save_file({"order": torch.zeros(NEURONS, dtype=torch.int64)}, files[0])
    elif damage == "no json":
        files[0].with_suffix(".json").unlink()
    else:
        torch.save({"order": torch.arange(NEURONS)}, files[0])
    calls = count_calls(monkeypatch)
    run(source)
    assert len(calls) == 1


def test_an_ordinary_kill_while_writing_leaves_nothing(save, tmp_path):
    source = save()
    code = (
        "import signal, sys, time\n"
        # A test run in the background inherits that SIGINT is ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pacellm_vllm.experts import command, rewrite\n"
        "import argparse\n"
        "real = rewrite.permute\n"
        "def slow(*args):\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
        "rewrite.permute = slow\n"
        "parser = argparse.ArgumentParser()\n"
        "command.add_parser(parser.add_subparsers())\n"
        "args = parser.parse_args(sys.argv[1:])\n"
        "sys.exit(args.run(args, []))\n"
    )
    command = [sys.executable, "-c", code, "cluster", str(source), str(tmp_path / "out")]
    command += ["--experts", "8", "--cache", str(tmp_path / "cache"), "--quiet"]

    def start():
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "writing\n"
        return process

    for number in (signal.SIGTERM, signal.SIGINT):
        process = start()
        assert len(left_behind(tmp_path)) == 1
        process.send_signal(number)
        assert "interrupted" in process.communicate(timeout=30)[1]
        assert process.returncode == 130
        assert left_behind(tmp_path) == []
    # Not even the kernel's kill makes a half-written output, and the next run cleans up.
    process = start()
    process.kill()
    process.wait()
    assert [name.startswith(".out.partial-") for name in left_behind(tmp_path)] == [True]
    cluster_checkpoint(source, tmp_path / "out", SETTINGS, cache=tmp_path / "cache", progress=False)
    assert left_behind(tmp_path) == ["out"]


def test_a_run_that_is_writing_is_not_cleaned_up_by_another(tmp_path):
    with folders.whole_directory(tmp_path / "out") as first:
        with folders.whole_directory(tmp_path / "out") as second:
            assert first.exists()
            (second / "file").write_text("second")
        assert (tmp_path / "out" / "file").read_text() == "second"
        # The first to finish wins; the other one is told.
        with pytest.raises(ExpertsError, match="exists already"):
            folders.check_absent(tmp_path / "out")
        shutil.rmtree(tmp_path / "out")


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
def test_bad_input_is_one_sentence_and_nothing_is_written(save, run, tmp_path, what):
    damage, sentence = FAILURES[what]
    source = save()
    damage(source)
    with pytest.raises(ExpertsError, match=sentence) as raised:
        run(source)
    one_sentence(raised.value)
    assert left_behind(tmp_path) == []


def test_a_shard_or_tensor_that_only_the_index_knows_is_missing(save, run, tmp_path):
    source = save(shard_size="40KB")
    index = source / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    shard = listed["weight_map"][GATE]
    tensors = load_file(source / shard)
    save_file({name: t for name, t in tensors.items() if name != GATE}, source / shard)
    with pytest.raises(ExpertsError, match=f"{GATE} is missing from .*{shard}"):
        run(source)
    (source / shard).unlink()
    with pytest.raises(ExpertsError, match=f"{shard} is missing, truncated or damaged"):
        run(source)
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
def test_wrong_settings_are_refused(save, run, tmp_path, settings, kwargs, sentence):
    with pytest.raises(ExpertsError, match=sentence):
        run(save(), settings, **kwargs)
    assert left_behind(tmp_path) == []


def test_an_output_that_exists_is_refused_and_kept(save, run, tmp_path):
    source = save()
    (tmp_path / "out").mkdir()
    with pytest.raises(ExpertsError, match="exists already"):
        run(source)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("where", ["copy", "write", "cache", "orders"])
def test_a_full_disk_is_one_sentence_and_nothing_is_left(save, run, tmp_path, monkeypatch, where):
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
        run(source)
        shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(ExpertsError, match="No space left on device") as raised:
        run(source)
    monkeypatch.undo()
    one_sentence(raised.value)
    assert calls
    assert left_behind(tmp_path) == []
    run(source)


def test_a_disk_that_is_too_small_is_known_beforehand(save, run, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(rewrite.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ExpertsError, match=r"its disk has 0\.0 GB free"):
        run(save())
    assert left_behind(tmp_path) == []


def test_memory_holds_a_layer_and_not_the_model(tmp_path):
    """Clustering 48 layers needs hardly more than clustering one of them."""
    path = tmp_path / "big"
    model = tiny_model("llama", hidden_size=256, num_hidden_layers=1, intermediate_size=2048)
    layer = {n: t for n, t in model.state_dict().items() if ".layers.0." in n}
    rest = {n: t for n, t in model.state_dict().items() if ".layers.0." not in n}
    for i in range(48):
        renamed = {n.replace(".layers.0.", f".layers.{i}."): t + i for n, t in layer.items()}
        rest |= {n: t.clone() for n, t in renamed.items()}
    model.config.num_hidden_layers = 48
    model.config.save_pretrained(path)
    save_file(rest, path / "model.safetensors")
    size = (path / "model.safetensors").stat().st_size
    assert size > 300e6
    code = (
        "import resource, sys, torch\n"
        "from pacellm_vllm.experts.rewrite import *\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "def run(source, target, layers):\n"
        "    cluster_checkpoint(source, target, ClusterSettings(8), layers=layers,\n"
        "                       cache=target + '.cache', progress=False)\n"
        "run(sys.argv[1], sys.argv[2] + '1', [0])\n"
        "before = peak()\n"
        "run(sys.argv[1], sys.argv[2] + '2', None)\n"
        "print(peak() - before)\n"
    )
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 0.1 * size, time.monotonic() - started
    assert Path(tmp_path / "out2" / EXPERTS_JSON).is_file()
