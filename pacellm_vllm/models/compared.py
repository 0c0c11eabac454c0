"""Architectures whose memory was held to an independent computation, by tests on real engines.

Others, but for those of the same vLLM class, are served by what is seen in them, and start with a
warning that says so.
"""

from pacellm_vllm.models.table import ARCHITECTURES, BaseModel

# By tests in the suite.
TESTED = frozenset(
    [
        "ApertusForCausalLM",
        "ArceeForCausalLM",
        "Cohere2ForCausalLM",
        "CohereForCausalLM",
        "CwmForCausalLM",
        "DeepseekV2ForCausalLM",
        "DeepseekV3ForCausalLM",
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5ForCausalLM",
        "Exaone4ForCausalLM",
        "ExaoneMoeForCausalLM",
        "FalconH1ForCausalLM",
        "FalconForCausalLM",
        "FlexOlmoForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "GemmaForCausalLM",
        "Glm4ForCausalLM",
        "Glm4MoeForCausalLM",
        "Glm4MoeLiteForCausalLM",
        "GlmForCausalLM",
        "GPT2LMHeadModel",
        "GPTBigCodeForCausalLM",
        "GPTJForCausalLM",
        "GPTNeoXForCausalLM",
        "GptOssForCausalLM",
        "GraniteForCausalLM",
        "GraniteMoeForCausalLM",
        "GraniteMoeHybridForCausalLM",
        "GraniteSWAForCausalLM",
        "HunYuanDenseV1ForCausalLM",
        "HunYuanMoEV1ForCausalLM",
        "HyperCLOVAXForCausalLM",
        "Idefics3ForConditionalGeneration",
        "InternVLForConditionalGeneration",
        "Jais2ForCausalLM",
        "JambaForCausalLM",
        "Lfm2ForCausalLM",
        "Lfm2MoeForCausalLM",
        "Llama4ForCausalLM",
        "Llama4ForConditionalGeneration",
        "LlamaForCausalLM",
        "MellumForCausalLM",
        "Ministral3ForCausalLM",
        "Mistral3ForConditionalGeneration",
        "MistralForCausalLM",
        "MixtralForCausalLM",
        "NemotronForCausalLM",
        "NemotronHForCausalLM",
        "Olmo2ForCausalLM",
        "Olmo3ForCausalLM",
        "OlmoeForCausalLM",
        "OlmoForCausalLM",
        "OPTForCausalLM",
        "Phi3ForCausalLM",
        "PhiForCausalLM",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2ForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen3_5ForConditionalGeneration",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
        "Qwen3NextForCausalLM",
        "Qwen3VLForConditionalGeneration",
        "SeedOssForCausalLM",
        "SmolLM3ForCausalLM",
        "StableLmForCausalLM",
        "Starcoder2ForCausalLM",
        "VaultGemmaForCausalLM",
    ]
)

# Made small by ``scripts/check_models.py``, which writes what came of it to checked_models.json.
MADE_SMALL: frozenset[str] = frozenset(
    [
        "AfmoeForCausalLM",
        "Cohere2MoeForCausalLM",
        "ExaoneMoEForCausalLM",
        "Gemma3nForCausalLM",
        "Gemma4ForCausalLM",
        "GraniteMoeSharedForCausalLM",
        "GraniteMoeSWAForCausalLM",
        "LLaMAForCausalLM",
        "MiniCPM3ForCausalLM",
        "PhiMoEForCausalLM",
        "Qwen3_5ForCausalLM",
        "Qwen3_5MoeForCausalLM",
    ]
)
COMPARED = TESTED | MADE_SMALL
# Likewise, but asked about texts only, where the model sees or hears more.
TEXTS_COMPARED: frozenset[str] = frozenset(
    [
        "AriaForConditionalGeneration",
        "Exaone4_5_ForConditionalGeneration",
        "Gemma3ForConditionalGeneration",
        "GlmOcrForConditionalGeneration",
        "GraniteSpeechForConditionalGeneration",
        "GraniteSpeechPlusForConditionalGeneration",
        "Lfm2VlForConditionalGeneration",
        "LlavaForConditionalGeneration",
        "LlavaNextForConditionalGeneration",
        "LlavaNextVideoForConditionalGeneration",
        "LlavaOnevisionForConditionalGeneration",
        "MiniCPMV4_6ForConditionalGeneration",
        "MiniCPMV4_7ForConditionalGeneration",
        "MossTranscribeDiarizeForConditionalGeneration",
        "PaddleOCRVLForConditionalGeneration",
        "PaliGemmaForConditionalGeneration",
        "Qwen2VLForConditionalGeneration",
        "Qwen3_5MoeForConditionalGeneration",
        "SmolVLMForConditionalGeneration",
    ]
)


def compared_as(base: BaseModel) -> str | None:
    """The architecture that was compared for ``base``: itself, or the last one of its class.

    Of vLLM's Transformers backend every family has the same class, which says nothing.
    """
    if base.architecture in COMPARED:
        return base.architecture
    if base.module.endswith(".transformers"):
        return None
    same = (
        other.architecture
        for other in reversed(ARCHITECTURES.values())
        if other.architecture in COMPARED and (other.module, other.name) == (base.module, base.name)
    )
    return next(same, None)
