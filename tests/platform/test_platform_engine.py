"""vLLM's engine on the CPU platform against Hugging Face, token for token.

The engine runs in a process of its own (this file as a script): a worker leaves process-wide
settings behind.
"""

import json
import os
import random
import subprocess
import sys

import pytest

NEW_TOKENS = 40
VOCAB = 199


def prompts():
    rng = random.Random(0)
    shared = [rng.randrange(3, VOCAB) for _ in range(150)]
    return [
        shared[: n // 2] + [rng.randrange(3, VOCAB) for _ in range(n - n // 2)]
        for n in (3, 150, 64, 65, 17, 131, 99)
    ]


def make_checkpoint(family, path):
    import torch
    from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    common = {
        "vocab_size": VOCAB,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    if family == "qwen2":  # grouped queries, biases
        model = Qwen2ForCausalLM(Qwen2Config(**common))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    else:  # soft-capped logits, every second layer with a sliding window
        common["tie_word_embeddings"] = True
        config = Gemma2Config(
            **common,
            head_dim=16,
            sliding_window=24,
            attn_logit_softcapping=3.0,
            query_pre_attn_scalar=16,
            attn_implementation="eager",
        )
        model = Gemma2ForCausalLM(config)
        # Shrunk embeddings: with tied ones of full size, generation echoes its last token.
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.02)
    model.eval().save_pretrained(path)
    return model


def hugging_face_tokens(model):
    import torch

    tokens = []
    for prompt in prompts():
        generated = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            eos_token_id=None,
            pad_token_id=0,
        )
        tokens.append(generated[0, len(prompt) :].tolist())
    return tokens


# The blocks hold one request of full length and a little more, not the batch.
@pytest.mark.parametrize(
    ("family", "layout", "block_size", "blocks"),
    [("qwen2", None, 16, 18), ("qwen2", "BLHNC", 32, 11), ("gemma2", "BLHNC", 16, 32)],
)
def test_engine_gives_the_tokens_of_hugging_face(family, layout, block_size, blocks, tmp_path):
    model = make_checkpoint(family, tmp_path)
    env = dict(os.environ, VLLM_ENABLE_V1_MULTIPROCESSING="0", OMP_NUM_THREADS="1")
    env.pop("VLLM_KV_CACHE_LAYOUT", None)
    if layout:
        env["VLLM_KV_CACHE_LAYOUT"] = layout
    answer = tmp_path / "answer.json"
    run = subprocess.run(
        [sys.executable, __file__, str(tmp_path), str(block_size), str(blocks), str(answer)],
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(answer.read_text())
    assert found["platform"] == "TorchCpuPlatform"
    assert found["layout"] == (layout or "LBHNC")
    want = hugging_face_tokens(model)
    assert len({token for row in want for token in row}) > 20  # not one token over and over
    for tokens in found["rounds"]:
        assert tokens == want
    assert found["vllm:num_preemptions"] > 0
    assert found["vllm:prefix_cache_hits"] > 0


def main(checkpoint, block_size, blocks, answer):
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    llm = LLM(
        model=checkpoint,
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=224,
        max_num_batched_tokens=64,
        max_num_seqs=8,
        block_size=block_size,
        num_gpu_blocks_override=blocks,
        enable_prefix_caching=True,
        kv_cache_memory_bytes=64 << 20,
        disable_log_stats=False,
    )
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts()]
    rounds = [
        [list(out.outputs[0].token_ids) for out in llm.generate(inputs, params, use_tqdm=False)]
        for _ in range(2)
    ]
    found = {
        "platform": type(current_platform).__name__,
        "layout": llm.llm_engine.vllm_config.cache_config.kv_cache_layout,
        "rounds": rounds,
    }
    for metric in llm.get_metrics():
        if metric.name in ("vllm:num_preemptions", "vllm:prefix_cache_hits"):
            found[metric.name] = metric.value
    with open(answer, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
