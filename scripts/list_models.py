"""Print the table of docs/models.md: every generative architecture of vLLM, and how it stands.

    python scripts/list_models.py

Imports all of vLLM's model code, which takes a minute.
"""

import logging
from collections import Counter
from importlib import import_module

from vllm.model_executor.models.interfaces import is_attention_free

from pacellm_vllm.compat import generation_models
from pacellm_vllm.models.compared import compared_as
from pacellm_vllm.models.table import WHY_NOT, BaseModel

EQUAL = "equal to the oracle"


def standing(base: BaseModel) -> tuple[str, str]:
    """In a word, and with what is to be said about it."""
    twin = compared_as(base)
    if twin == base.architecture:
        return "compared", EQUAL
    if base.architecture in WHY_NOT:
        return "refused", f"refused: {WHY_NOT[base.architecture]}"
    try:
        cls = base.load()
    except Exception as error:
        return "recognised", f"not compared: cannot be built here ({type(error).__name__}: {error})"
    if is_attention_free(cls):
        return "refused", "refused: a model without attention"
    if hasattr(import_module(base.module), "CrossAttention"):
        return "refused", "refused: an encoder-decoder model"
    if twin:
        return "recognised", f"not compared, but {twin}, of the same class, was"
    return "recognised", "not compared"


def main() -> None:
    logging.disable(logging.ERROR)
    bases = [BaseModel(*model) for model in generation_models()]
    counts: Counter[str] = Counter()
    rows = []
    for base in sorted(bases, key=lambda base: base.architecture.lower()):
        kind, said = standing(base)
        counts[kind] += 1
        rows.append(f"| {base.architecture} | {' '.join(said.split())[:160]} |")
    print(
        f"{len(rows)} architectures: {counts['compared']} equal to the oracle, "
        f"{counts['recognised']} recognised by what they are made of and not compared, "
        f"{counts['refused']} refused.\n"
    )
    print("| architecture | |\n|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
