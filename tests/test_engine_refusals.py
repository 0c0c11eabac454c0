"""What is not supported stops at start-up with one sentence."""

import json
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from checkpoints import make_prompt
from engines import NATIVE, engine
from oracle import Bank, MemoryRules
from transformers import Mamba2Config
from vllm import SamplingParams
from vllm.config import LoRAConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from pacellm_vllm.config import PaceConfig, PaceConfigError
from pacellm_vllm.models import checks
from pacellm_vllm.models.checks import check_engine, growth, refuse_configuration
from pacellm_vllm.plugin import _check_not_configured

NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
PACE = {"layers": [1, 3], "segment_size": 32}


@pytest.mark.parametrize(
    ("pace", "sentence"),
    [
        ({"bank_sise": 5}, "unknown field 'bank_sise' = 5; the fields are layers, preset"),
        ({"layers": [99]}, "layers = 99 is not allowed; it must be from 0 to 3 for this model."),
        ({"bank_size": 0}, "bank_size = 0 is not allowed; it must be an integer from 1 to 1024."),
        (
            {"theta_low": 0.8},
            "theta_low = 0.8 is not allowed; it must be at most theta_high = 0.75",
        ),
    ],
)
def test_bad_settings(pace, sentence, checkpoint):
    with pytest.raises(ValueError, match="pacellm") as refusal, engine(checkpoint(), pace=pace):
        pass
    assert sentence in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"speculative_config": NGRAM, "pipeline_parallel_size": 2},
            "speculative decoding like this: drafts have not been tested across stages",
        ),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "does not work with KV transfer: tokens computed elsewhere carry no memory",
        ),
        (
            {"kv_offloading_size": 1},
            "does not work with KV offloading: attention's blocks would come back",
        ),
        (
            {"kv_sharing_fast_prefill": True},
            "does not work with fast prefill: layers that share caches compute the last tokens",
        ),
        ({"runner": "pooling", "convert": "embed"}, "does not work with the pooling runner"),
    ],
)
def test_unsupported_features(settings, sentence, checkpoint):
    with (
        pytest.raises(ValueError, match="pacellm") as refusal,
        engine(checkpoint(), pace=PACE, **settings),
    ):
        pass
    assert sentence in str(refusal.value)


@pytest.mark.parametrize("pace", [PACE, {"experts": {"num_experts": 4}}])
def test_a_front_end_that_would_check_nothing(pace, checkpoint, monkeypatch):
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with (
        pytest.raises(ValueError, match="pacellm") as refusal,
        engine(checkpoint(), pace=pace),
    ):
        pass
    assert "does not work with vLLM's Rust front end" in str(refusal.value)


def test_memory_for_an_architecture_without_it_is_no_silent_no_op(checkpoint):
    with (
        pytest.raises(ValueError, match="pacellm") as refusal,
        engine(checkpoint(), additional_config={"pacellm": PACE}),
    ):
        pass
    assert 'add --hf-overrides \'{"architectures": ["PaceQwen2ForCausalLM"]}\'' in str(
        refusal.value
    )


@pytest.mark.parametrize(
    ("architecture", "sentence"),
    [
        ("Step3TextForCausalLM", "its FFNs are sums of several modules"),
        ("DeepseekV32ForCausalLM", "vLLM has attention and caches of its own for it"),
        ("BertModel", "pacellm serves what generates text"),
    ],
)
def test_an_architecture_that_does_not_fit_is_refused_with_its_reason(architecture, sentence):
    config = SimpleNamespace(
        model_config=SimpleNamespace(architecture=architecture),
        additional_config={"pacellm": PACE},
    )
    with pytest.raises(PaceConfigError, match="carries neither memory nor experts") as refusal:
        refuse_configuration(config)
    assert sentence in str(refusal.value)


def test_a_model_without_attention_is_refused(tmp_path):
    config = Mamba2Config(num_hidden_layers=2, hidden_size=64, num_heads=4, head_dim=32, n_groups=1)
    config.architectures = ["PaceMamba2ForCausalLM"]
    config.save_pretrained(tmp_path)
    with (
        pytest.raises(ValueError, match="pacellm") as refusal,
        engine(tmp_path, load_format="dummy"),
    ):
        pass
    assert "a model without attention: those that vLLM has are recurrent" in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"speculative_config": NGRAM}, "drafts have not been tested with recurrent layers"),
        ({"pipeline_parallel_size": 2}, "does not work with recurrent layers in pipeline stages"),
    ],
)
def test_features_that_recurrent_layers_leave_out(settings, sentence, checkpoint):
    with (
        pytest.raises(ValueError, match="pacellm") as refusal,
        engine(checkpoint("lfm2"), pace=PACE, **settings),
    ):
        pass
    assert sentence in str(refusal.value)


