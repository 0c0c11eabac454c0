"""Models of transformers as they are, whatever vLLM has done to their classes in this process."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM


@contextmanager
def plain_classes(hf_config: Any) -> Iterator[None]:
    """Within it a model of ``hf_config`` is built as transformers has it.

    vLLM's Transformers backend makes the decoder classes that it serves ask for a vLLM config from
    then on, in everybody's hands; with one that compiles nothing they are as they were.
    """
    from vllm.config import (
        CompilationConfig,
        CompilationMode,
        VllmConfig,
        set_current_vllm_config,
    )

    config = VllmConfig(compilation_config=CompilationConfig(mode=CompilationMode.NONE))
    config.model_config = SimpleNamespace(hf_config=hf_config)
    with set_current_vllm_config(config):
        yield


def load_model(path: Any, kind: Any = AutoModelForCausalLM, **settings: Any) -> Any:
    """The model in ``path``, of class ``kind``, for inference."""
    with plain_classes(AutoConfig.from_pretrained(path)):
        return kind.from_pretrained(path, **settings).eval()
