"""Print the table of docs/models.md: every generative architecture of vLLM, and how it stands.

    python scripts/list_models.py

Imports all of vLLM's model code, which takes a minute; what came of making models small is read
from ``checked_models.json``, which ``check_models.py`` writes.
"""

import json
import logging
from collections import Counter
from importlib import import_module
from pathlib import Path

from vllm.model_executor.models.interfaces import is_attention_free

from pacellm_vllm.compat import generation_models
from pacellm_vllm.models.compared import TESTED, compared_as
from pacellm_vllm.models.table import WHY_NOT, BaseModel

EQUAL = "equal to the oracle"
# By what ``check_models.py`` says.
SAID = {
    "equal": ("compared", "equal to the oracle, made small"),
    "texts equal": ("texts", "texts equal to the oracle, made small"),
    "refused": ("refused", "refused: {}"),
    "differs": ("recognised", "not compared: differs from transformers without memory ({})"),
    "not run": ("recognised", "not compared: does not run here without memory ({})"),
    "not built": ("recognised", "not compared: {}"),
}
CHECKED = json.loads((Path(__file__).parent / "checked_models.json").read_text())


def standing(base: BaseModel) -> tuple[str, str]:
    """In a word, and with what is to be said about it."""
    if base.architecture in WHY_NOT:
        return "refused", f"refused: {WHY_NOT[base.architecture]}"
    if base.architecture in TESTED:
        return "compared", EQUAL
    kind, sentence = said(base.architecture)
    if kind != "recognised":
        return kind, sentence
    twin = compared_as(base)
    if twin:
        return kind, f"not compared, but {twin}, of the same class, was"
    try:
        cls = base.load()
    except Exception as error:
        return kind, f"not compared: cannot be built here ({type(error).__name__}: {error})"
    if is_attention_free(cls):
        return "refused", "refused: a model without attention"
    if hasattr(import_module(base.module), "CrossAttention"):
        return "refused", "refused: an encoder-decoder model"
    return kind, sentence


def said(architecture: str) -> tuple[str, str]:
    """What ``check_models.py`` found, as ``standing`` says it."""
    found = CHECKED.get(architecture, {"result": "not built", "said": "not tried yet"})
    kind, sentence = SAID[found["result"]]
    return kind, " ".join(sentence.format(found["said"]).split())


def main() -> None:
    logging.disable(logging.ERROR)
    bases = [BaseModel(*model) for model in generation_models()]
    counts: Counter[str] = Counter()
    rows = []
    for base in sorted(bases, key=lambda base: base.architecture.lower()):
        kind, sentence = standing(base)
        counts[kind] += 1
        rows.append(f"| {base.architecture} | {sentence} |")
    print(
        f"{len(rows)} architectures: {counts['compared']} equal to the oracle, {counts['texts']} "
        f"more for texts, {counts['recognised']} recognised by what they are made of and not "
        f"compared, {counts['refused']} refused.\n"
    )
    print("| architecture | |\n|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