@pytest.mark.parametrize(("segment_size", "on"), [(64, True), (40, False)])
def test_prefix_caching_beside_recurrent_layers_takes_segments_of_whole_blocks(
    segment_size, on, checkpoint
):
    pace = {**PACE, "segment_size": segment_size}
    with engine(checkpoint("lfm2"), pace) as running:
        cache = running.core.vllm_config.cache_config
        assert (cache.enable_prefix_caching, cache.mamba_cache_mode) == (
            on,
            "align" if on else "none",
        )


@pytest.fixture
def no_weights(monkeypatch):
    """A refusal that comes when weights are loaded, or later, is another error."""

    def load_weights(*_):
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(DefaultModelLoader, "load_weights", load_weights)


@pytest.mark.usefixtures("no_weights")
def test_blocks_that_a_state_makes_larger_than_segments_are_refused(checkpoint):
    with (
        pytest.raises(ValueError, match="pacellm") as refusal,
        engine(checkpoint("granitemoehybrid"), PACE),
    ):
        pass
    assert "it must be a multiple of the KV block size" in str(refusal.value)


@pytest.mark.skipif(not NATIVE, reason="the PyTorch platform has a latent attention of its own")
def test_latent_attention_on_vllms_own_cpu_build_is_refused(checkpoint):
    with (
        pytest.raises(ValueError, match="pacellm") as refusal,
        engine(checkpoint("deepseek_v2"), {**PACE, "site": "output"}),
    ):
        pass
    assert "(MLA) on vLLM's own CPU build: its kernels want" in str(refusal.value)


def test_a_device_that_was_never_compiled_for_is_refused(checkpoint, monkeypatch):
    """As ROCm, whose device vLLM calls cuda, and XPU."""
    monkeypatch.setattr(type(checks.current_platform), "is_cpu", lambda platform: False)
    with (
        pytest.raises(ValueError, match="pacellm") as refusal,
        engine(checkpoint(), PACE),
    ):
        pass
    assert "does not work with a device like this: its kernels are built for CUDA" in str(
        refusal.value
    )


def test_what_was_not_compared_is_served_with_a_warning():
    sentence = checks.not_compared("PaceBailingMoeForCausalLM")
    assert sentence.startswith("pacellm: memory in BailingMoeForCausalLM was not compared")
    assert checks.not_compared("PaceTransformersForCausalLM") is not None
    for like_one_that_was in ("PaceMixtralForCausalLM", "PaceInternLM3ForCausalLM"):
        assert checks.not_compared(like_one_that_was) is None


@pytest.mark.usefixtures("no_weights")
def test_a_layer_compact_kv_layout_is_refused(checkpoint, monkeypatch):
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "LBHNC")
    with (
        pytest.raises(ValueError, match="pacellm: VLLM_KV_CACHE_LAYOUT=LBHNC"),
        engine(checkpoint(), pace=PACE),
    ):
        pass


def test_a_checkpoint_that_names_the_architecture_needs_no_flag(checkpoint, tmp_path):
    named = tmp_path / "named"
    shutil.copytree(checkpoint(), named)
    config = json.loads((named / "config.json").read_text())
    config |= {"architectures": ["PaceQwen2ForCausalLM"], "pacellm": {"preset": "paper", **PACE}}
    (named / "config.json").write_text(json.dumps(config))
    prompts = [make_prompt(1, 100)]
    with engine(named) as running:
        assert list(running.memories()) == [1, 3]
        by_file = running.tokens(prompts)
    with engine(checkpoint(), pace={"preset": "paper", **PACE}) as running:
        assert running.tokens(prompts) == by_file
    with engine(named, additional_config={"pacellm": {"layers": [2]}}) as running:
        assert list(running.memories()) == [2]


def engine_config(path, pace=PACE, architecture="PaceQwen2ForCausalLM", **settings):
    overrides = {"architectures": [architecture]}
    settings |= {"skip_tokenizer_init": True, "additional_config": {"pacellm": pace}}
    return EngineArgs(str(path), hf_overrides=overrides, **settings).create_engine_config()


