"""Architectures whose memory was held to an independent computation (``tests/test_engine_oracle.py``).

Others are served by what is seen in them, and start with a warning that says so.
"""

COMPARED = frozenset(
    """
    ApertusForCausalLM ArceeForCausalLM Cohere2ForCausalLM CohereForCausalLM CwmForCausalLM
    Ernie4_5ForCausalLM Exaone4ForCausalLM FalconForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM
    GemmaForCausalLM Glm4ForCausalLM GPT2LMHeadModel GPTBigCodeForCausalLM GPTJForCausalLM
    GPTNeoXForCausalLM GraniteForCausalLM GraniteSWAForCausalLM HunYuanDenseV1ForCausalLM
    HyperCLOVAXForCausalLM InternLM3ForCausalLM IQuestCoderForCausalLM Jais2ForCausalLM
    LlamaForCausalLM LLaMAForCausalLM Ministral3ForCausalLM MistralForCausalLM
    NemotronForCausalLM Olmo2ForCausalLM Olmo3ForCausalLM OlmoForCausalLM OPTForCausalLM
    Phi3ForCausalLM PhiForCausalLM Qwen2ForCausalLM Qwen3ForCausalLM SeedOssForCausalLM
    SmolLM3ForCausalLM StableLmForCausalLM Starcoder2ForCausalLM TeleChat3ForCausalLM
    TransformersForCausalLM VaultGemmaForCausalLM
    """.split()
)
