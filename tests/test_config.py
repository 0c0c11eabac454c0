"""PaceConfig: presets, precedence, and one sentence for everything that is wrong."""

import pytest

from pacellm_vllm.config import PaceConfig, PaceConfigError
from pacellm_vllm.ops.rules import UpdateRule


def test_presets_fill_what_is_not_said():
    gentle = PaceConfig.from_sources({})
    assert gentle == PaceConfig.from_sources({"preset": "gentle"})
    assert (gentle.theta_high, gentle.theta_low) == (0.75, 0.25)
    assert (gentle.alpha, gentle.noise, gentle.clip) == (0.02, 0, True)
    official = PaceConfig.from_sources({"preset": "official"})
    assert (official.noise, official.clip) == (0.1, False)
    assert (official.theta_high, official.theta_low, official.alpha) == (0.75, 0.25, 0.2)
    paper = PaceConfig.from_sources({"preset": "paper", "alpha": 0.5})
    assert (paper.theta_high, paper.theta_low, paper.alpha) == (0.7, 0.3, 0.5)
    for config in (gentle, official):
        assert config.rules().mid_self_weight == 0
        assert config.rules().update is UpdateRule.OFFICIAL
    assert paper.rules().mid_self_weight == 0.5
    assert paper.rules().update is UpdateRule.PAPER


def test_later_sources_win_field_by_field():
    checkpoint = {"layers": [1], "bank_size": 7, "preset": "paper"}
    config = PaceConfig.from_sources(checkpoint, None, {"layers": [2, 0]})
    assert config.resolve_layers(4) == (0, 2)
    assert (config.bank_size, config.preset) == (7, "paper")


def test_beside_experts_there_is_no_memory_without_layers():
    alone = PaceConfig.from_sources({"experts": {"num_experts": 8}})
    assert alone.resolve_layers(4) == ()
    for layers, resolved in (("auto", (1, 3)), ([2], (2,)), ([], ())):
        both = PaceConfig.from_sources({"experts": {"num_experts": 8}, "layers": layers})
        assert both.resolve_layers(4) == resolved


def test_where_experts_come_from_and_routing_are_replaced_as_a_whole():
    stored = {"experts": {"path": ".", "top_k": 4}}

    def merged(later):
        return PaceConfig.from_sources(stored, {"experts": later}).experts.model_dump(
            exclude_defaults=True
        )

    assert merged({"top_k": 2}) == {"path": ".", "top_k": 2}
    assert merged({"mass": 0.9}) == {"path": ".", "mass": 0.9}
    assert merged({"num_experts": 8, "seed": 1}) == {"num_experts": 8, "seed": 1, "top_k": 4}
    assert PaceConfig.from_sources(stored, {"experts": None}).experts is None


@pytest.mark.parametrize(
    ("num_layers", "layers"),
    [(28, (12, 26)), (32, (14, 30)), (36, (16, 34)), (4, (1, 3)), (2, (0, 1)), (1, (0,))],
)
def test_auto_layers_are_the_papers_relative_depths(num_layers, layers):
    assert PaceConfig.from_sources({}).resolve_layers(num_layers) == layers


