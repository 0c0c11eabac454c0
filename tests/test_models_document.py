"""What the package and docs/models.md say was compared is what tests and a script compare."""

from pathlib import Path

import pytest
from check_models import check
from checkpoints import FAMILIES
from list_models import CHECKED, EQUAL, SAID, said
from test_engine_pictures import CAUSAL
from transformers.models.auto import modeling_auto as auto

from pacellm_vllm.models.compared import MADE_SMALL, TESTED, TEXTS_COMPARED
from pacellm_vllm.models.table import ARCHITECTURES, WHY_NOT

DOCUMENT = Path(__file__).parent.parent / "docs" / "models.md"


def rows():
    lines = DOCUMENT.read_text().splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return dict(pair for pair in cells if len(pair) == 2)


def found(result):
    return {name for name, one in CHECKED.items() if one["result"] == result}


def test_compared_is_what_tests_compare():
    texts = (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[arch] for arch in FAMILIES)
    pictures = (auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[arch] for arch in CAUSAL)
    assert {*texts, *pictures} == TESTED


def test_the_rest_was_tried_with_a_small_model_and_nothing_is_at_fault():
    names = {base.architecture for base in ARCHITECTURES.values()}
    assert CHECKED.keys() <= names - TESTED
    assert {one["result"] for one in CHECKED.values()} <= SAID.keys()
    assert found("equal") == MADE_SMALL
    assert found("texts equal") == TEXTS_COMPARED


def test_the_document_says_of_every_architecture_how_it_stands():
    told = rows()
    assert {name for name, how in told.items() if how == EQUAL} == TESTED
    for name in WHY_NOT.keys() & told.keys():
        assert told[name] == f"refused: {WHY_NOT[name]}"
    for name in MADE_SMALL | TEXTS_COMPARED | found("refused"):
        assert told[name] == said(name)[1]
    assert told.keys() >= {base.architecture for base in ARCHITECTURES.values()}


@pytest.mark.parametrize(
    "architecture",
    [
        # Layers that share KV caches, whose pages are of several sizes.
        "Gemma4ForCausalLM",
        # Experts in the decoder of a model that sees pictures.
        "AriaForConditionalGeneration",
        "Ovis",
    ],
)
def test_a_sample_of_what_the_script_found(architecture, tmp_path):
    result, why = check(architecture, tmp_path / "model")
    assert {"result": result, "said": why} == CHECKED[architecture]
