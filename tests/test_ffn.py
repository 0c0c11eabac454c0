"""FFNs found by their parts, and memory inside their activations; no engine."""

import contextlib

import pytest
import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.activation import get_act_and_mul_fn
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.fusion import fused_act_quant
from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear

from pacellm_vllm.config import PaceConfig, PaceConfigError
from pacellm_vllm.models.ffn import check_shared_out, remember
from pacellm_vllm.models.ffn import find_feed_forward as find
from pacellm_vllm.models.layers import DecoderLayers
from pacellm_vllm.models.site import choose_site
from pacellm_vllm.models.whole import WholeFfn, check_reduced, find_whole, remember_output


class Decoder(nn.Module):
    """Layers whose FFN hangs at ``place``, or is the layer itself."""

    def __init__(self, *layers, place="mlp"):
        super().__init__()
        self.layers = nn.ModuleList()
        for parts in layers:
            layer = nn.Module()
            ffn = nn.Module() if place else layer
            for name, part in parts.items():
                ffn.add_module(name, part)
            if place:
                layer.add_module(place, ffn)
            layer.add_module("norm", nn.LayerNorm(8))
            layer.add_module("self_attn", nn.ModuleDict({"attn": Attention()}))
            self.layers.append(layer)


class Attention(nn.Module, AttentionLayerBase):
    """Has a KV cache by type."""

    get_attn_backend = get_kv_cache_spec = None


def find_feed_forward(model, index, prefix=""):
    return find(DecoderLayers(model, len(model.layers), prefix)[index])


class Memory(nn.Module):
    """Stands in for a memory: what passes through it doubles."""

    width, prefix = 8, "ffn.memory"

    def forward(self, a):
        return 2 * a


@pytest.fixture(autouse=True)
def configured():
    with set_current_vllm_config(VllmConfig()):
        yield


class Linear(LinearBase):
    """A projection of vLLM's by type and sizes, without weights or ranks."""

    def __init__(self, inputs, outputs):
        nn.Module.__init__(self)
        self.input_size, self.output_size = inputs, outputs


def gated(act=None):
    return {
        "gate_up_proj": Linear(8, 32),
        "act_fn": act or get_act_and_mul_fn("silu"),
        "down_proj": Linear(16, 8),
    }


def plain():
    return {"fc1": Linear(8, 16), "activation_fn": nn.ReLU(), "fc2": Linear(16, 8)}