def test_max_insertions_defaults_to_sixteen_or_the_bank():
    assert PaceConfig.from_sources({}).max_insertions == 16
    assert PaceConfig.from_sources({"bank_size": 7}).max_insertions == 7


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bank_sise": 5}, ["bank_sise", "5", "bank_size"]),
        ({"bank_size": 0}, ["bank_size", "0", "from 1 to 1024"]),
        ({"bank_size": 7.5}, ["bank_size", "7.5", "an integer"]),
        ({"bank_size": True}, ["bank_size", "True"]),
        ({"alpha": True}, ["alpha", "True", "from 0 to 1"]),
        ({"theta_high": "0.9"}, ["theta_high", "'0.9'", "a number"]),
        ({"layers": [True, 2]}, ["layers", "True"]),
        ({"layers": ["3"]}, ["layers", "'3'"]),
        ({"preset": "best"}, ["preset", "best", '"gentle", "official" or "paper"']),
        ({"site": "input"}, ["site", "input", '"auto", "activation" or "output"']),
        (
            {"experts": {"num_experts": 8}, "layers": [1], "site": "output"},
            ["site", "output", '"activation" beside experts'],
        ),
        ({"experts": {"num_experts": 8}, "site": "auto"}, ["site", "auto", "add layers"]),
        ({"theta_low": 0.9}, ["theta_low", "0.9", "theta_high = 0.75"]),
        ({"theta_high": "high"}, ["theta_high", "high", "a number"]),
        ({"alpha": 1.5}, ["alpha", "1.5", "from 0 to 1"]),
        ({"alpha": float("nan")}, ["alpha", "nan", "from 0 to 1"]),
        ({"max_insertions": 101}, ["max_insertions", "101", "bank_size = 100"]),
        ({"layers": []}, ["layers", "[]", "non-empty"]),
        ({"layers": [-1]}, ["layers", "-1"]),
        ({"layers": [2, 2]}, ["layers", "[2, 2]", "distinct"]),
        ({"layers": "all"}, ["layers", "all", '"auto"']),
        ({"bank_dtype": "int8"}, ["bank_dtype", "int8", "float32"]),
        ({"experts": 64}, ["experts", "64", "an object"]),
        ({"experts": {}}, ["one of path", "num_experts"]),
        ({"experts": {"path": "x", "num_experts": 64}}, ["not both"]),
        ({"experts": {"path": "x", "seed": 1}}, ["experts.seed", "belongs to num_experts"]),
        ({"experts": {"num_expert": 64}}, ["experts.num_expert", "64", "num_experts"]),
        ({"experts": {"num_experts": 0}}, ["experts.num_experts", "0", "from 1"]),
        ({"experts": {"num_experts": 8, "top_k": 9}}, ["experts.top_k", "9", "from 1 to 8"]),
        ({"experts": {"num_experts": 8, "mass": 0}}, ["experts.mass", "0", "above 0"]),
        ({"experts": {"num_experts": 8, "mass": True}}, ["experts.mass", "True", "above 0"]),
        ({"experts": {"num_experts": 8, "mass": "0.9"}}, ["experts.mass", "'0.9'", "above 0"]),
        ({"experts": {"num_experts": 8, "layers": [True]}}, ["experts.layers", "[True]"]),
        ({"experts": {"num_experts": 8, "mass": 1, "top_k": 1}}, ["top_k or mass"]),
        ({"experts": {"num_experts": 8, "layers": []}}, ["experts.layers", "[]"]),
        ({"experts": {"num_experts": 8, "features": "up"}}, ["experts.features", "up"]),
        ({"experts": {"num_experts": 8}, "alpha": 0.5}, ["alpha", "0.5", "add layers"]),
        ([1], ["[1]", "object"]),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(settings, words):
    with pytest.raises(PaceConfigError) as refusal:
        PaceConfig.from_sources(settings)
    message = str(refusal.value)
    assert message.startswith("pacellm: ")
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_layer_outside_the_model_is_refused():
    with pytest.raises(PaceConfigError, match=r"layers = 99 .* from 0 to 27"):
        PaceConfig.from_sources({"layers": [12, 99]}).resolve_layers(28)


@pytest.mark.parametrize(
    ("settings", "site"),
    [
        ({}, "auto"),
        ({"preset": "official"}, "activation"),
        ({"preset": "paper"}, "activation"),
        ({"preset": "paper", "site": "output"}, "output"),
        ({"preset": "official", "site": "auto"}, "auto"),
        ({"experts": {"num_experts": 8}, "layers": [1]}, "activation"),
    ],
)
def test_what_was_published_remembers_activations(settings, site):
    assert PaceConfig.from_sources(settings).site == site
