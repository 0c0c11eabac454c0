"""Routed experts in the engine: the truth of transformers, in any schedule, with memory."""

import pytest
import torch
from checkpoints import make_prompt
from engines import engine, prompt_logprobs
from transformers import AutoModelForCausalLM

from pacellm_vllm.experts.rewrite import cluster_checkpoint
from pacellm_vllm.experts.settings import ClusterSettings
from pacellm_vllm.memory.layer import PaceMemory
from pacellm_vllm.models import experts as glue
from pacellm_vllm.models.table import pace_architecture

MEMORY = {"layers": [1, 3], "segment_size": 32, "bank_size": 16, "alpha": 0.5}
K, TOP_K = 8, 3
ROUTED = {"experts": {"top_k": TOP_K}}
PROMPTS = [make_prompt(seed, 60 + 45 * seed) for seed in range(4)]


@pytest.fixture(scope="module")
def clustered(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clustered")
    cluster_checkpoint(
        checkpoint(),
        folder / "out",
        ClusterSettings(K),
        cache=folder / "cache",
        rename=pace_architecture,
        progress=False,
    )
    return folder / "out"


def run(path, pace, **settings):
    settings.setdefault("max_num_batched_tokens", 64)
    with engine(path, pace=pace, **settings) as running:
        outputs = running.generate(PROMPTS, 24, prompt_logprobs=0)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    return tokens, torch.tensor([v for o in outputs for v in prompt_logprobs(o)])


@pytest.fixture(scope="module")
def truth(clustered):
    """Tokens and prompt log-probabilities by transformers, FFNs masked by the centre rule."""
    model = AutoModelForCausalLM.from_pretrained(clustered, dtype=torch.float32).eval()

    def routed(mlp):
        gate = mlp.gate_proj.weight
        centres = gate.unflatten(0, (K, -1)).mean(dim=1)
        size = len(gate) // K

        def forward(x):
            a = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
            chosen = (x @ centres.T).topk(TOP_K, dim=-1).indices
            for token in torch.cartesian_prod(*map(torch.arange, x.shape[:2])).tolist():
                for expert in set(range(K)) - set(chosen[tuple(token)].tolist()):
                    a[(*token, slice(expert * size, (expert + 1) * size))] = 0
            return mlp.down_proj(a)

        return forward

    for layer in model.model.layers:
        layer.mlp.forward = routed(layer.mlp)
    tokens, logprobs = [], []
    with torch.no_grad():
        for prompt in PROMPTS:
            said = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
            tokens.append(said[0, len(prompt) :].tolist())
            log = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
            logprobs.append(log.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0])
    return tokens, torch.cat(logprobs)


def assert_same(found, truth):
    assert found[0] == truth[0]
    assert float((found[1] - truth[1]).norm() / truth[1].norm()) <= 1e-5


@pytest.mark.parametrize("grouped", [True, False])
def test_a_routed_engine_is_the_routed_model(grouped, clustered, truth, monkeypatch):
    if not grouped:
        monkeypatch.setattr(glue, "TorchCpuPlatform", type(None))
        monkeypatch.setattr(glue, "grouped_output", None)
    found = run(clustered, ROUTED)
    assert_same(found, truth)


def test_all_experts_are_the_dense_model(clustered, truth):
    dense = run(clustered, None)
    assert dense[0] != truth[0]
    assert_same(run(clustered, {"experts": {"top_k": K}}), dense)


@pytest.mark.parametrize("experts", [{"top_k": TOP_K}, {"mass": 0.7}], ids=["top_k", "mass"])
def test_any_schedule_gives_the_same_tokens_with_memory_on(experts, clustered):
    pace = {**MEMORY, "experts": experts}
    schedules = [(17, 2, False), (512, 8, True)][: 2 if "top_k" in experts else 1]
    with engine(clustered, pace=pace, max_num_seqs=1) as running:
        alone = running.tokens(PROMPTS)
    for chunk, seqs, caching in schedules:
        settings = {"max_num_batched_tokens": chunk, "max_num_seqs": seqs}
        with engine(clustered, pace=pace, enable_prefix_caching=caching, **settings) as running:
            assert running.tokens(PROMPTS[::-1])[::-1] == alone
            assert running.tokens(PROMPTS) == alone


def test_memory_sees_zeros_where_experts_were_skipped(clustered, monkeypatch):
    seen = []

    def forward(self, a):
        seen.append(a.unflatten(-1, (K, -1)).abs().sum(-1) > 0)
        return real(self, a)

    real = PaceMemory.forward
    monkeypatch.setattr(PaceMemory, "forward", forward)
    with engine(clustered, pace={**MEMORY, **ROUTED}) as running:
        running.tokens(PROMPTS[:1], 2)
    active = torch.cat(seen[-6:])
    assert active.shape[0] > len(PROMPTS[0])
    assert torch.equal(active.sum(-1), torch.full((len(active),), TOP_K))


def test_two_ranks_choose_and_compute_what_one_does(clustered):
    pace = {**MEMORY, **ROUTED}
    assert_same(run(clustered, pace, tensor_parallel_size=2), run(clustered, pace))
