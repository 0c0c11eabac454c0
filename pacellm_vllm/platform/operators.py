"""Operators in PyTorch under the names that vLLM's CPU backend calls in ``torch.ops._C``."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_lib = torch.library.Library("_C", "FRAGMENT")
_Fn = TypeVar("_Fn", bound=Callable[..., Any])


def operator(schema: str) -> Callable[[_Fn], _Fn]:
    """Register the function as the operator that ``schema`` names and describes."""

    def register(fn: _Fn) -> _Fn:
        _lib.define(schema)
        _lib.impl(schema.partition("(")[0], fn, "CompositeExplicitAutograd")
        return fn

    return register