def test_other_drafts_on_a_gpu_or_with_asynchronous_scheduling_are_refused(checkpoint, monkeypatch):
    config = engine_config(checkpoint(), speculative_config=NGRAM)
    check_engine(config)
    config.scheduler_config.async_scheduling = True
    with pytest.raises(PaceConfigError, match="pass --no-async-scheduling"):
        check_engine(config)
    config.scheduler_config.async_scheduling = False
    gpu = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: True)
    monkeypatch.setattr(checks, "current_platform", gpu)
    with pytest.raises(PaceConfigError, match="drafts have been tested on the CPU only"):
        check_engine(config)
    config.speculative_config = SimpleNamespace(method="eagle")
    with pytest.raises(PaceConfigError, match="only n-gram drafts have been tested, not eagle"):
        check_engine(config)


@pytest.mark.parametrize(
    ("pace", "warned"),
    [
        ({}, False),
        ({"preset": "official"}, True),
        ({"preset": "paper"}, True),
        ({"noise": 0.05}, False),
        ({"noise": 0.05, "clip": False}, True),
        ({"preset": "official", "clip": True}, False),
        ({"preset": "official", "noise": 0}, False),
        ({"preset": "official", "negative_k": 0}, False),
        ({"preset": "official", "alpha": 0}, False),
    ],
)
def test_noise_is_served_with_a_warning(pace, warned, checkpoint, monkeypatch):
    said = []
    monkeypatch.setattr(checks.logger, "warning", said.append)
    check_engine(engine_config(checkpoint(), {**PACE, **pace}))
    # Creating the configuration checks it once, too.
    assert len({*said}) == warned
    if warned:
        [sentence] = {*said}
        assert sentence.startswith("pacellm: noise = ")
        assert "SmolLM2-135M" in sentence
        assert "preset gentle" in sentence


def test_stages_on_model_runner_v2_are_refused(checkpoint, monkeypatch):
    config = engine_config(checkpoint(), pipeline_parallel_size=2)
    check_engine(config)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(PaceConfigError, match="pipeline parallelism on model runner V2"):
        check_engine(config)


def test_batch_invariance_on_model_runner_v2_is_refused(checkpoint, monkeypatch):
    config = engine_config(checkpoint())
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    check_engine(config)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(PaceConfigError, match="batch-invariant mode on model runner V2: it wants"):
        check_engine(config)


def test_recurrent_layers_on_model_runner_v2_are_refused(checkpoint, monkeypatch):
    config = engine_config(checkpoint("lfm2"), architecture="PaceLfm2ForCausalLM")
    check_engine(config)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(PaceConfigError, match="recurrent layers on model runner V2: it does not"):
        check_engine(config)


def test_adapters_of_interleaved_experts_are_refused(checkpoint):
    config = engine_config(checkpoint("gpt_oss"), architecture="PaceGptOssForCausalLM")
    check_engine(config)
    config.lora_config = LoRAConfig()
    config.additional_config = {"pacellm": {"layers": [], "session_tokens": 1000}}
    with pytest.raises(PaceConfigError, match="does not work with LoRA on gpt-oss: vLLM knows by"):
        check_engine(config)


def test_an_architecture_that_vllm_puts_another_in_place_of_is_refused(checkpoint):
    overrides = {"architectures": ["PaceQwen2ForCausalLM"]}
    config = EngineArgs(str(checkpoint()), skip_tokenizer_init=True).create_engine_config()
    _check_not_configured(config)
    config.model_config.hf_overrides = overrides
    with pytest.raises(PaceConfigError, match="asks for PaceQwen2ForCausalLM, but vLLM serves"):
        _check_not_configured(config)


@pytest.mark.parametrize(
    ("additional", "read"),
    [
        ({"pacellm_alpha": 0.5}, False),
        ({"PaceLLM": {"alpha": 0.5}}, False),
        ({"layers": [1]}, False),
        ({"other": 1}, True),
        ({"layers": [1], "pacellm": {"layers": [0]}}, True),
    ],
)
def test_settings_of_an_engine_that_nobody_would_read_are_refused(additional, read, checkpoint):
    config = engine_config(checkpoint())
    config.additional_config = additional
    if read:
        check_engine(config)
        return
    with pytest.raises(PaceConfigError, match=f"'{next(iter(additional))}' of --additional-config"):
        check_engine(config)


