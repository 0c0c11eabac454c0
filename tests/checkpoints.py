"""Tiny random checkpoints, and prompts, on which every branch of the memory is taken.

Ordinary random weights are useless here: activations are then all alike or all unrelated, and
greedy decoding falls into a cycle of a few tokens. So tokens come in topics (tokens of a topic
resemble each other), and the residual stream has two halves: the first carries the token, and the
FFNs read mostly that; the second carries what attention and FFNs wrote, and the head reads mostly
that. A token seen before is then a high match, its topic a mid match, a new topic a low one, while
the next token depends on the whole context and on what the memory did to the FFNs.
"""

import random
from pathlib import Path
from typing import Any

import torch
from hf import plain_classes
from transformers import AutoConfig, AutoModelForCausalLM

ARCHITECTURES = ("qwen2", "qwen3", "llama", "mistral")
TOPIC_SIZE = 8

_WINDOWS = {
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "query_pre_attn_scalar": 32,
}
# Many have no head_dim of their own: it is hidden size / heads.
_WIDE = {"hidden_size": 128}
_TIED = {"tie_word_embeddings": True}
_ALL_HEADS = {"num_key_value_heads": 4}
# Other decoders whose FFNs fit, with what is special about each: first those that vLLM serves with
# classes of its own, then those of its Transformers backend.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": _WIDE,
    "qwen3": {},
    "llama": {},
    "mistral": {"sliding_window": None},
    "gemma": _TIED,
    "gemma2": {**_TIED, **_WINDOWS},
    "gemma3_text": {**_TIED, **_WINDOWS},
    "granite": {**_WIDE, "attention_multiplier": 32**-0.5},
    "phi3": _WIDE,
    "cohere": {**_WIDE, **_TIED},
    "exaone4": {**_WIDE, **_WINDOWS},
    "glm4": _WIDE,
    "hyperclovax": _WIDE,
    "ministral3": {},
    "nemotron": {},
    "stablelm": _WIDE,
    "apertus": _WIDE,
    "cohere2": {**_WIDE, **_TIED, **_WINDOWS},
    "ernie4_5": _WIDE,
    "falcon": {
        **_WIDE,
        **_TIED,
        "num_key_value_heads": 1,
        # vLLM knows no other FFN for it.
        "ffn_hidden_size": 4 * 128,
        "bias": True,
    },
    "gpt2": {**_WIDE, **_TIED, **_ALL_HEADS, "n_inner": 344},
    "gptj": {**_WIDE, **_ALL_HEADS, "n_inner": 344, "rotary_dim": 16},
    "granite_swa": {**_WIDE, **_WINDOWS, "attention_multiplier": 32**-0.5},
    "opt": {**_WIDE, **_TIED, **_ALL_HEADS, "ffn_dim": 344, "word_embed_proj_dim": 128},
    "arcee": _WIDE,
    "cwm": {**_WIDE, **_WINDOWS, "bos_token_id": 0, "eos_token_id": 0},
    "gpt_bigcode": {**_WIDE, **_TIED, "num_key_value_heads": 1, "n_inner": 344},
    "gpt_neox": {**_WIDE, **_ALL_HEADS},
    "hunyuan_v1_dense": _WIDE,
    "jais2": _WIDE,
    "olmo": _WIDE,
    "olmo2": _WIDE,
    "olmo3": {**_WIDE, **_WINDOWS},
    "phi": _WIDE,
    "seed_oss": _WIDE,
    "smollm3": _WIDE,
    "starcoder2": {**_WIDE, "sliding_window": None},
    "vaultgemma": {**_TIED, **_WINDOWS},
}

