"""Which architectures have a ``Pace*`` one: all that vLLM generates text with, but for some.

Names are here for what cannot be seen in a model; everything else is looked for in it when it is
built (``layers``, ``ffn``, ``whole``).
"""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from pacellm_vllm.compat import generation_models

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# What cannot be seen, or is seen too late, and why it stands in the way.
_NOT_SERVED = {
    "a token passes through its layers more than once": """
        DoryForCausalLM HrmTextForCausalLM IQuestLoopCoderForCausalLM
    """,
    "it writes a block of tokens in several passes over them": """
        DiffusionGemmaForBlockDiffusion
    """,
    "several of its layers share one FFN": """
        Zamba2ForCausalLM
    """,
    "its FFNs are sums of several modules, none of which returns them whole": """
        LongcatFlashForCausalLM LongcatFlashNgramForCausalLM Step3TextForCausalLM
        Step3VLForConditionalGeneration
    """,
    "vLLM tells it by its architecture's name where a Pace name would not be known": """
        BloomForCausalLM MoonshotKimiaForCausalLM
    """,
}
# The newer layout of vLLM's model code, of models with attention, or caches, of their own.
_OWN_LAYOUT = "vllm.models."
_WHY_NOT_OWN_LAYOUT = (
    "vLLM has attention and caches of its own for it, which have not been tried beside banks"
)


@dataclass(frozen=True)
class BaseModel:
    """The class ``name`` of ``module`` that vLLM registers under ``architecture``."""

    architecture: str
    module: str
    name: str

    def load(self) -> type:
        return getattr(import_module(self.module), self.name)


_BASES = [BaseModel(*model) for model in generation_models()]
WHY_NOT = {
    **{
        base.architecture: _WHY_NOT_OWN_LAYOUT
        for base in _BASES
        if base.module.startswith(_OWN_LAYOUT)
    },
    **{name: reason for reason, names in _NOT_SERVED.items() for name in names.split()},
}
ARCHITECTURES = {
    f"Pace{base.architecture}": base for base in _BASES if base.architecture not in WHY_NOT
}

# Those whose FFNs the loader of clustered checkpoints was tested on (``experts.check_ffn``).
_WITH_EXPERTS = [
    "ApertusForCausalLM",
    "ArceeForCausalLM",
    "Cohere2ForCausalLM",
    "CohereForCausalLM",
    "CwmForCausalLM",
    "Ernie4_5ForCausalLM",
    "Exaone4ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GemmaForCausalLM",
    "Glm4ForCausalLM",
    "GraniteForCausalLM",
    "GraniteSWAForCausalLM",
    "HunYuanDenseV1ForCausalLM",
    "HyperCLOVAXForCausalLM",
    "InternLM3ForCausalLM",
    "IQuestCoderForCausalLM",
    "Jais2ForCausalLM",
    "LlamaForCausalLM",
    "LLaMAForCausalLM",
    "Ministral3ForCausalLM",
    "MistralForCausalLM",
    "NemotronForCausalLM",
    "Olmo2ForCausalLM",
    "Olmo3ForCausalLM",
    "OlmoForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "SeedOssForCausalLM",
    "SmolLM3ForCausalLM",
    "StableLmForCausalLM",
    "Starcoder2ForCausalLM",
    "TeleChat3ForCausalLM",
    "TransformersForCausalLM",
    "VaultGemmaForCausalLM",
]


def is_pace(vllm_config: "VllmConfig") -> bool:
    """Whether an engine's architecture is a ``Pace*`` one."""
    return vllm_config.model_config.architecture in ARCHITECTURES


def pace_architecture(architecture: str) -> str | None:
    """The ``Pace*`` name for a checkpoint's architecture (itself, if it is one), else None."""
    if architecture in ARCHITECTURES:
        return architecture
    name = f"Pace{architecture}"
    return name if name in ARCHITECTURES else None


def experts_architecture(architecture: str) -> str | None:
    """As :func:`pace_architecture`, where that one can serve experts, else None."""
    name = pace_architecture(architecture)
    return name if name and name.removeprefix("Pace") in _WITH_EXPERTS else None
