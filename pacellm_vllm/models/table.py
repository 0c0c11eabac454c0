"""Which ``Pace*`` architecture stands on which vLLM class, and which have none, and why."""

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


_OWN = (
    BaseModel("ApertusForCausalLM", "apertus", "ApertusForCausalLM"),
    BaseModel("CohereForCausalLM", "commandr", "CohereForCausalLM"),
    BaseModel("Cohere2ForCausalLM", "commandr", "CohereForCausalLM"),
    BaseModel("Ernie4_5ForCausalLM", "ernie45", "Ernie4_5ForCausalLM"),
    BaseModel("Exaone4ForCausalLM", "exaone4", "Exaone4ForCausalLM"),
    BaseModel("FalconForCausalLM", "falcon", "FalconForCausalLM"),
    BaseModel("GemmaForCausalLM", "gemma", "GemmaForCausalLM"),
    BaseModel("Gemma2ForCausalLM", "gemma2", "Gemma2ForCausalLM"),
    BaseModel("Gemma3ForCausalLM", "gemma3", "Gemma3ForCausalLM"),
    BaseModel("Glm4ForCausalLM", "glm4", "Glm4ForCausalLM"),
    BaseModel("GPT2LMHeadModel", "gpt2", "GPT2LMHeadModel"),
    BaseModel("GPTJForCausalLM", "gpt_j", "GPTJForCausalLM"),
    BaseModel("GraniteForCausalLM", "granite", "GraniteForCausalLM"),
    BaseModel("GraniteSWAForCausalLM", "granite", "GraniteForCausalLM"),
    BaseModel("HyperCLOVAXForCausalLM", "hyperclovax", "HyperCLOVAXForCausalLM"),
    BaseModel("InternLM3ForCausalLM", "llama", "LlamaForCausalLM"),
    BaseModel("IQuestCoderForCausalLM", "llama", "LlamaForCausalLM"),
    BaseModel("LlamaForCausalLM", "llama", "LlamaForCausalLM"),
    BaseModel("LLaMAForCausalLM", "llama", "LlamaForCausalLM"),
    BaseModel("Ministral3ForCausalLM", "mistral", "MistralForCausalLM"),
    BaseModel("MistralForCausalLM", "mistral", "MistralForCausalLM"),
    BaseModel("NemotronForCausalLM", "nemotron", "NemotronForCausalLM"),
    BaseModel("OPTForCausalLM", "opt", "OPTForCausalLM"),
    BaseModel("Phi3ForCausalLM", "phi3", "Phi3ForCausalLM"),
    BaseModel("Qwen2ForCausalLM", "qwen2", "Qwen2ForCausalLM"),
    BaseModel("Qwen3ForCausalLM", "qwen3", "Qwen3ForCausalLM"),
    BaseModel("StableLmForCausalLM", "stablelm", "StablelmForCausalLM"),
    BaseModel("TeleChat3ForCausalLM", "llama", "LlamaForCausalLM"),
)
# vLLM serves these with the code of transformers and layers of its own.
_OF_TRANSFORMERS = (
    "ArceeForCausalLM",
    "CwmForCausalLM",
    "GPTBigCodeForCausalLM",
    "GPTNeoXForCausalLM",
    "HunYuanDenseV1ForCausalLM",
    "Jais2ForCausalLM",
    "OlmoForCausalLM",
    "Olmo2ForCausalLM",
    "Olmo3ForCausalLM",
    "PhiForCausalLM",
    "SeedOssForCausalLM",
    "SmolLM3ForCausalLM",
    "Starcoder2ForCausalLM",
    "TransformersForCausalLM",
    "VaultGemmaForCausalLM",
)
_BASES = (
    *_OWN,
    *(BaseModel(name, "transformers", "TransformersForCausalLM") for name in _OF_TRANSFORMERS),
)

ARCHITECTURES = {f"Pace{base.architecture}": base for base in _BASES}

# Theirs are not the FFNs whose neurons can be moved (``experts.check_ffn``).
_WITHOUT_EXPERTS = (
    "FalconForCausalLM",
    "GPT2LMHeadModel",
    "GPTBigCodeForCausalLM",
    "GPTJForCausalLM",
    "GPTNeoXForCausalLM",
    "OPTForCausalLM",
    "PhiForCausalLM",
)