_EXPERTS = {**_WIDE, "moe_intermediate_size": 96, "num_experts_per_tok": 2}
_DEEPSEEK = {
    **_EXPERTS,
    **_ALL_HEADS,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "head_dim": 16,
}
# Decoders with routed experts in some layers at least.
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {**_WIDE, "num_local_experts": 8, "intermediate_size": 96, "sliding_window": None},
    "qwen2_moe": {**_EXPERTS, "num_experts": 8, "shared_expert_intermediate_size": 96},
    "qwen3_moe": {**_EXPERTS, "num_experts": 8},
    "olmoe": {**_EXPERTS, "num_experts": 8, "intermediate_size": 96},
    "flex_olmo": {**_EXPERTS, "num_experts": 8, "intermediate_size": 96},
    "mellum": {
        **_EXPERTS,
        "num_experts": 8,
        "intermediate_size": 96,
        # vLLM 0.32 adds it up.
        "num_nextn_predict_layers": 0,
    },
    "gpt_oss": {**_EXPERTS, **_WINDOWS, "num_local_experts": 8, "intermediate_size": 96},
    "glm4_moe": {
        **_EXPERTS,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "granitemoe": {
        **_EXPERTS,
        "num_local_experts": 8,
        "intermediate_size": 96,
        "attention_multiplier": 32**-0.5,
    },
    "ernie4_5_moe": {
        **_EXPERTS,
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    "deepseek_v2": {**_DEEPSEEK, "topk_method": "greedy"},
    # As published; transformers takes them for granted.
    "deepseek_v3": {**_DEEPSEEK, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "llama4_text": {
        **_EXPERTS,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size": 96,
        "intermediate_size_mlp": 344,
        "interleave_moe_layer_step": 2,
        "head_dim": 32,
    },
    "hunyuan_v1_moe": {**_EXPERTS, "num_experts": 8, "moe_topk": 2, "intermediate_size": 96},
    "exaone_moe": {
        **_EXPERTS,
        **_WINDOWS,
        "num_experts": 8,
        "num_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "glm4_moe_lite": {**_DEEPSEEK, "topk_method": "noaux_tc"},
}
_MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_n_groups": 2,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
# Decoders of which some layers keep a recurrent state.
HYBRIDS: dict[str, dict[str, Any]] = {
    "lfm2": {
        **_WIDE,
        **_TIED,
        "layer_types": ["conv", "full_attention"] * 2,
        "block_auto_adjust_ff_dim": False,
        # vLLM looks for them.
        "conv_dim": 128,
        "block_dim": 128,
    },
    "granitemoehybrid": {
        **_WIDE,
        **_MAMBA2,
        "layer_types": ["mamba", "attention"] * 2,
        "num_local_experts": 0,
        "position_embedding_type": "rope",
        # vLLM norms each group's channels apart, transformers all of them together.
        "mamba_n_groups": 1,
        "shared_intermediate_size": 344,
        "attention_multiplier": 32**-0.5,
    },
    "falcon_h1": {**_WIDE, **_MAMBA2, "mamba_d_ssm": 256},
    "jamba": {
        **_WIDE,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
        "use_mamba_kernels": False,
    },
}
_DELTA_NET = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
}
HYBRIDS["qwen3_next"] = {
    **_EXPERTS,
    **_DELTA_NET,
    "num_experts": 8,
    "shared_expert_intermediate_size": 96,
    "norm_topk_prob": True,
}
HYBRIDS["lfm2_moe"] = {
    **HYBRIDS["lfm2"],
    "moe_intermediate_size": 96,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_dense_layers": 1,
}
HYBRIDS["nemotron_h"] = {
    **_WIDE,
    "layers_block_type": ["mamba", "mlp", "attention", "mlp"],
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "n_groups": 1,
    "ssm_state_size": 16,
    "conv_kernel": 4,
    "expand": 2,
    "chunk_size": 16,
}
# Dense FFNs whose activations no module returns.
WITHOUT_ACTIVATIONS: dict[str, dict[str, Any]] = {"glm": _WIDE}
FAMILIES |= MIXTURES | WITHOUT_ACTIVATIONS | HYBRIDS
# They keep the matrices of experts as [experts, in, out].
_TURNED_EXPERTS = ("gpt_oss", "llama4_text")

# What families call weights that play one part.
_EMBEDDINGS = ("embed_tokens", "embed_in", "word_embeddings", "wte")
_POSITIONS = ("wpe", "embed_positions")
_QUERIES = ("q_proj", "k_proj", "qkv_proj", "query_key_value", "c_attn")
_FFN_INPUTS = (
    "gate_proj",
    "up_proj",
    "gate_up_proj",
    "dense_h_to_4h",
    "c_fc",
    "fc_in",
    "fc1",
    "w1",
    "w3",
    "input_linear",
)
_FFN_OUTPUTS = (
    "down_proj",
    "dense_4h_to_h",
    "fc_out",
    "fc2",
    "mlp.c_proj",
    "w2",
    "output_linear",
)
_ATTENTION_OUTPUTS = ("o_proj", "out_proj", "dense", "attn.c_proj")
_HEADS = ("lm_head", "embed_out")

# Share of a token embedding's variance that its topic explains.
TOPIC_SHARE = 0.85
# How strongly each kind of weight deals with the second, contextual half of the residual stream,
# where 1 is how it deals with the first.
EMBED_CONTEXT = 0.1
READ_CONTEXT = 0.3
WRITE_CONTEXT = 4.0
HEAD_CONTEXT = 2.5
# RMS of what a block adds to the first half, where the embedding has RMS 1.
ATTENTION_RMS = 0.1
FFN_RMS = 0.1
# Gain of queries and of keys.
SHARPNESS = 2.0
LOGIT_RMS = 2.0


# What all of them have of a Hugging Face configuration, unless a family's own says otherwise.
SMALL: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 344,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    # Random models would end a sequence, or start one, at random.
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "dtype": "float32",
}


def make_checkpoint(directory: Any, arch: str, seed: int = 0, **sizes: Any) -> Path:
    """Write a random fp32 checkpoint (safetensors, no tokenizer) and return its directory.

    Args:
        directory: created if missing.
        arch: one of FAMILIES.
        seed: fixes every weight.
        sizes: overrides of any field of the Hugging Face configuration.
    """
    settings = dict(SMALL)
    if arch == "falcon":
        # Its configuration works this out.
        del settings["head_dim"]
    config = AutoConfig.for_model(arch, **{**settings, **FAMILIES[arch], **sizes})
    with plain_classes(config):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Llama and Mistral have the same parameters: without the offset they would be the same model.
    number = list(FAMILIES).index(arch)
    generator = torch.Generator().manual_seed(seed * len(ARCHITECTURES) + number)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            # GPT-2 stores matrices as [in, out].
            turned = (arch == "gpt2" and ".h." in name and parameter.ndim == 2) or (
                arch in _TURNED_EXPERTS and parameter.ndim == 3
            )
            shape = parameter.mT.shape if turned else parameter.shape
            weight = random_weight(name, shape, config, generator)
            parameter.copy_(weight.mT if turned else weight)
    directory = Path(directory)
    model.save_pretrained(directory, safe_serialization=True)
    return directory


def random_weight(
    name: str, shape: torch.Size, config: Any, generator: torch.Generator
) -> torch.Tensor:
    """One parameter's initial value, by the last part of its name."""
    noise = torch.randn(shape, generator=generator)
    parts = name.removesuffix(".weight").rsplit(".", 2)
    kind = parts[-1]
    kinds = {kind, ".".join(parts[-2:])}
    # Queries and keys must be strong enough for attention to choose; Qwen3 normalises them, so that
    # there the norms have to be.
    if kind in ("q_norm", "k_norm"):
        return SHARPNESS * (1 + 0.1 * noise)
    if kind == "embedding_norm":
        # The last norm of LFM2, whose head has the embedding's weights and would say each token
        # again.
        return HEAD_CONTEXT / EMBED_CONTEXT * _halves(shape[0], 50) / 50 * (1 + 0.1 * noise)
    gemma = "gemma" in config.model_type
    if "norm" in kind or kind in ("ln_1", "ln_2", "ln_f"):
        # The norms of Gemma 1 to 3, and most of Qwen3-Next's, add the 1 themselves.
        adds = gemma and not config.model_type.startswith(("gemma3n", "gemma4"))
        adds |= config.model_type == "qwen3_next" and ".linear_attn." not in name
        return (0 if adds else 1) + 0.1 * noise
    if kind in ("alpha_p", "alpha_n"):
        # xIELU's, which vLLM keeps in bfloat16: exact there, and so is their softplus.
        return torch.full(shape, 24.0)
    if kind == "e_score_correction_bias":
        # vLLM's router on a CPU leaves ERNIE's out.
        return torch.zeros(shape)
    if kind.endswith("bias"):
        return 0.1 * noise
    if kind in _EMBEDDINGS:
        topics = torch.randn(-(-shape[0] // TOPIC_SIZE), shape[1], generator=generator)
        topic = topics.repeat_interleave(TOPIC_SIZE, dim=0)[: shape[0]]
        embedding = TOPIC_SHARE**0.5 * topic + (1 - TOPIC_SHARE) ** 0.5 * noise
        # Gemma scales embeddings up by this.
        scale = config.hidden_size**-0.5 if gemma else 1.0
        return scale * embedding * _halves(config.hidden_size, EMBED_CONTEXT)
    if kind in _POSITIONS or kind == "sinks":
        return 0.3 * noise
    # With inputs of RMS 1 a gain of 1 makes outputs of RMS 1.
    weight = noise / shape[-1] ** 0.5
    if kind in _FFN_INPUTS:
        return 1.4 * weight * _halves(config.hidden_size, READ_CONTEXT)
    if kind in _HEADS:
        return LOGIT_RMS * weight * _halves(config.hidden_size, HEAD_CONTEXT)
    if kinds & set(_ATTENTION_OUTPUTS):
        # Averaging over tokens shrinks what attention brings.
        return 2 * ATTENTION_RMS * weight * _halves(config.hidden_size, WRITE_CONTEXT)[:, None]
    if kinds & set(_FFN_OUTPUTS):
        # silu(g) * u of two unit normals has an RMS of about 0.6, xIELU as above one of about 60.
        rms = 60 if config.model_type == "apertus" else 0.6
        return FFN_RMS / rms * weight * _halves(config.hidden_size, WRITE_CONTEXT)[:, None]
    return (SHARPNESS if kind in _QUERIES else 1.0) * weight


def _halves(hidden: int, context: float) -> torch.Tensor:
    """Per-channel factors [H]: 1 for the token half, `context` for the other."""
    factors = torch.ones(hidden)
    factors[hidden // 2 :] = context
    return factors


def make_prompt(seed: int, length: int, vocab: int = 256) -> list[int]:
    """A random prompt of token ids: long runs within favourite topics, and asides from anywhere."""
    rng = random.Random(seed)
    topics = -(-vocab // TOPIC_SIZE)
    order = rng.sample(range(topics), topics)
    weights = [(rank + 1) ** -1.2 for rank in range(topics)]
    topic = order[0]
    prompt: list[int] = []
    while len(prompt) < length:
        if rng.random() < 0.1:
            topic = rng.choices(order, weights)[0]
        if rng.random() < 0.25:
            token = rng.randrange(vocab)
        else:
            # Within a topic, too, a few tokens are common and the rest rare.
            offset = min(int(rng.expovariate(0.8)), TOPIC_SIZE - 1)
            token = min(topic * TOPIC_SIZE + offset, vocab - 1)
        # A token that has seen only itself has the same activations at every position. Such slots
        # tie, and rounding would decide between them.
        if prompt != [token]:
            prompt.append(token)
    return prompt
