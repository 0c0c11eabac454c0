"""A clustered checkpoint is the same model, whatever its family, dtype and files."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from clustered import SETTINGS, digests, logits, relative, weights
from ffn_models import NEURONS, tiny_model
from safetensors.torch import load_file, save_file

from pacellm_vllm.experts.checkpoint import open_checkpoint
from pacellm_vllm.experts.cluster import cluster
from pacellm_vllm.experts.orders import EXPERTS_JSON, EXPERTS_ORDERS
from pacellm_vllm.experts.rewrite import cluster_checkpoint, write_permuted
from pacellm_vllm.experts.settings import ClusterSettings

ARCHITECTURES = [
    "qwen2",
    "qwen3",
    "llama",
    "mistral",
    "gemma",
    "gemma2",
    "gemma3_text",
    "granite",
    "phi3",
    "cohere",
    "exaone4",
    "glm4",
    "hyperclovax",
    "ministral3",
    "nemotron",
    "stablelm",
    "starcoder2",
    "gpt2",
    "opt",
    "phi",
    "gpt_neox",
]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_clustered_model_computes_what_the_original_does(save, run_cluster, tmp_path, arch):
    source = save(arch)
    results = run_cluster(source)
    before, after = weights(source), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(results) == 3
    assert all(any(f".{layer}." in name for name in changed) for layer in range(3))
    # Not vacuous: without its biases and rows in step the model is another one.
    assert relative(logits(tmp_path / "out"), logits(source)) <= 1e-5


def test_tensors_that_move_are_the_ffns_and_no_others(save, run_cluster, tmp_path):
    source = save("llama")
    results = run_cluster(source)
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


def test_only_the_chosen_layers_move(save, run_cluster, tmp_path):
    source = save()
    assert list(run_cluster(source, layers=[2, 1])) == [1, 2]
    before, after = weights(source), weights(tmp_path / "out")
    moved = {n.split(".")[2] for n in before if not torch.equal(before[n], after[n])}
    assert moved == {"1", "2"}
    assert "layers.0.order" not in load_file(tmp_path / "out" / EXPERTS_ORDERS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arch", ["qwen2", "phi3", "starcoder2", "gpt2"])
def test_the_inverse_order_restores_every_byte(save, run_cluster, tmp_path, arch, dtype):
    source = save(arch, shard_size="40KB", dtype=dtype)
    assert len(list(source.glob("*.safetensors"))) > 1
    results = run_cluster(source)
    assert digests(source) != digests(tmp_path / "out")
    orders = load_file(tmp_path / "out" / EXPERTS_ORDERS)
    inverse = {layer: orders[f"layers.{layer}.order"].argsort() for layer in range(len(results))}
    write_permuted(open_checkpoint(tmp_path / "out"), tmp_path / "back", inverse, progress=False)
    assert digests(tmp_path / "back") == digests(source)


def test_a_layer_may_lie_in_several_shards(save, run_cluster, tmp_path):
    source = save(shard_size="20KB")
    shards = open_checkpoint(source).entries
    of_layer = {shards[n].shard for n in shards if n.startswith("model.layers.1.mlp")}
    assert len(of_layer) > 1
    run_cluster(source)
    assert relative(logits(tmp_path / "out"), logits(source)) <= 1e-5
    one = tmp_path / "one"
    tiny_model("qwen2").save_pretrained(one)
    whole = cluster_checkpoint(
        one, tmp_path / "whole", SETTINGS, cache=tmp_path / "c2", progress=False
    )
    orders = load_file(tmp_path / "out" / EXPERTS_ORDERS)
    assert all(torch.equal(whole[i].order, orders[f"layers.{i}.order"]) for i in range(3))


def test_orders_and_what_made_them_are_beside_the_weights(save, run_cluster, tmp_path):
    results = run_cluster(save())
    about = json.loads((tmp_path / "out" / EXPERTS_JSON).read_text())
    assert (about["num_experts"], about["features"], about["seed"]) == (8, "gate", 0)
    assert about["layers"]["2"]["expert_size"] == NEURONS // 8
    assert about["layers"]["2"]["inertia"] == results[2].inertia < results[2].random_inertia
    orders = load_file(tmp_path / "out" / EXPERTS_ORDERS)
    assert {n: o.sort().values.tolist() for n, o in orders.items()} == {
        f"layers.{layer}.order": list(range(NEURONS)) for layer in range(3)
    }


def test_tied_embeddings_and_other_files_come_along(save, run_cluster, tmp_path):
    source = save(tie_word_embeddings=True)
    (source / "tokenizer.json").write_text('{"a": 1}')
    (source / "extra").mkdir()
    (source / "extra" / "note.txt").write_text("note")
    (source / "pytorch_model.bin").write_bytes(b"other weights")
    (source / "consolidated.safetensors").write_bytes(b"other weights")
    (source / ".git").mkdir()
    (source / ".git" / "HEAD").write_text("ref")
    run_cluster(source)
    out = tmp_path / "out"
    names = set(digests(out))
    assert {"tokenizer.json", "extra/note.txt", "config.json", "generation_config.json"} <= names
    assert not {"pytorch_model.bin", "consolidated.safetensors", ".git/HEAD"} & names
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert "lm_head.weight" not in weights(out)
    assert relative(logits(out), logits(source)) <= 1e-5


def test_links_of_a_hub_snapshot_are_followed(save, run_cluster, tmp_path):
    source = save()
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in source.iterdir():
        (snapshot / file.name).symlink_to(file)
    before = digests(source)
    run_cluster(snapshot)
    assert digests(source) == before
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("features", ["gate", "gate_up", "activations"])
def test_features_decide_the_order_and_never_the_model(save, run_cluster, tmp_path, features):
    source = save("phi3")
    given = tmp_path / "activations.safetensors"
    generator = torch.Generator().manual_seed(0)
    save_file(
        {f"layers.{i}": torch.randn(NEURONS, 50, generator=generator) for i in range(3)}, given
    )
    settings = ClusterSettings(8, features)
    results = run_cluster(
        source, settings, activations=given if features == "activations" else None
    )
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


def test_memory_holds_a_layer_and_not_the_model_nor_a_shard(tmp_path):
    """Clustering 48 layers in four shards needs hardly more than clustering one of them."""
    path = tmp_path / "big"
    model = tiny_model("llama", hidden_size=256, num_hidden_layers=1, intermediate_size=2048)
    layer = {n: t for n, t in model.state_dict().items() if ".layers.0." in n}
    rest = {n: t for n, t in model.state_dict().items() if ".layers.0." not in n}
    model.config.num_hidden_layers = 48
    model.config.save_pretrained(path)
    size, listed = 0, {}
    for shard in range(4):
        tensors = rest if shard == 3 else {}
        for i in range(shard * 12, shard * 12 + 12):
            tensors |= {n.replace(".layers.0.", f".layers.{i}."): t + i for n, t in layer.items()}
        name = f"model-{shard + 1:05}-of-00004.safetensors"
        save_file(tensors, path / name)
        size += (path / name).stat().st_size
        listed |= dict.fromkeys(tensors, name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
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
