"""What the package and docs/models.md say was compared is what tests compare."""

from pathlib import Path

from checkpoints import FAMILIES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

from pacellm_vllm.models.compared import COMPARED
from pacellm_vllm.models.table import ARCHITECTURES, WHY_NOT

DOCUMENT = Path(__file__).parent.parent / "docs" / "models.md"


def rows():
    lines = DOCUMENT.read_text().splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return dict(pair for pair in cells if len(pair) == 2)


def test_compared_is_what_tests_compare():
    assert {*COMPARED} == {*(NAMES[arch] for arch in FAMILIES), "Idefics3ForConditionalGeneration"}


def test_the_document_says_of_every_architecture_how_it_stands():
    said = rows()
    assert {name for name, how in said.items() if how == "equal to the oracle"} == {*COMPARED}
    for name in said.keys() & WHY_NOT.keys():
        assert said[name] == f"refused: {WHY_NOT[name]}"
    assert said.keys() >= {base.architecture for base in ARCHITECTURES.values()}
