"""A small random checkpoint of any architecture that transformers has, by its own field names."""

from pathlib import Path
from typing import Any

import torch
import transformers
from checkpoints import HYBRIDS, SMALL, random_weight
from hf import plain_classes
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto as auto

LAYERS = SMALL["num_hidden_layers"]
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What fields of a text decoder's configuration become, where it has them.
_TEXT: dict[str, Any] = {
    **{name: value for name, value in SMALL.items() if name != "tie_word_embeddings"},
    **dict.fromkeys(("hidden_size", "d_model", "word_embed_proj_dim"), 128),
    **dict.fromkeys(("ffn_dim", "ffn_hidden_size", "n_inner", "intermediate_size_mlp"), 344),
    **dict.fromkeys(("n_heads", "num_sliding_attention_heads"), 4),
    **dict.fromkeys(("kv_n_heads",), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_groups", "num_dense_layers"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "v_head_dim", "qk_nope_head_dim"), 32),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "ssm_state_size"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "chunk_size"), 16),
    **dict.fromkeys(("linear_num_value_heads", "mamba_num_heads"), 8),
    "n_layers": LAYERS,
    "max_seq_len": SMALL["max_position_embeddings"],
    "moe_intermediate_size": 96,
    "shared_expert_intermediate_size": 96,
    "moe_shared_expert_intermediate_size": 96,
    "share_expert_dim": 96,
    "linear_num_key_heads": 4,
    "mamba_head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 64,
    "num_kv_shared_layers": 2,
    "num_attention_heads_per_layer": 4,
    "vocab_size_per_layer_input": SMALL["vocab_size"],
    "hidden_size_per_layer_input": 32,
}
_ROTARY = {"mrope_section": [8, 4, 4], "partial_rotary_factor": 1.0}
_MROPE: dict[str, Any] = {
    "head_dim": 32,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **_ROTARY},
}
_BY_TURNS = {"rope_parameters": {**_MROPE["rope_parameters"], "mrope_interleaved": True}}
# What published checkpoints have that vLLM looks for, by model type.
_PUBLISHED: dict[str, dict[str, Any]] = {
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    "hy_v3": {"first_k_dense_replace": 1, "expert_hidden_dim": 96, "route_norm": True},
    # vLLM leaves a factor out before a norm, of which only this is seen.
    "gemma3n_text": {"rms_norm_eps": 1e-12},
    # Layers that see everything have wider heads.
    "gemma4_text": {"global_head_dim": 64},
    "gemma4_unified_text": {"global_head_dim": 64},
    **dict.fromkeys(("glm4v_text", "glm_ocr_text"), _MROPE),
    "glm4v_moe_text": {**_MROPE, "use_qk_norm": False},
    **dict.fromkeys(("paddleocr_vl_text", "qwen2_vl_text", "qwen2_5_omni_text"), _MROPE),
    "qwen3_vl_moe_text": {**_BY_TURNS, "norm_topk_prob": True},
    "lfm2": HYBRIDS["lfm2"],
    "minimax_m2": {"rotary_dim": 32, "scoring_func": "sigmoid"},
    # vLLM leaves the bias of the head out, which published ones have.
    "phimoe": {"attention_bias": True, "lm_head_bias": False},
}
# Of all else, as of an encoder of pictures, only the number of layers: sizes fit each other there.
_DEPTHS = ("num_hidden_layers", "encoder_layers", "decoder_layers", "depth", "num_layers")


class NotBuilt(Exception):
    """Why there is no such checkpoint, or no truth for it, in a sentence."""


def transformers_class(architecture: str) -> Any:
    """The class that transformers has for ``architecture``."""
    for table in dir(auto):
        if table.endswith("_MAPPING_NAMES"):
            for names in getattr(auto, table).values():
                for name in [names] if isinstance(names, str) else names:
                    if name.lower() == architecture.lower():
                        return getattr(transformers, name)
    raise NotBuilt("transformers has no model of this name")


