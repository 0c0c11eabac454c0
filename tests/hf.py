"""Models of transformers as they are, whatever vLLM has done to their classes in this process."""

from types import SimpleNamespace
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM
from vllm.config import CompilationConfig, CompilationMode, VllmConfig, set_current_vllm_config


def load_model(path: Any, kind: Any = AutoModelForCausalLM, **settings: Any) -> Any:
    """The model in ``path``, of class ``kind``, for inference.

    vLLM's Transformers backend makes the decoder classes that it serves ask for a vLLM config from
    then on, in everybody's hands; with one that compiles nothing they are as they were.
    """
    config = VllmConfig(compilation_config=CompilationConfig(mode=CompilationMode.NONE))
    config.model_config = SimpleNamespace(hf_config=AutoConfig.from_pretrained(path))
    with set_current_vllm_config(config):
        return kind.from_pretrained(path, **settings).eval()
