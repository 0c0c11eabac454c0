"""Routed experts in the engine: the truth of transformers, in any schedule, with memory."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from checkpoints import make_prompt
from engines import engine, prompt_logprobs
from hf import load_model

from pacellm_vllm.experts import fused
from pacellm_vllm.experts.errors import ExpertsError
from pacellm_vllm.experts.ffn import grouped_output
from pacellm_vllm.experts.rewrite import cluster_checkpoint
from pacellm_vllm.experts.routing import ExpertRouter
from pacellm_vllm.experts.settings import ClusterSettings
from pacellm_vllm.memory.layer import PaceMemory
from pacellm_vllm.models import experts as glue
from pacellm_vllm.models import routed
from pacellm_vllm.models.table import experts_architecture
from pacellm_vllm.serving.report import EXPERTS_METHOD

MEMORY = {"preset": "official", "layers": [1, 3], "segment_size": 32, "bank_size": 16, "alpha": 0.5}
K, TOP_K = 8, 3
ROUTED = {"experts": {"top_k": TOP_K}}
PROMPTS = [make_prompt(seed, 60 + 45 * seed) for seed in range(4)]
TOKENS = 24


@pytest.fixture(scope="module")
def clustered(checkpoint, tmp_path_factory):
    """``clustered(arch)``: the checkpoint as ``pacellm cluster`` writes it."""
    made = {}

    def get(arch="qwen2"):
        if arch not in made:
            folder = tmp_path_factory.mktemp("clustered")
            made[arch] = folder / "out"
            cluster_checkpoint(
                checkpoint(arch),
                made[arch],
                ClusterSettings(K),
                cache=folder / "cache",
                rename=experts_architecture,
                progress=False,
            )
        return made[arch]

    return get


def answers(running):
    """Tokens and prompt log-probabilities."""
    outputs = running.generate(PROMPTS, TOKENS, prompt_logprobs=0)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    return tokens, torch.tensor([v for o in outputs for v in prompt_logprobs(o)])


def run(path, pace, **settings):
    settings.setdefault("max_num_batched_tokens", 64)
    with engine(path, pace=pace, **settings) as running:
        return answers(running)


@pytest.fixture(scope="module")
def truth(clustered):
    """``truth(arch, top_k)``: by transformers, FFNs masked by the centre rule."""

    def routed(mlp, top_k):
        gated = hasattr(mlp, "gate_proj")
        plain = hasattr(mlp, "c_fc")
        first, last = (mlp.c_fc, mlp.c_proj) if plain else (mlp.up_proj, mlp.down_proj)
        act = mlp.act if plain else mlp.act_fn
        gate = (mlp.gate_proj if gated else first).weight
        centres = gate.unflatten(0, (K, -1)).mean(dim=1)
        size = len(gate) // K

        def forward(x):
            a = act(mlp.gate_proj(x)) * first(x) if gated else act(first(x))
            chosen = (x @ centres.T).topk(top_k, dim=-1).indices
            for token in torch.cartesian_prod(*map(torch.arange, x.shape[:2])).tolist():
                for expert in set(range(K)) - set(chosen[tuple(token)].tolist()):
                    a[(*token, slice(expert * size, (expert + 1) * size))] = 0
            return last(a)

        return forward

    made = {}

    def get(arch="qwen2", top_k=TOP_K):
        if (arch, top_k) in made:
            return made[arch, top_k]
        model = load_model(clustered(arch), dtype=torch.float32)
        for layer in model.model.layers:
            layer.mlp.forward = routed(layer.mlp, top_k)
        tokens, logprobs = [], []
        with torch.no_grad():
            for prompt in PROMPTS:
                given = torch.tensor([prompt])
                said = model.generate(given, max_new_tokens=TOKENS, do_sample=False)
                tokens.append(said[0, len(prompt) :].tolist())
                log = model(given).logits[0, :-1].log_softmax(-1)
                logprobs.append(log.gather(1, given[0, 1:, None])[:, 0])
        made[arch, top_k] = tokens, torch.cat(logprobs)
        return made[arch, top_k]

    return get


def assert_same(found, truth):
    assert found[0] == truth[0]
    assert float((found[1] - truth[1]).norm() / truth[1].norm()) <= 1e-5


def emulated_product(x, weights, out, groups, bias, tiles):
    """What vLLM's kernel does with these arguments (``test_experts_fused.py`` runs that one)."""
    pairs, of_tile, count = groups
    rows = out.view(-1, out.shape[-1])
    for first in range(0, int(count), tiles["BLOCK_SIZE_M"]):
        expert = of_tile[first // tiles["BLOCK_SIZE_M"]]
        mine = pairs[first : first + tiles["BLOCK_SIZE_M"]].long()
        mine = mine[mine < len(rows)]
        given = x[mine // len(weights)]
        rows[mine] = torch.nn.functional.linear(
            given, weights[expert], None if bias is None else bias[expert]
        )


@pytest.mark.parametrize(
    ("way", "arch"),
    [
        ("grouped", "qwen2"),
        ("masked", "qwen2"),
        ("fused", "qwen2"),
        ("grouped", "nemotron"),
        ("grouped", "starcoder2"),
    ],
)
def test_a_routed_engine_is_the_routed_model(way, arch, clustered, truth, monkeypatch):
    if way != "grouped":
        monkeypatch.setattr(glue, "way_of", lambda vllm_config: way)
    monkeypatch.setattr(fused, "grouped_product", emulated_product)
    monkeypatch.setattr(fused, "FEW_TOKENS", 0)
    expected = truth(arch)
    with engine(clustered(arch), ROUTED, max_num_batched_tokens=64) as running:
        assert_same(answers(running), expected)
        [report] = running.llm.collective_rpc(EXPERTS_METHOD)
    assert list(report) == [0, 1, 2, 3]
    # The last token of an answer is not read again.
    tokens = sum(map(len, PROMPTS)) + len(PROMPTS) * (TOKENS - 1)
    for counts in report.values():
        assert counts == {"num_experts": K, "way": way, "tokens": tokens, "share": TOP_K / K}


def test_all_experts_are_the_dense_model(clustered, truth):
    dense = truth(top_k=K)
    assert dense[0] != truth()[0]
    assert_same(run(clustered(), {"experts": {"top_k": K}}), dense)


@pytest.fixture(scope="module")
def alone(clustered):
    """One request at a time with memory: its answers, and by memory layer which experts were not
    zero for each token.
    """
    seen = []

    def forward(self, a):
        seen.append(a.unflatten(-1, (K, -1)).abs().sum(-1) > 0)
        return real(self, a)

    real = PaceMemory.forward
    with (
        pytest.MonkeyPatch.context() as patch,
        engine(clustered(), pace={**MEMORY, **ROUTED}, max_num_seqs=1) as running,
    ):
        patch.setattr(PaceMemory, "forward", forward)
        return answers(running), {1: torch.cat(seen[::2]), 3: torch.cat(seen[1::2])}


def test_any_schedule_gives_the_same_tokens_with_memory_on(alone, clustered):
    for chunk, seqs, caching in [(17, 2, False), (512, 8, True)]:
        settings = {"max_num_batched_tokens": chunk, "max_num_seqs": seqs}
        settings["enable_prefix_caching"] = caching
        with engine(clustered(), pace={**MEMORY, **ROUTED}, **settings) as running:
            assert running.tokens(PROMPTS[::-1], TOKENS)[::-1] == alone[0][0]
            assert running.tokens(PROMPTS, TOKENS) == alone[0][0]


def test_memory_sees_zeros_where_experts_were_skipped(alone):
    for active in alone[1].values():
        assert len(active) == sum(map(len, PROMPTS)) + len(PROMPTS) * (TOKENS - 1)
        assert torch.equal(active.sum(-1), torch.full((len(active),), TOP_K))


def check_experts(running, output, active, cached=0):
    """``active`` [tokens, K] of one request against what it is told of a layer."""
    for layer, rows in active.items():
        asked = (output.request_id, layer)
        [found] = running.llm.collective_rpc("pacellm_answer_experts", args=asked)
        assert found["layers"] == [0, 1, 2, 3]
        assert found["num_experts"] == K
        # K is 8: two digits a token.
        told = [f"{byte:08b}" for byte in bytes.fromhex(found["chosen"])]
        assert told[:cached] == ["0" * K] * cached
        assert told[cached:] == ["".join("01"[one] for one in row) for row in rows[cached:].int()]
        assert found["tokens"] == rows[cached:].sum(0).tolist()


def test_a_request_is_told_its_tokens_experts(alone, clustered):
    lengths = [len(prompt) + TOKENS - 1 for prompt in PROMPTS]
    truth = {layer: active.split(lengths) for layer, active in alone[1].items()}
    mine = [{layer: parts[i] for layer, parts in truth.items()} for i in range(len(PROMPTS))]
    report = {"pacellm_report": True}
    settings = {"max_num_batched_tokens": 17, "max_num_seqs": 2}
    with engine(clustered(), pace={**MEMORY, **ROUTED}, **settings) as running:
        outputs = running.generate(PROMPTS, TOKENS, extra_args=report)
        for output, active in zip(outputs, mine, strict=True):
            check_experts(running, output, active)
        [warm] = running.generate(PROMPTS[-1:], TOKENS, extra_args=report)
        assert warm.num_cached_tokens > 0
        check_experts(running, warm, mine[-1], warm.num_cached_tokens)
        [quiet] = running.generate(PROMPTS[:1], TOKENS)
        for request_id in (quiet.request_id, "never"):
            [found] = running.llm.collective_rpc("pacellm_answer_experts", args=(request_id, 1))
            assert found is None


def test_two_ranks_choose_and_compute_what_one_does(alone, clustered):
    pace = {**MEMORY, **ROUTED}
    assert_same(run(clustered(), pace, tensor_parallel_size=2), alone[0])


def test_the_bias_of_an_output_that_ranks_add_up_is_there_once():
    generator = torch.Generator().manual_seed(0)
    inputs, down, bias, x = (
        torch.randn(*shape, generator=generator) for shape in ((12, 5), (5, 12), (5,), (3, 5))
    )
    chosen, total = torch.ones(3, 2, dtype=torch.bool), torch.zeros(3, 5)
    for rank, mine in enumerate((slice(6), slice(6, 12))):
        ffn = SimpleNamespace(
            input=SimpleNamespace(weight=inputs[mine], bias=None),
            output=SimpleNamespace(weight=down[:, mine], bias=bias, tp_rank=rank),
            activation=torch.relu,
        )
        total += grouped_output(x, routed._weights(ffn), chosen)
    torch.testing.assert_close(total, torch.relu(x @ inputs.T) @ down.T + bias)


def test_mass_in_another_schedule_and_what_the_report_says_of_it(clustered, monkeypatch):
    pace = {**MEMORY, "experts": {"mass": 0.7}}
    with engine(clustered(), pace=pace, max_num_seqs=1) as running:
        alone = running.tokens(PROMPTS)
    chosen = []

    def choose(self, x):
        chosen.append(real(self, x))
        return chosen[-1]

    real = ExpertRouter.choose
    with engine(clustered(), pace=pace, max_num_batched_tokens=17, max_num_seqs=2) as running:
        monkeypatch.setattr(ExpertRouter, "choose", choose)
        assert running.tokens(PROMPTS[::-1])[::-1] == alone
        [report] = running.llm.collective_rpc(EXPERTS_METHOD)
    for layer in range(4):
        mine = torch.cat(chosen[layer::4])
        assert report[layer]["tokens"] == len(mine)
        assert report[layer]["share"] == pytest.approx(float(mine.float().mean()))
        assert 0.2 < report[layer]["share"] < 0.9


@pytest.mark.parametrize(
    ("theirs", "agree"),
    [
        ({0: [0, 1, 2], 3: None}, True),
        ({0: [0, 2, 1], 3: None}, False),
        ({1: [0, 1, 2], 3: None}, False),
        ({0: [0, 1, 2]}, False),
    ],
    ids=["alike", "other order", "other layer", "fewer layers"],
)
def test_ranks_that_clustered_to_different_orders_are_refused(theirs, agree, monkeypatch):
    said = []

    def gather(found, mine, group):
        said.append(mine)
        found[:] = [said[0], mine]

    monkeypatch.setattr(glue, "get_tensor_model_parallel_world_size", lambda: 2)
    group = SimpleNamespace(world_size=2, cpu_group=None)
    monkeypatch.setattr(glue, "get_tp_group", lambda: group)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    mine, theirs = (
        {layer: order and torch.tensor(order) for layer, order in orders.items()}
        for orders in ({0: [0, 1, 2], 3: None}, theirs)
    )
    glue.check_agreement(mine)
    with nullcontext() if agree else pytest.raises(ExpertsError, match="to different orders"):
        glue.check_agreement(theirs)
