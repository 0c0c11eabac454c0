"""What the package and docs/models.md say was compared is what tests compare."""

from pathlib import Path

from checkpoints import FAMILIES
from test_engine_pictures import CAUSAL
from transformers.models.auto import modeling_auto as auto

from pacellm_vllm.models.compared import COMPARED
from pacellm_vllm.models.table import ARCHITECTURES, WHY_NOT

DOCUMENT = Path(__file__).parent.parent / "docs" / "models.md"


def rows():
    lines = DOCUMENT.read_text().splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return dict(pair for pair in cells if len(pair) == 2)


def test_compared_is_what_tests_compare():
    texts = (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[arch] for arch in FAMILIES)
    pictures = (auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[arch] for arch in CAUSAL)
    assert {*COMPARED} == {*texts, *pictures}


def test_the_document_says_of_every_architecture_how_it_stands():
    said = rows()
    assert {name for name, how in said.items() if how == "equal to the oracle"} == {*COMPARED}
    for name in said.keys() & WHY_NOT.keys():
        assert said[name] == f"refused: {WHY_NOT[name]}"
    assert said.keys() >= {base.architecture for base in ARCHITECTURES.values()}