@pytest.mark.parametrize(
    ("additional", "overrides"),
    [
        ({"pacellm": {}}, {}),
        ({"pacellm_alpha": 0.5}, {}),
        ({}, {"pacellm": {"layers": [1]}}),
    ],
)
def test_settings_without_the_architecture_are_refused(additional, overrides, checkpoint):
    config = EngineArgs(str(checkpoint()), skip_tokenizer_init=True).create_engine_config()
    config.additional_config, config.model_config.hf_overrides = {"other": 1}, {"rope_theta": 2}
    _check_not_configured(config)
    config.additional_config, config.model_config.hf_overrides = additional, overrides
    with pytest.raises(PaceConfigError, match="carries neither memory nor experts; add --hf-over"):
        _check_not_configured(config)


def test_tokens_shared_out_over_ranks_are_refused(checkpoint):
    config = engine_config(checkpoint())
    parallel = config.parallel_config
    parallel.enable_expert_parallel = True
    parallel.tensor_parallel_size = parallel.data_parallel_size = 2
    assert parallel.use_sequence_parallel_moe
    with pytest.raises(PaceConfigError, match="expert parallelism of shared tokens: each tensor"):
        check_engine(config)


@pytest.mark.parametrize(
    ("part", "field", "value", "sentence"),
    [
        ("parallel", "enable_dbo", True, "dual-batch overlap or microbatches: parts of a"),
        ("parallel", "ubatch_size", 2, "dual-batch overlap or microbatches: parts of a"),
        ("parallel", "decode_context_parallel_size", 2, "context parallelism: a bank"),
        ("parallel", "prefill_context_parallel_size", 2, "context parallelism: a bank"),
        ("parallel", "enable_fault_tolerance", True, "fault tolerance: a step that failed"),
        ("model", "enable_sleep_mode", True, "sleep mode: waking with banks"),
        ("model", "is_encoder_decoder", True, "an encoder-decoder model: a bank knows one"),
        ("cache", "kv_sharing_fast_prefill", True, "fast prefill: layers that share caches"),
        ("scheduler", "disable_hybrid_kv_cache_manager", True, "one KV cache manager for all"),
    ],
)
def test_features_this_machine_cannot_start(part, field, value, sentence, checkpoint):
    config = engine_config(checkpoint())
    check_engine(config)
    setattr(getattr(config, f"{part}_config"), field, value)
    with pytest.raises(PaceConfigError) as refusal:
        check_engine(config)
    assert f"does not work with {sentence}" in str(refusal.value)


@pytest.mark.parametrize("kernels", [False, True])
def test_reports_are_refused_where_kernels_run(kernels, checkpoint, monkeypatch):
    monkeypatch.setattr(checks, "takes_kernels", lambda device_type: kernels)
    config = engine_config(checkpoint())
    check_engine(config)
    [processor] = config.model_config.logits_processors
    asking = SamplingParams(extra_args={"pacellm_report": True})
    why = "kernels do not say what they decide for each token"
    with pytest.raises(PaceConfigError, match=why) if kernels else nullcontext():
        processor.validate_params(asking)


@pytest.mark.parametrize(
    ("settings", "grows"),
    [
        *(({"preset": preset}, False) for preset in ("gentle", "official", "paper")),
        ({"preset": "official", "alpha": 1, "noise": 0.5}, False),
        ({"preset": "official", "alpha": 1, "noise": 0.6}, True),
        ({"preset": "official", "alpha": 1, "noise": 0.6, "negative_k": 0}, False),
        ({"preset": "paper", "alpha": 1, "noise": 1}, False),
    ],
)
def test_settings_with_which_slots_grow_are_warned_of(settings, grows, checkpoint, monkeypatch):
    """Seen in a bank of one slot, which every token reads and is merged into."""
    pace = {**settings, "bank_size": 1, "segment_size": 2, "theta_low": 0.5, "theta_high": 1}
    config = PaceConfig.from_sources({"layers": [0], **pace})
    assert bool(growth(config)) is grows
    said = []
    monkeypatch.setattr(checks.logger, "warning", said.append)
    check_engine(engine_config(checkpoint(), {"layers": [0], **pace}))
    assert any("can grow from segment to segment" in sentence for sentence in said) is grows
    bank = Bank(MemoryRules.of(**pace), 2, torch.float64)
    a = torch.tensor([[1.0, 0.0], [0.9, 0.1]], dtype=torch.float64)
    for _ in range(700):
        bank.update(a, bank.enhance(a)[0])
    assert (bank.values.abs().max() > 100) == grows