def small_config(kind: type[PreTrainedConfig], **sizes: Any) -> Any:
    """The default configuration of ``kind``, with a text decoder of SMALL's sizes.

    ``sizes`` are further fields of that decoder.
    """
    whole = kind()
    text = whole.get_text_config()
    sizes = {**_PUBLISHED.get(text.model_type, {}), **sizes}
    tied = getattr(whole, "tie_word_embeddings", getattr(text, "tie_word_embeddings", False))
    try:
        return kind(**_shrink(whole, text, tied, sizes))
    except Exception:
        # Some want to know them.
        return kind(**_shrink(whole, text, tied, sizes | dict.fromkeys(_TOKENS, 0)))


def _shrink(config: Any, text: Any, tied: bool, sizes: dict[str, Any]) -> dict[str, Any]:
    fields = config.to_dict()
    # What some layers have of their own is of layers by number.
    fields.pop("per_layer_config", None)
    given = dict(fields)
    depth = max((fields[name] for name in _DEPTHS if isinstance(fields.get(name), int)), default=0)
    ours = {**_TEXT, **sizes} if config is text else dict.fromkeys(_DEPTHS, 2)
    kept = {name for name, value in fields.items() if value is not None}
    fields |= {name: value for name, value in ours.items() if name in kept | sizes.keys()}
    if config is text and fields.get("qk_rope_head_dim"):
        fields |= {"head_dim": 16, "num_key_value_heads": SMALL["num_attention_heads"]}
    fields |= {name: sizes.get(name) for name in _TOKENS if name in fields}
    fields["tie_word_embeddings"] = tied
    for name, value in fields.items():
        part = getattr(config, name, None) if isinstance(value, dict) else None
        if isinstance(part, PreTrainedConfig):
            fields[name] = _shrink(part, part if config is text else text, tied, sizes)
        elif isinstance(given.get(name), list) and isinstance(ours.get(name), int):
            count = len(given[name])
            fields[name] = [ours[name]] * (LAYERS if count == depth else count)
        elif isinstance(value, list) and depth and len(value) == depth and name not in ours:
            fields[name] = _layers(value, LAYERS if config is text else 2)
        elif name == "rope_parameters" and config is text and isinstance(value, dict):
            fields[name] = _rotary(value)
    return fields


def _layers(of: list[Any], count: int) -> list[Any]:
    """As many layers of the same kinds: the first ones before the others, or by turns."""
    kinds = [kind for kind, before in zip(of, [None, *of], strict=False) if kind != before]
    if len(kinds) == 2:
        return [kinds[0], *[kinds[1]] * (count - 1)]
    first = list({str(kind): kind for kind in kinds}.values())
    return [first[i % len(first)] for i in range(count)]


def _rotary(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _rotary(value) if isinstance(value, dict) else _ROTARY.get(name, value)
        for name, value in fields.items()
    }


def make_any_checkpoint(directory: Any, architecture: str, seed: int = 0, **sizes: Any) -> Path:
    """Write a random fp32 checkpoint of ``architecture``, without tokenizer or processor.

    Raises ``NotBuilt``.
    """
    cls = transformers_class(architecture)
    try:
        config = small_config(cls.config_class, **sizes)
        with plain_classes(config):
            model = cls._from_config(config, dtype=torch.float32)
    except Exception as error:
        said = " ".join(str(error).split())[:120]
        raise NotBuilt(f"its small configuration fails ({type(error).__name__}: {said})") from error
    text = config.get_text_config()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            parameter.copy_(_weight(name, parameter.shape, text, generator))
    model.save_pretrained(directory, safe_serialization=True)
    return Path(directory)


def _weight(name: str, shape: torch.Size, text: Any, generator: torch.Generator) -> torch.Tensor:
    if text.model_type == "gemma3n_text" and "embed_tokens_per_layer" in name:
        # vLLM's class for texts leaves them out.
        return torch.zeros(shape)
    for turned in (False, True):
        try:
            weight = random_weight(name, _turn(shape) if turned else shape, text, generator)
        except (RuntimeError, IndexError):
            # Of other sizes than the decoder's, or [in, out].
            continue
        if weight.shape == (_turn(shape) if turned else shape):
            return weight.mT if turned else weight
    return torch.randn(shape, generator=generator) / max(shape[-1:], default=1) ** 0.5


def _turn(shape: torch.Size) -> torch.Size:
    return torch.Size([*shape[:-2], *reversed(shape[-2:])])
