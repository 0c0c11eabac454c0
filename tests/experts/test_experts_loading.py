"""Reordering a stream of weights: any order of arrival, biases, fused gates, what is refused."""

import json

import pytest
import torch
from ffn_models import NEURONS, tiny_model
from safetensors.torch import load_file, save_file

from pacellm_vllm.experts.errors import ExpertsError
from pacellm_vllm.experts.loading import ExpertsPlan, Reorder
from pacellm_vllm.experts.orders import EXPERTS_JSON, EXPERTS_ORDERS
from pacellm_vllm.experts.rewrite import cluster_checkpoint
from pacellm_vllm.experts.settings import ClusterSettings, ExpertsConfig, check_ranks
from pacellm_vllm.models.table import experts_architecture

LAYERS = 3


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def plan(**settings):
    return ExpertsPlan.of(ExpertsConfig.from_settings(settings), LAYERS, NEURONS)


def state(arch):
    weights = {n: t.clone() for n, t in tiny_model(arch).state_dict().items()}
    if arch == "phi3":  # It has none, but an FFN with one tensor for gate and up may.
        weights["model.layers.1.mlp.gate_up_proj.bias"] = torch.randn(2 * NEURONS)
    return weights


def shuffled(weights, seed):
    names = sorted(weights)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    return [(names[i], weights[names[i]]) for i in order]


def rows(name):
    """How a tensor of these models follows its layer's neurons: axis and blocks, or None."""
    _, _, part = name.partition(".mlp.")
    if not part or part == "down_proj.bias":
        return None
    return {"down_proj.weight": (1, 1)}.get(part, (0, 2 if "gate_up" in part else 1))


@pytest.mark.parametrize("arch", ["llama", "phi3", "nemotron"])
@pytest.mark.parametrize("seed", range(4))
def test_tensors_may_come_in_any_order(arch, seed):
    weights = state(arch)
    seen = {}
    gated = arch != "nemotron"
    pass_ = Reorder(plan(num_experts=8), lambda i, gate, up: seen.update({i: (gate, up)}), gated)
    found = dict(pass_(iter(shuffled(weights, seed))))
    assert set(found) == set(weights)
    assert sorted(pass_.orders) == sorted(seen) == [0, 1, 2]
    for name, tensor in weights.items():
        follows = rows(name)
        if follows is None:
            assert torch.equal(found[name], tensor)
            continue
        axis, blocks = follows
        order = pass_.orders[int(name.split(".")[2])]
        assert not torch.equal(order, torch.arange(NEURONS))
        parts = [part.index_select(axis, order) for part in tensor.chunk(blocks, axis)]
        assert torch.equal(found[name], torch.cat(parts, axis))
    if arch == "llama":
        assert any(name.endswith("up_proj.bias") for name in weights)
        for part, gate in zip(("gate", "up"), seen[1], strict=True):
            assert torch.equal(gate, found[f"model.layers.1.mlp.{part}_proj.weight"])
    if not gated:
        assert any(name.endswith("up_proj.bias") for name in weights)
        assert torch.equal(seen[1][0], found["model.layers.1.mlp.up_proj.weight"])
        assert seen[1][1] is None


def test_a_loader_may_reuse_its_buffer():
    weights = state("llama")

    def loader():
        for name, tensor in shuffled(weights, 1):
            buffer = tensor.clone()
            yield name, buffer
            buffer.fill_(torch.nan)

    for name, tensor in Reorder(plan(num_experts=8))(loader()):
        assert tensor.isfinite().all(), name


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), "the FFN of layer 1 cannot be"),
        (
            lambda w: w.update(
                {"model.layers.1.mlp.up_proj.weight": torch.zeros(NEURONS, 32, dtype=torch.int8)}
            ),
            "quantised checkpoints cannot be clustered",
        ),
        (
            lambda w: w.update({"model.layers.1.mlp.up_proj.weight_scale": torch.zeros(NEURONS)}),
            "is part of an FFN, but not one of the tensors known there",
        ),
    ],
)
def test_a_layer_that_cannot_be_reordered_is_refused(change, sentence):
    weights = state("llama")
    change(weights)
    with pytest.raises(ExpertsError, match=sentence):
        list(Reorder(plan(num_experts=8))(weights.items()))


@pytest.mark.parametrize("part", ["gate_proj.weight", "up_proj.weight", "down_proj.weight"])
def test_a_tensor_that_comes_again_is_refused(part):
    """Its layer has passed already, in the order of what came first."""
    weights = state("llama")
    name = f"model.layers.1.mlp.{part}"
    with pytest.raises(ExpertsError, match=f"{name} comes twice"):
        list(Reorder(plan(num_experts=8))([*weights.items(), (name, weights[name])]))


