"""Which functions of vLLM are ours in this process, found by looking at all of them."""

import sys
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pacellm_vllm

PACKAGE = Path(pacellm_vllm.__file__).parent
# The PyTorch CPU platform gives vLLM kernels where it has none; tests could not run without.
PLATFORM = PACKAGE / "platform"


def ours_in_vllm() -> set[str]:
    """``module:name`` or ``module:Class.name`` of each function in an imported module of vLLM that
    was written in our package."""
    found = set()
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "vllm" or not isinstance(module, ModuleType):
            continue
        for attribute, value in list(vars(module).items()):
            if _is_ours(value):
                found.add(f"{name}:{attribute}")
            if isinstance(value, type) and value.__module__ == name:
                found |= {f"{name}:{attribute}.{m}" for m, f in vars(value).items() if _is_ours(f)}
    return found


def _is_ours(value: Any) -> bool:
    # Not by asking the value for attributes: vLLM has some that import a package when asked.
    if isinstance(value, classmethod | staticmethod):
        value = value.__func__
    if not isinstance(value, FunctionType):
        return False
    path = Path(value.__code__.co_filename)
    return path.is_relative_to(PACKAGE) and not path.is_relative_to(PLATFORM)
