"""Which ``Pace*`` architecture stands on which vLLM class."""

from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class BaseModel:
    """A class of ``vllm.model_executor.models`` registered under ``architecture``."""

    architecture: str
    module: str
    name: str

    def load(self) -> type:
        module = import_module(f"vllm.model_executor.models.{self.module}")
        return getattr(module, self.name)


_BASES = (
    BaseModel("CohereForCausalLM", "commandr", "CohereForCausalLM"),
    BaseModel("Exaone4ForCausalLM", "exaone4", "Exaone4ForCausalLM"),
    BaseModel("GemmaForCausalLM", "gemma", "GemmaForCausalLM"),
    BaseModel("Gemma2ForCausalLM", "gemma2", "Gemma2ForCausalLM"),
    BaseModel("Gemma3ForCausalLM", "gemma3", "Gemma3ForCausalLM"),
    BaseModel("Glm4ForCausalLM", "glm4", "Glm4ForCausalLM"),
    BaseModel("GraniteForCausalLM", "granite", "GraniteForCausalLM"),
    BaseModel("HyperCLOVAXForCausalLM", "hyperclovax", "HyperCLOVAXForCausalLM"),
    BaseModel("InternLM3ForCausalLM", "llama", "LlamaForCausalLM"),
    BaseModel("LlamaForCausalLM", "llama", "LlamaForCausalLM"),
    BaseModel("Ministral3ForCausalLM", "mistral", "MistralForCausalLM"),
    BaseModel("MistralForCausalLM", "mistral", "MistralForCausalLM"),
    BaseModel("NemotronForCausalLM", "nemotron", "NemotronForCausalLM"),
    BaseModel("Phi3ForCausalLM", "phi3", "Phi3ForCausalLM"),
    BaseModel("Qwen2ForCausalLM", "qwen2", "Qwen2ForCausalLM"),
    BaseModel("Qwen3ForCausalLM", "qwen3", "Qwen3ForCausalLM"),
    BaseModel("StableLmForCausalLM", "stablelm", "StablelmForCausalLM"),
)

ARCHITECTURES = {f"Pace{base.architecture}": base for base in _BASES}


def pace_architecture(architecture: str) -> str | None:
    """The ``Pace*`` name for a checkpoint's architecture (itself, if it is one), else None."""
    if architecture in ARCHITECTURES:
        return architecture
    name = f"Pace{architecture}"
    return name if name in ARCHITECTURES else None