def test_what_fits_is_found_wherever_it_hangs():
    ffn = find_feed_forward(Decoder(gated(), gated(), place="feed_forward"), 1, "model")
    assert (ffn.name, ffn.width, ffn.gated) == ("model.layers.1.feed_forward", 16, True)
    ffn = find_feed_forward(Decoder(plain(), place=None), 0)
    assert (ffn.name, ffn.width, ffn.gated) == ("layers.0", 16, False)
    ffn = find_feed_forward(Decoder({**plain(), "dropout": nn.Dropout()}), 0)
    assert ffn.output is ffn.module.fc2


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        (
            {**plain(), "gate_proj": Linear(8, 16), "norm": nn.LayerNorm(16)},
            "layer 0 has no FFN that fits (mlp of activation_fn, fc1, fc2, gate_proj, norm)",
        ),
        (
            {"gate_proj": 16, "up_proj": 16, "act_fn": nn.SiLU(), "down_proj": 8},
            "layer 0 has no FFN that fits (mlp of act_fn, down_proj, gate_proj, up_proj)",
        ),
        ({}, "layer 0 has no FFN that fits (none)"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_it_is(parts, sentence):
    parts = {n: Linear(24 - p, p) if isinstance(p, int) else p for n, p in parts.items()}
    with pytest.raises(PaceConfigError) as refusal:
        find_feed_forward(Decoder(parts), 0)
    assert sentence in str(refusal.value)


def test_a_gate_outside_of_the_activation_is_refused():
    """As in GLM's code in transformers: the names are right, the activation sees the gate only."""
    with pytest.raises(PaceConfigError, match="multiplies gate and up outside of its activation"):
        find_feed_forward(Decoder(gated(nn.SiLU())), 0)


def test_two_ffns_in_a_layer_are_refused():
    model = Decoder(gated())
    model.layers[0].other = Decoder(gated()).layers[0].mlp
    assert model.layers[0].other is not model.layers[0].mlp
    with pytest.raises(PaceConfigError, match="layer 0 has 2 FFNs"):
        find_feed_forward(model, 0)


def test_an_ffn_that_every_rank_holds_whole_is_refused():
    ffn = find_feed_forward(Decoder(plain()), 0)
    check_shared_out(ffn, 1)
    with pytest.raises(PaceConfigError, match="not shared out among tensor parallel ranks"):
        check_shared_out(ffn, 2)


def test_memory_in_one_layer_leaves_the_others_activation_alone():
    """vLLM's registry hands the same module to every layer."""
    model = Decoder(gated(), gated())
    mine, other = (find_feed_forward(model, index) for index in (0, 1))
    shared = other.activation
    assert mine.activation is shared
    x = torch.randn(3, 32)
    expected = shared(x)
    remember(mine, Memory())
    torch.testing.assert_close(mine.activation(x), 2 * expected)
    torch.testing.assert_close(other.activation(x), expected)
    assert list(shared.children()) == []


def test_parameters_of_an_activation_keep_their_names():
    ffn = find_feed_forward(Decoder({**plain(), "activation_fn": nn.PReLU()}), 0)
    (before,) = ffn.activation.named_parameters()
    remember(ffn, Memory())
    (after,) = ffn.activation.named_parameters()
    assert after == before


def test_no_fused_kernel_takes_the_place_of_an_activation_with_memory(monkeypatch):
    act = get_act_and_mul_fn("silu")
    monkeypatch.setattr(fused_act_quant, "get_input_quant_key", lambda linear: "key")
    fused = {(type(act), "key"): lambda x, linear: "fused"}
    monkeypatch.setattr(fused_act_quant, "_FUSED_ACT_QUANT", fused)
    x = torch.randn(3, 32)
    assert fused_act_quant.maybe_fused_act_quant(act, x, None) == "fused"
    ffn = find_feed_forward(Decoder(gated()), 0)
    remember(ffn, Memory())
    got = fused_act_quant.maybe_fused_act_quant(ffn.activation, x, None)
    torch.testing.assert_close(got, 2 * act(x))


class Experts(nn.Module):
    """Some routed FFN: a router, matrices, and what a caller may get of them."""

    def __init__(self, returned=None):
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.w13 = nn.Parameter(torch.zeros(4, 32, 8))
        self.returned = returned

    def forward(self, x):
        return x if self.returned is None else self.returned


def layers_of(*ffns):
    model = Decoder(*({} for _ in ffns))
    for layer, ffn in zip(model.layers, ffns, strict=True):
        layer.mlp = ffn
    return DecoderLayers(model, len(ffns), "model")


def test_an_ffn_is_found_by_its_matrices_beside_attention():
    layers = layers_of(Experts(), nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)))
    assert [find_whole(layers[i]).name for i in (0, 1)] == [
        "model.layers.0.mlp",
        "model.layers.1.mlp",
    ]
    with pytest.raises(PaceConfigError, match="no FFN that fits"):
        find(layers[0])


def test_several_ffns_in_a_layer_are_refused():
    layers = layers_of(Experts())
    layers[0].module.shared = nn.Linear(8, 8)
    with pytest.raises(PaceConfigError, match=r"layer 0 has 2 parts .* \(mlp, shared\)"):
        find_whole(layers[0])


def test_memory_of_a_sum_of_two_parts_is_of_the_sum():
    """As Granite's layers do: ``block_sparse_moe(x) + shared_mlp(x)``."""
    layers = layers_of(Experts())
    layer = layers[0].module
    del layer.mlp
    layer.block_sparse_moe, layer.shared_mlp = Experts(), Experts()
    whole = find_whole(layers[0])
    remember_output(whole, Memory())
    x = torch.randn(3, 8)
    torch.testing.assert_close(layer.block_sparse_moe(x) + layer.shared_mlp(x), 4 * x)
    assert [name for name, _ in layer.named_parameters()].count("shared_mlp.w13") == 1


