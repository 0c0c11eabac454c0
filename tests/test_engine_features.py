"""vLLM features beside memory: each gives the same under two very different schedules."""

import asyncio
import json
from types import SimpleNamespace

import pytest
import torch
from checkpoints import make_prompt
from engines import engine
from fastapi import HTTPException
from oracle import OracleModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from pacellm_vllm.serving import routes

PACE = {
    "preset": "official",
    "layers": [1, 3],
    "bank_size": 23,
    "segment_size": 32,
    "max_insertions": 5,
}
SCHEDULES = (
    {"max_num_batched_tokens": 32, "enable_prefix_caching": False, "max_num_seqs": 2},
    {"max_num_batched_tokens": 512, "enable_prefix_caching": True, "max_num_seqs": 8},
)
PROMPTS = [make_prompt(seed, 100 + 20 * seed) for seed in range(3)]


def under_both(checkpoint, ask, **settings):
    """What ``ask(running)`` gives under each schedule."""
    answers = []
    for schedule in SCHEDULES:
        with engine(checkpoint(), pace=PACE, **{**schedule, **settings}) as running:
            answers.append(ask(running))
            assert running.all_blocks_are_back()
    return answers


def test_penalties_and_allowed_tokens(checkpoint):
    choice = [5, 6, 7]

    def ask(running):
        penalised = running.tokens(PROMPTS, 20, repetition_penalty=1.3, presence_penalty=0.5)
        return penalised, running.tokens(PROMPTS, 40, allowed_token_ids=choice)

    first, second = under_both(checkpoint, ask)
    assert first == second
    assert {token for tokens in first[1] for token in tokens} <= set(choice)


def test_prompts_given_as_embeddings(checkpoint):
    """Cold, and with a bank from the prefix cache."""
    weights = load_file(checkpoint() / "model.safetensors")
    embeddings = weights["model.embed_tokens.weight"]
    prompts = [{"prompt_embeds": embeddings[torch.tensor(prompt)]} for prompt in PROMPTS]
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False)
    with engine(checkpoint(), pace=PACE, enable_prompt_embeds=True) as running:
        truth = running.tokens(PROMPTS, 20)
        for _ in range(2):
            outputs = running.llm.generate(prompts, params, use_tqdm=False)
            assert [list(output.outputs[0].token_ids) for output in outputs] == truth
        assert running.metric("vllm:prefix_cache_hits") > 0
        assert running.all_blocks_are_back()


def make_adapter(directory, checkpoint, rank=4):
    """A random LoRA adapter for every FFN projection."""
    config = AutoConfig.from_pretrained(checkpoint)
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for layer in range(config.num_hidden_layers):
        for name, (inputs, outputs) in {
            "gate_proj": (config.hidden_size, config.intermediate_size),
            "up_proj": (config.hidden_size, config.intermediate_size),
            "down_proj": (config.intermediate_size, config.hidden_size),
        }.items():
            base = f"base_model.model.model.layers.{layer}.mlp.{name}"
            weights[f"{base}.lora_A.weight"] = (
                torch.randn(rank, inputs, generator=generator) * inputs**-0.5
            )
            weights[f"{base}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator) * 0.3
    directory.mkdir()
    save_file(weights, directory / "adapter_model.safetensors")
    adapter = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
        "base_model_name_or_path": str(checkpoint),
        "bias": "none",
    }
    (directory / "adapter_config.json").write_text(json.dumps(adapter))
    return LoRARequest("adapter", 1, str(directory))


def test_lora(checkpoint, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", checkpoint())

    def ask(running):
        params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        # One kind at a time: on CPU, vLLM 0.32 applies an adapter to plain requests that share
        # a step with it, with memory and without.
        return [
            [
                list(output.outputs[0].token_ids)
                for output in running.llm.generate(
                    prompts, params, use_tqdm=False, lora_request=which
                )
            ]
            for which in (None, adapter, None)
        ]

    first, second = under_both(checkpoint, ask, enable_lora=True, max_lora_rank=8)
    assert first == second
    plain, adapted, again = first
    assert plain == again != adapted
    with engine(checkpoint(), pace=PACE) as running:
        assert running.tokens(PROMPTS, 20) == plain


class Extension:
    """Somebody else's worker extension."""

    def answer(self):
        return 42


def test_another_worker_extension_keeps_its_place_and_only_the_report_says_no(checkpoint):
    prompt = PROMPTS[0]
    truth, _ = OracleModel(checkpoint(), PACE).generate(prompt, 20)
    taken = {"worker_extension_cls": f"{__name__}.Extension"}
    with engine(checkpoint(), pace=PACE, **taken) as running:
        assert running.tokens([prompt], 20) == [truth]
        assert running.llm.collective_rpc("answer") == [42]
        config = running.core.vllm_config
    state = SimpleNamespace(
        authorized=lambda headers: True, engine=SimpleNamespace(vllm_config=config)
    )
    app = SimpleNamespace(state=SimpleNamespace(pacellm=state))
    with pytest.raises(HTTPException, match="drop that flag to see the memory") as refusal:
        asyncio.run(routes.memory(SimpleNamespace(app=app, headers={})))
    assert refusal.value.status_code == 501