def test_a_copy_passes_where_nothing_moves(stored):
    weights = load_file(stored / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    found = list(Reorder(plan(path=str(stored)))([*weights.items(), (name, weights[name])]))
    assert len(found) == len(weights) + 1
    assert all(torch.equal(tensor, weights[name]) for name, tensor in found)


def test_a_bias_that_comes_again_is_put_in_order():
    weights = state("llama")
    name = "model.layers.1.mlp.up_proj.bias"
    reorder = Reorder(plan(num_experts=8))
    found = list(reorder([*weights.items(), (name, weights[name] + 1)]))
    assert found[-1][0] == name
    assert torch.equal(found[-1][1], (weights[name] + 1)[reorder.orders[1]])


@pytest.fixture
def stored(tmp_path):
    """A clustered checkpoint whose description and orders a test may change."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    cluster_checkpoint(tmp_path / "model", tmp_path / "out", ClusterSettings(8), progress=False)
    return tmp_path / "out"


def about_layer(**changes):
    def edit(about):
        about["layers"]["1"] |= changes
        return about

    return edit


@pytest.mark.parametrize(
    "damage",
    [
        lambda about: [about],
        lambda about: None,
        lambda about: {**about, "layers": None},
        lambda about: {**about, "layers": []},
        lambda about: {**about, "layers": {}},
        lambda about: {**about, "layers": {"x": {}}},
        lambda about: {**about, "layers": {**about["layers"], "-1": about["layers"]["1"]}},
        lambda about: {**about, "layers": {"1": None}},
        lambda about: {**about, "num_experts": None},
        lambda about: {**about, "num_experts": float("inf")},
        lambda about: {**about, "num_experts": "many"},
        lambda about: {**about, "num_experts": 0},
        about_layer(neurons="many"),
        about_layer(neurons=[NEURONS]),
        about_layer(neurons=None),
        about_layer(source_gate=3),
        about_layer(clustered_gate=None),
    ],
)
def test_a_damaged_description_is_one_sentence(stored, damage):
    path = stored / EXPERTS_JSON
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(ExpertsError, match=EXPERTS_JSON) as raised:
        plan(path=str(stored))
    assert str(raised.value).startswith("pacellm: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "order",
    [
        torch.arange(NEURONS).float(),
        torch.arange(NEURONS).reshape(2, -1),
        torch.arange(NEURONS) - 1,
        torch.tensor(0),
    ],
)
def test_orders_that_are_none_are_one_sentence(stored, order):
    save_file({f"layers.{i}.order": order.clone() for i in range(LAYERS)}, stored / EXPERTS_ORDERS)
    with pytest.raises(ExpertsError, match="no permutation of 96 neurons"):
        list(Reorder(plan(path=str(stored)))(state("llama").items()))


def test_a_gate_that_is_not_there_is_missed():
    """An FFN with a gate is not taken for one without because its gate comes last, or never."""
    weights = state("llama")
    weights.pop("model.layers.1.mlp.gate_proj.weight")
    with pytest.raises(ExpertsError, match="a gate, an up and a down projection are needed"):
        list(Reorder(plan(num_experts=8))(weights.items()))


def test_only_some_layers():
    weights = state("llama")
    found = dict(Reorder(plan(num_experts=8, layers=[1]))(weights.items()))
    changed = {int(n.split(".")[2]) for n in weights if not torch.equal(weights[n], found[n])}
    assert changed == {1}


def test_weights_that_are_loaded_again_keep_their_order():
    """A bank of before knows neurons by their place."""
    weights, trained = state("llama"), state("llama")
    for name, tensor in trained.items():
        if "gate" in name:
            tensor.copy_(tensor.flip(0))
    orders = {}
    list(Reorder(plan(num_experts=8), orders=orders)(weights.items()))
    first = {layer: order.clone() for layer, order in orders.items()}
    found = dict(Reorder(plan(num_experts=8), orders=orders)(trained.items()))
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.mlp.gate_proj.weight"
        assert torch.equal(found[name], trained[name][first[layer]])


@pytest.mark.parametrize(
    ("named", "ours", "served"),
    [
        ("LlamaForCausalLM", None, {"experts": {"path": "."}}),
        ("PaceLlamaForCausalLM", None, {"layers": "auto", "experts": {"path": "."}}),
        (
            "PaceLlamaForCausalLM",
            {"layers": [1], "experts": {"num_experts": 4, "top_k": 3}},
            {"layers": [1], "experts": {"path": ".", "top_k": 3}},
        ),
        ("OtherForCausalLM", None, None),
        ("OPTForCausalLM", None, None),
    ],
)
def test_the_result_names_its_experts(named, ours, served, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    before = json.loads(path.read_text()) | {"architectures": [named]}
    before |= {} if ours is None else {"pacellm": ours}
    path.write_text(json.dumps(before))
    cluster_checkpoint(
        tmp_path / "model", tmp_path / "out", ClusterSettings(8), rename=experts_architecture,
        progress=False,
    )  # fmt: skip
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    if served is None:
        assert after == before
    else:
        assert after == before | {"architectures": ["PaceLlamaForCausalLM"], "pacellm": served}


def test_ranks_that_cannot_hold_whole_experts_are_refused():
    check_ranks(64, 4)
    with pytest.raises(ExpertsError, match=r"over 3 tensor .* --tensor-parallel-size 1, 2, 4 or 8"):
        check_ranks(64, 3)
