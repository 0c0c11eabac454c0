"""Random models of many families, for what only looks at FFNs."""

import torch
from hf import plain_classes
from transformers import AutoConfig, AutoModelForCausalLM

NEURONS = 96


def tiny_model(arch, seed=0, **sizes):
    """A random model of three layers whose biases and norms are not zero and one."""
    settings = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    if arch == "gpt2":
        settings |= {"n_inner": NEURONS}
    elif arch == "opt":
        settings |= {"ffn_dim": NEURONS, "word_embed_proj_dim": 32}
    else:
        settings |= {"intermediate_size": NEURONS, "num_key_value_heads": 1}
    if arch in ("llama", "nemotron"):
        settings |= {"mlp_bias": True}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(arch, **{**settings, **sizes})
    with plain_classes(config):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.3 if parameter.ndim > 1 else 0.5))
    return model.eval()