def test_an_encoder_of_as_many_layers_is_not_the_decoder():
    model = nn.Module()
    model.vision, model.text = Decoder(gated(), gated()), Decoder(gated(), gated())
    for layer in model.vision.layers:
        layer.self_attn = nn.Linear(8, 8)
    assert DecoderLayers(model, 2)[1].name == "text.layers.1"
    model.other = Decoder(gated(), gated())
    with pytest.raises(PaceConfigError, match="has 2 lists of 2 decoder layers"):
        DecoderLayers(model, 2)


def test_memory_of_outputs_leaves_the_rest_of_what_is_returned_alone():
    x = torch.randn(3, 8)
    for returned, expected in ((None, 2 * x), ((x, None), (2 * x, None))):
        whole = find_whole(layers_of(Experts(returned))[0])
        remember_output(whole, Memory())
        got = whole.module(x)
        torch.testing.assert_close(got, expected)
        assert isinstance(whole.module, Experts)


@pytest.mark.parametrize("returned", [(torch.zeros(3, 8), torch.zeros(8)), torch.zeros(3, 9), {}])
def test_ffns_that_return_something_else_are_refused(returned):
    whole = find_whole(layers_of(Experts(returned))[0])
    remember_output(whole, Memory())
    with pytest.raises(RuntimeError, match="ffn returns something else than one state of width 8"):
        whole.module(torch.zeros(3, 8))


class Projection(RowParallelLinear):
    """The last of a dense FFN, without weights or ranks."""

    def __init__(self, reduce_results):
        nn.Module.__init__(self)
        self.reduce_results = reduce_results


@pytest.mark.parametrize(
    ("ranks", "reduced", "beside", "refused"),
    [
        (2, False, nn.ReLU(), True),
        (1, False, nn.ReLU(), False),
        (2, True, nn.ReLU(), False),
        (2, False, Experts(), False),
    ],
    ids=["parts", "one rank", "sums", "what else may add up"],
)
def test_a_dense_ffn_whose_ranks_return_parts_is_refused(ranks, reduced, beside, refused):
    parts = {"up": Linear(8, 16), "beside": beside, "down": Projection(reduced)}
    module = nn.ModuleDict(parts)
    expected = (
        pytest.raises(PaceConfigError, match=r"layers\.1\.mlp returns on each tensor parallel rank")
        if refused
        else contextlib.nullcontext()
    )
    with expected:
        check_reduced(WholeFfn("layers.1.mlp", module), ranks)


@pytest.mark.parametrize(("widths", "site"), [((16, 16), "activation"), ((16, 32), "output")])
def test_activations_of_several_widths_leave_the_outputs(widths, site, monkeypatch):
    """As in Gemma 4, whose layers that share KV caches may have wider FFNs."""
    monkeypatch.setattr("pacellm_vllm.models.site.over_stages", lambda mine: [mine])
    parts = [
        {"fc1": Linear(8, width), "activation_fn": nn.ReLU(), "fc2": Linear(width, 8)}
        for width in widths
    ]
    model = Decoder(*parts)
    ffns = [find_feed_forward(model, index) for index in (0, 1)]
    auto, activation = (PaceConfig.from_sources({"site": s}) for s in ("auto", "activation"))
    assert choose_site(auto, ffns) == site
    if site == "output":
        with pytest.raises(PaceConfigError, match=r"FFNs of widths \[16, 32\]"):
            choose_site(activation, ffns)


@pytest.mark.parametrize(
    ("theirs", "site"),
    [((False, {16}), "activation"), ((True, set()), "output"), ((False, {32}), "output")],
    ids=["activations", "none", "of another width"],
)
def test_a_stage_takes_what_every_stage_has(theirs, site, monkeypatch):
    monkeypatch.setattr("pacellm_vllm.models.site.over_stages", lambda mine: [mine, theirs])
    ffn = find_feed_forward(Decoder(plain()), 0)
    assert choose_site(PaceConfig.from_sources({"site": "auto"}), [ffn]) == site