# vLLM's other text generation architectures.
_NOT_SERVED = {
    "its FFNs are a mixture of experts, with no single activation to remember": """
        AfmoeForCausalLM AliceAIForCausalLM AXK1ForCausalLM BailingMoeForCausalLM
        BailingMoeV2_5ForCausalLM BailingMoeV2ForCausalLM BailingMoeV3ForCausalLM BeamForCausalLM
        Cohere2MoeForCausalLM DbrxForCausalLM DeepseekForCausalLM DeepseekV2ForCausalLM
        DeepseekV32ForCausalLM DeepseekV3ForCausalLM DeepseekV4ForCausalLM Ernie4_5_MoeForCausalLM
        ExaoneMoeForCausalLM ExaoneMoEForCausalLM FlexOlmoForCausalLM FlintForCausalLM
        Glm4MoeForCausalLM Glm4MoeLiteForCausalLM Glm5NextForCausalLM GlmMoeDsaForCausalLM
        GptOssForCausalLM GraniteMoeForCausalLM GraniteMoeHybridForCausalLM
        GraniteMoeSharedForCausalLM GraniteMoeSWAForCausalLM HunYuanMoEV1ForCausalLM HYV3ForCausalLM
        HYV4ForCausalLM InklingForCausalLM JambaForCausalLM K2HorizonForCausalLM
        KimiLinearForCausalLM Kolibri1ForCausalLM LagunaForCausalLM Lfm2MoeForCausalLM
        Llama4ForCausalLM LongcatFlashForCausalLM LongcatFlashNgramForCausalLM MellumForCausalLM
        MiMoV2FlashForCausalLM MiMoV2ForCausalLM MiniMaxM2ForCausalLM MiniMaxM3SparseForCausalLM
        MistralLarge3ForCausalLM MixtralForCausalLM OlmoeForCausalLM PanguProMoEV2ForCausalLM
        PanguUltraMoEForCausalLM Param2MoEForCausalLM PhiMoEForCausalLM Qwen2MoeForCausalLM
        Qwen3_5MoeForCausalLM Qwen3MoeForCausalLM Qwen3NextForCausalLM Qwen4ExpForCausalLM
        SarvamMLAForCausalLM SarvamMoEForCausalLM Step3p5ForCausalLM Step3TextForCausalLM
        Step5ForCausalLM TransformersMoEForCausalLM
    """,
    "layers of it keep a recurrent state, whose pages have not been tried beside banks": """
        FalconH1ForCausalLM FalconMambaForCausalLM Lfm2ForCausalLM Mamba2ForCausalLM
        MambaForCausalLM NemotronHForCausalLM NemotronHPuzzleForCausalLM OlmoHybridForCausalLM
        Qwen3_5ForCausalLM Zamba2ForCausalLM
    """,
    "a token passes through its layers more than once": """
        DoryForCausalLM HrmTextForCausalLM IQuestLoopCoderForCausalLM
    """,
    "its attention layers share KV caches or have pages of several sizes": """
        DeciLMForCausalLM Gemma3nForCausalLM Gemma4ForCausalLM
    """,
    "its FFN multiplies gate and up outside of its activation": "GlmForCausalLM",
    "its attention does not run on the CPU platform, so it could not be tested": """
        BloomForCausalLM MiniCPM3ForCausalLM
    """,
    "transformers 5 has no code for it, so it could not be compared with any": """
        ChatGLMForConditionalGeneration ChatGLMModel DomynEdgeForCausalLM ExaoneForCausalLM
        InternLM2ForCausalLM MiMoForCausalLM MiniCPMForCausalLM NanbeigeForCausalLM
        OrionForCausalLM PanguEmbeddedForCausalLM Plamo3ForCausalLM Rnj1ForCausalLM SolarForCausalLM
        Step1ForCausalLM TeleChat2ForCausalLM TeleFLMForCausalLM
    """,
    "it reads images as well, and memory was tested on text only": """
        HCXVisionV2ForCausalLM InklingForConditionalGeneration MuseGlimmerForCausalLM
    """,
}
WHY_NOT = {name: reason for reason, names in _NOT_SERVED.items() for name in names.split()}


def pace_architecture(architecture: str) -> str | None:
    """The ``Pace*`` name for a checkpoint's architecture (itself, if it is one), else None."""
    if architecture in ARCHITECTURES:
        return architecture
    name = f"Pace{architecture}"
    return name if name in ARCHITECTURES else None


def experts_architecture(architecture: str) -> str | None:
    """As :func:`pace_architecture`, where that one can serve experts, else None."""
    name = pace_architecture(architecture)
    return name if name and name.removeprefix("Pace") not in _WITHOUT_EXPERTS else None
