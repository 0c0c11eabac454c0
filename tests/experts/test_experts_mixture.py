"""``pacellm inspect experts`` on mixtures: their own experts, against routers' logits."""

import json
import math
from pathlib import Path

import pytest
import torch
from checkpoints import MIXTURES, make_checkpoint
from hf import load_model, plain_classes
from pictures import FAMILIES, make_tokenizer
from transformers import AutoConfig

from pacellm_vllm import cli
from pacellm_vllm.experts.mixture import measure_routing

LICENSE = Path(__file__).parent.parent.parent / "LICENSE"
TOKENS = 700


def test_numbers_are_those_of_the_definitions():
    # Experts 0 and 1 always together, 2 and 3 with anyone, 4 never.
    chosen = torch.tensor([[0, 1]] * 20 + [[2, 3]] * 10 + [[2, 0]] * 10)
    weights = torch.tensor([[0.75, 0.25]] * 40)
    tokens = torch.tensor([7] * 20 + [8] * 10 + [9] * 10)
    found = measure_routing(chosen, weights, 5, tokens, {7: "a", 8: "b", 9: "c"})
    assert found.per_token == 2
    assert found.shares == pytest.approx((0.75, 0.5, 0.5, 0.25, 0))
    spread = [0.375, 0.25, 0.25, 0.125]
    assert found.used == pytest.approx(math.exp(-sum(p * math.log(p) for p in spread)))
    together = {(a, b): value for a, b, value in found.together}
    assert together == {
        (0, 1): pytest.approx(0.5 / (0.75 * 0.5)),
        (0, 2): pytest.approx(0.25 / (0.75 * 0.5)),
        (2, 3): pytest.approx(0.25 / (0.5 * 0.25)),
    }
    # Of token b expert 2 has three quarters, where five experts would have a fifth each.
    assert found.answers[2][0] in (("b", pytest.approx(3.75)), ("c", pytest.approx(3.75)))
    assert found.answers[1] == [("a", pytest.approx(1.25))]
    assert found.answers[4] == []


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """``mixture(arch)``: a checkpoint with a tokenizer of bytes."""

    def make(arch):
        folder = make_checkpoint(tmp_path_factory.mktemp(arch), arch)
        make_tokenizer(FAMILIES["idefics3"]).save_pretrained(folder)
        return folder

    return make


def inspect(folder, *words):
    with plain_classes(AutoConfig.from_pretrained(folder)):
        return cli.main(["inspect", "experts", *map(str, (folder, *words)), "--quiet"])


@pytest.mark.parametrize("arch", [arch for arch in MIXTURES if arch != "llama4_text"])
def test_routing_is_the_routers(arch, mixture, tmp_path, capsys):
    folder = mixture(arch)
    words = ["--text", LICENSE, "--tokens", TOKENS, "--out", tmp_path / "out"]
    assert inspect(folder, *words) == 0
    assert "its own" in capsys.readouterr().out
    assert (tmp_path / "out" / "experts.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    found = json.loads((tmp_path / "out" / "experts.json").read_text())["layers"]
    tokens = make_tokenizer(FAMILIES["idefics3"])(LICENSE.read_text()).input_ids[:TOKENS]
    model = load_model(folder)
    seen = {}
    routers = {
        int(name.split(".layers.")[1].split(".")[0]): module
        for name, module in model.named_modules()
        if type(module).__name__.lower().endswith(("topkrouter", "gate"))
    }
    assert {*found} == {*map(str, routers)}
    for layer, module in routers.items():
        seen[layer] = []
        module.register_forward_hook(
            lambda module, given, returned, layer=layer: seen[layer].append(returned)
        )
    with torch.no_grad():
        for begin in range(0, TOKENS, 512):
            model(torch.tensor([tokens[begin : begin + 512]][:1])[:, : TOKENS - begin])
    for layer, returned in seen.items():
        number = len(found[str(layer)]["shares"])
        chosen = torch.cat(
            [next(x for x in parts if not x.is_floating_point()) for parts in returned]
        )
        counts = torch.bincount(chosen.flatten(), minlength=number) / TOKENS
        assert found[str(layer)]["shares"] == pytest.approx(counts.tolist())


def test_what_cannot_be_seen_is_one_line(mixture, tmp_path, capsys):
    words = ["--text", LICENSE, "--tokens", 99, "--out", tmp_path / "out"]
    for arch, more, sentence in (
        ("llama4_text", [], "does not hand its routing to its experts"),
        ("mixtral", ["--experts", 8], "has experts of its own"),
    ):
        assert inspect(mixture(arch), *words, *more) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("pacellm: ")
        assert sentence in said
    assert not (tmp_path / "out").exists()
