"""Experts in the engine: stored or made while loading, the model stays what it was (I2)."""

import shutil

import pytest
import torch
from checkpoints import make_checkpoint, make_prompt
from engines import architecture, engine, prompt_logprobs
from transformers import AutoModelForCausalLM

from pacellm_vllm.experts import cache
from pacellm_vllm.experts.orders import EXPERTS_ORDERS
from pacellm_vllm.experts.rewrite import cluster_checkpoint
from pacellm_vllm.experts.settings import ClusterSettings
from pacellm_vllm.models.table import experts_architecture

MEMORY = {"preset": "official", "layers": [1, 3], "segment_size": 32, "bank_size": 16, "alpha": 0.5}
K = 8


@pytest.fixture(scope="module", autouse=True)
def one_cache(tmp_path_factory):
    """Orders made here are kept here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def clustered(checkpoint, tmp_path_factory):
    """``clustered(arch)``: the checkpoint, in two shards, as ``pacellm cluster`` writes it."""
    made = {}

    def get(arch="qwen2"):
        if arch not in made:
            made[arch] = tmp_path_factory.mktemp("clustered") / arch
            source = tmp_path_factory.mktemp("sharded")
            model = AutoModelForCausalLM.from_pretrained(checkpoint(arch), dtype=torch.float32)
            half = sum(p.nbytes for p in model.parameters()) // 2
            model.save_pretrained(source, max_shard_size=half + half // 8)
            assert len(list(source.glob("model-*.safetensors"))) == 2
            cluster_checkpoint(
                source,
                made[arch],
                ClusterSettings(K),
                rename=experts_architecture,
                progress=False,
            )
        return made[arch]

    return get


@pytest.fixture(scope="module")
def run():
    """``generate``, once for the same engine."""
    made = {}

    def get(*args, **kwargs):
        key = repr((args, kwargs))
        if key not in made:
            made[key] = generate(*args, **kwargs)
        return made[key]

    return get


def generate(path, pace=None, plain=False, **settings):
    """Greedy tokens, and the log-probabilities of all prompt tokens as one vector."""
    if plain:
        settings["hf_overrides"] = {"architectures": [architecture(path)]}
    prompts = [make_prompt(seed, 90 + 40 * seed) for seed in range(3)]
    settings.setdefault("max_num_batched_tokens", 64)
    with engine(path, pace, **settings) as running:
        outputs = running.generate(prompts, 24, prompt_logprobs=0)
        gates = {
            int(name.split(".")[2]): module.weight.clone() for name, module in weights_of(running)
        }
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    return tokens, torch.tensor([v for o in outputs for v in prompt_logprobs(o)]), gates


def weights_of(running):
    driver = getattr(running.core.model_executor, "driver_worker", None)
    if driver is None:  # Several ranks, in processes of their own.
        return []
    modules = driver.worker.model_runner.model.named_modules()
    return [(n, m) for n, m in modules if n.endswith(("mlp.gate_up_proj", "mlp.up_proj"))]


def assert_same(found, truth):
    assert found[0] == truth[0]
    assert float((found[1] - truth[1]).norm() / truth[1].norm()) <= 1e-5


@pytest.mark.parametrize("arch", ["phi3", "nemotron"])
def test_i2_experts_in_any_way_leave_the_model_what_it_was(arch, run, checkpoint, clustered):
    """Clustered before, by stored orders, and while loading; gate and up in one tensor, no gate."""
    truth = run(checkpoint(arch))
    stored = run(clustered(arch))
    ways = [{"num_experts": K}, {"path": str(clustered(arch))}][: 2 if arch == "phi3" else 1]
    loaded = [run(checkpoint(arch), {"experts": experts}) for experts in ways]
    for found in (stored, *loaded):
        assert_same(found, truth)
        # All are in one order, which is not the original one.
        for layer, gate in found[2].items():
            assert not torch.equal(gate, truth[2][layer])
            assert torch.equal(gate, stored[2][layer])


def test_i2_with_memory_on_as_well(run, checkpoint, clustered):
    plain = run(checkpoint())
    truth = run(checkpoint(), pace=MEMORY)
    assert truth[0] != plain[0]
    assert_same(run(clustered(), pace=MEMORY), truth)
    assert_same(run(checkpoint(), pace={**MEMORY, "experts": {"num_experts": K}}), truth)


@pytest.mark.parametrize("how", ["stored", "made by one rank, awaited by the other"])
def test_i2_on_two_ranks(how, run, checkpoint, clustered):
    truth = run(checkpoint(), pace=MEMORY)
    # A seed of its own: nothing is in the cache yet.
    experts = {"path": str(clustered())} if how == "stored" else {"num_experts": K, "seed": 9}
    pace = {**MEMORY, "experts": experts}
    assert_same(run(checkpoint(), pace=pace, tensor_parallel_size=2), truth)


def test_a_clustered_checkpoint_needs_no_flag_and_has_no_memory(run, checkpoint, clustered):
    with engine(clustered()) as running:
        model = running.core.vllm_config.model_config
        assert model.architecture == "PaceQwen2ForCausalLM"
        assert running.memories() == {}
    assert_same(run(clustered(), plain=True), run(checkpoint()))


def test_only_the_layers_with_experts_move(run, checkpoint):
    gates = run(checkpoint())[2]
    found = run(checkpoint(), pace={"experts": {"num_experts": K, "layers": [2, 0]}})[2]
    assert [i for i in gates if not torch.equal(gates[i], found[i])] == [0, 2]


def test_the_order_is_the_commands_and_made_once(checkpoint, clustered, monkeypatch):
    clustered()
    monkeypatch.setattr(cache, "cluster", None)
    generate(checkpoint(), pace={"experts": {"num_experts": K}})
    with pytest.raises(TypeError):
        generate(checkpoint(), pace={"experts": {"num_experts": K, "seed": 1}})


def refused(path, pace, **settings):
    with (
        pytest.raises((ValueError, RuntimeError), match="pacellm") as refusal,
        engine(path, pace=pace, **settings),
    ):
        pass
    return str(refusal.value)


def test_experts_of_another_model_are_refused(checkpoint, clustered, tmp_path):
    stored = {"experts": {"path": str(clustered())}}
    other = make_checkpoint(tmp_path / "other", "qwen2", seed=1)
    assert "is for another model: its layer 0 was made from other gate weights" in refused(
        other, stored
    )
    wider = make_checkpoint(tmp_path / "wider", "qwen2", intermediate_size=352)
    assert "has 344 neurons, this model's have 352" in refused(wider, stored)
    shallow = make_checkpoint(tmp_path / "shallow", "qwen2", num_hidden_layers=2)
    assert "has orders for layer 2, this model has layers 0 to 1" in refused(shallow, stored)
    swapped = tmp_path / "swapped"
    shutil.copytree(clustered(), swapped)
    shutil.copy(clustered("phi3") / EXPERTS_ORDERS, swapped / EXPERTS_ORDERS)
    assert "is not the one that pacellm_experts.json describes" in refused(
        checkpoint(), {"experts": {"path": str(swapped)}}
    )
    (swapped / EXPERTS_ORDERS).unlink()
    assert "the order of layer 0 cannot be read" in refused(
        checkpoint(), {"experts": {"path": str(swapped)}}
    )


@pytest.mark.parametrize(
    ("experts", "settings", "sentence"),
    [
        ({"num_experts": 10}, {}, "does not split 344 neurons into equal experts; 8 or 43 would"),
        ({"path": "/nowhere/at/all"}, {}, "is neither a directory nor a hub model"),
        (
            {"num_experts": 8, "layers": [4]},
            {},
            "layers = 4 is not allowed; it must be one of",
        ),
        ({"num_experts": 8}, {"load_format": "dummy"}, "do not work with --load-format dummy"),
        ({"num_experts": 8}, {"quantization": "fp8"}, "quantised weights (fp8)"),
        ({"num_experts": 8}, {"enable_lora": True}, "do not work with LoRA: an adapter"),
        ({"num_experts": 8}, {"pipeline_parallel_size": 2}, "with pipeline parallelism: loading"),
        (
            {"num_experts": 8},
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "do not work with speculative decoding: drafts have",
        ),
        (
            {"num_experts": 8},
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "do not work with KV transfer: no connector checks",
        ),
        (
            {"num_experts": 8},
            {"weight_transfer_config": {"backend": "nccl"}},
            "do not work with weight transfer: weights come a tensor at a time",
        ),
        (
            {"num_experts": 43},
            {"tensor_parallel_size": 2},
            "43 experts cannot be spread whole over 2 tensor parallel ranks; "
            "--tensor-parallel-size 1 can",
        ),
    ],
)
def test_what_does_not_fit_is_refused(experts, settings, sentence, checkpoint):
    assert sentence in refused(checkpoint(), {"experts": experts}, **settings)


def test_a_folder_without_experts_and_a_top_k_above_them_are_refused(checkpoint, clustered):
    assert "has no pacellm_experts.json" in refused(
        checkpoint(), {"experts": {"path": str(checkpoint())}}
    )
    said = refused(clustered(), {"experts": {"top_k": 9}})
    assert "experts.top_k = 9 is not allowed; it must be from 1 to 8" in said


def test_settings_of_the_memory_beside_experts_need_layers(clustered):
    assert "bank_size = 50 is a setting of the memory" in refused(clustered(), {"bank_size": 50})
