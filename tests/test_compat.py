"""One test per lean on vLLM internals: red means vLLM moved and ``compat`` must follow."""

import ast
import asyncio
import inspect
import json
import queue
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import vllm
from fastapi import UploadFile
from prometheus_client import REGISTRY
from test_manager import BANK, make_manager, make_request, place
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from vllm import LLM, platforms, triton_utils
from vllm.config import (
    CompilationConfig,
    CUDAGraphMode,
    ModelConfig,
    ParallelConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.config.mamba import MambaConfig
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.generate.generative_scoring.serving import GenerativeScoringRequest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.speech_to_text.transcription.protocol import TranscriptionRequest
from vllm.entrypoints.speech_to_text.translation.protocol import TranslationRequest
from vllm.exceptions import VLLMValidationError
from vllm.forward_context import ForwardContext, set_forward_context
from vllm.logger import DEFAULT_LOGGING_CONFIG
from vllm.model_executor.layers import fused_moe as fused_moe_package
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.fused_moe import fused_moe
from vllm.model_executor.layers.mamba.ops import ssu_dispatch
from vllm.model_executor.models import ModelRegistry, registry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.zen_cpu import ZenCpuPlatform
from vllm.sampling_params import BeamSearchParams, SamplingParams
from vllm.tracing import SpanAttributes
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import (
    CircularBufferManager,
    SingleTypeKVCacheManager,
)
from vllm.v1.engine import (
    EngineCoreOutput,
    EngineCoreRequest,
    EngineCoreRequestType,
    FinishReason,
    output_processor,
)
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCoreProc, EngineShutdownState
from vllm.v1.engine.core_client import DPLBAsyncMPClient
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor, RequestState
from vllm.v1.executor import uniproc_executor
from vllm.v1.kv_cache_interface import (
    CircularBufferSpec,
    FullAttentionSpec,
    MambaSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.kv_cache_spec_registry import _REGISTRY_KVCACHESPEC_LIST, KVCacheSpecRegistry
from vllm.v1.metrics.stats import IterationStats
from vllm.v1.sample import logits_processor
from vllm.v1.sample.logits_processor import LogitsProcessor as LogitsProcessorV1
from vllm.v1.worker import utils as worker_utils
from vllm.v1.worker.block_table import MultiGroupBlockTable
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu.model_states import default
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2
from vllm.v1.worker.gpu_input_batch import InputBatch
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

import pacellm_vllm
from pacellm_vllm import compat
from pacellm_vllm.compat import patching
from pacellm_vllm.compat.layers import packing
from pacellm_vllm.config import PaceConfig
from pacellm_vllm.memory.batch import NoSettings
from pacellm_vllm.memory.spec import PagedBankManager, PagedBankSpec
from pacellm_vllm.memory.stage import StageWithoutMemory
from pacellm_vllm.models.compared import COMPARED
from pacellm_vllm.models.table import ARCHITECTURES, WHY_NOT
from pacellm_vllm.platform import CPU_WORKER
from pacellm_vllm.platform.torch_cpu import TorchCpuPlatform


def test_every_lean_says_what_for_and_until_when():
    for name, lean in vars(compat).items():
        if inspect.isfunction(lean):
            said = lean.__doc__
            assert "Symptom: " in said or "Symptom and end: " in said, name
            assert "an go when" in said or "and end: " in said, name


def test_the_tested_vllm_is_installed():
    assert vllm.__version__.startswith(("0.32.", "0.33."))


@pytest.fixture
def no_specs():
    """vLLM's registry of KV cache specs, empty as in a process that just began."""
    before = dict(_REGISTRY_KVCACHESPEC_LIST)
    _REGISTRY_KVCACHESPEC_LIST.clear()
    yield _REGISTRY_KVCACHESPEC_LIST
    _REGISTRY_KVCACHESPEC_LIST.clear()
    _REGISTRY_KVCACHESPEC_LIST.update(before)


class OurSpec(CircularBufferSpec):
    """A spec that vLLM does not know."""


def test_registering_first_would_still_hide_the_built_in_specs(no_specs):
    """The reason for ``register_kv_cache_spec``."""
    KVCacheSpecRegistry.register(OurSpec, CircularBufferManager, OurSpec)
    KVCacheSpecRegistry._ensure_registered()
    assert FullAttentionSpec not in no_specs


def test_banks_are_registered_with_their_manager():
    assert _REGISTRY_KVCACHESPEC_LIST[PagedBankSpec].manager_class is PagedBankManager
    assert FullAttentionSpec in _REGISTRY_KVCACHESPEC_LIST


def test_registering_ours_keeps_the_built_in_ones(no_specs):
    compat.register_kv_cache_spec(OurSpec, CircularBufferManager)
    assert no_specs[OurSpec].manager_class is CircularBufferManager
    assert FullAttentionSpec in no_specs


def test_config_hooks_run_after_the_architectures_own_and_once():
    calls = []

    class Own(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config):
            calls.append("own")

    def hook(vllm_config):
        calls.append("ours")

    MODELS_CONFIG_MAP["PacellmTestModel"] = Own
    try:
        compat.add_config_hook("PacellmTestModel", hook)
        compat.add_config_hook("PacellmTestModel", hook)
        MODELS_CONFIG_MAP["PacellmTestModel"].verify_and_update_config(None)
    finally:
        del MODELS_CONFIG_MAP["PacellmTestModel"]
    assert calls == ["own", "ours"]


def test_a_checkpoint_is_read_as_vllm_reads_it(tmp_path):
    """``checkpoint_config``; transformers alone does not know this one."""
    (tmp_path / "config.json").write_text('{"model_type": "RefinedWeb", "n_layer": 3}')
    config = compat.checkpoint_config(str(tmp_path))
    assert config.num_hidden_layers == 3
    assert "RefinedWeb" not in CONFIG_MAPPING_NAMES
    with pytest.raises((OSError, ValueError)):
        compat.checkpoint_config(str(tmp_path / "nothing"))


def test_every_architecture_stands_on_what_vllm_registers():
    for base in ARCHITECTURES.values():
        registered = ModelRegistry.models[base.architecture]
        assert (registered.module_name, registered.class_name) == (base.module, base.name)


def test_every_generative_architecture_of_vllm_is_served_or_has_a_reason():
    tables = (
        registry._TEXT_GENERATION_MODELS,
        registry._MULTIMODAL_MODELS,
        registry._TRANSFORMERS_SUPPORTED_MODELS,
    )
    listed = {name for table in tables for name in table}
    listed |= {
        "TransformersForCausalLM",
        "TransformersMoEForCausalLM",
        "TransformersMultiModalForCausalLM",
        "TransformersMultiModalMoEForCausalLM",
    }
    assert {name for name, _, _ in compat.generation_models()} == listed
    served = {base.architecture for base in ARCHITECTURES.values()}
    assert served & WHY_NOT.keys() == set()
    # Reasons may be of architectures that one of the two versions lacks.
    assert served | WHY_NOT.keys() >= listed
    assert served <= listed
    assert listed >= COMPARED


def test_hooks_of_an_architecture_are_run_for_the_one_that_stands_on_it():
    calls = []

    class Own(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config):
            calls.append("own")

    MODELS_CONFIG_MAP["PacellmTestModel"] = Own
    try:
        compat.add_config_hook("PacePacellmTestModel", calls.append, "PacellmTestModel")
        MODELS_CONFIG_MAP["PacePacellmTestModel"].verify_and_update_config("ours")
        assert calls == ["own", "ours"]
    finally:
        MODELS_CONFIG_MAP.pop("PacellmTestModel")
        MODELS_CONFIG_MAP.pop("PacePacellmTestModel", None)


def test_splitting_ops_still_take_names():
    ops = ["vllm::other"]
    config = SimpleNamespace(compilation_config=SimpleNamespace(splitting_ops=ops))
    compat.add_splitting_op(config, "pacellm_memory")
    compat.add_splitting_op(config, "pacellm_memory")
    assert ops == ["vllm::other", "vllm::pacellm_memory"]
    assert "vllm::unified_attention_with_output" in CompilationConfig._attention_ops


def test_loggers_outside_vllm_still_print_nothing():
    assert "pacellm_vllm" not in DEFAULT_LOGGING_CONFIG["loggers"]
    assert "vllm" in DEFAULT_LOGGING_CONFIG["loggers"]


def test_the_base_manager_still_frees_what_was_claimed_and_never_hits():
    hits, tokens = CircularBufferManager.find_longest_cache_hit(
        block_hashes=[],
        max_length=64,
        kv_cache_group_ids=[0],
        block_pool=None,
        kv_cache_spec=None,
        drop_eagle_block=False,
        alignment_tokens=16,
    )
    assert (hits, tokens) == (([],), 0)


def test_managers_are_still_given_no_request():
    """The reason for ``watch_requests``; and what it stands on."""
    for name in ("get_num_blocks_to_allocate", "allocate_new_blocks", "find_longest_cache_hit"):
        method = getattr(SingleTypeKVCacheManager, name)
        assert "request" not in inspect.signature(method).parameters
    for name in ("get_computed_blocks", "allocate_slots"):
        method = inspect.unwrap(getattr(KVCacheManager, name))
        assert list(inspect.signature(method).parameters)[1] == "request"
    fields = {"sampling_params", "num_prompt_tokens", "max_tokens", "resumable"}
    assert fields <= {*vars(make_request("one", [1], False))}


def test_block_hashes_still_ask_the_function_that_is_wrapped():
    hasher = kv_cache_utils.get_request_block_hasher
    [inner] = [code for code in hasher.__code__.co_consts if inspect.iscode(code)]
    assert "generate_block_hash_extra_keys" in inner.co_names
    plain = kv_cache_utils.generate_block_hash_extra_keys
    original = inspect.unwrap(plain)
    asked = [make_request("one", [1] * 16, False, extra) for extra in (None, {"a": 1})]
    assert [original(request, 0, 16, 0) for request in asked] == [(None, 0)] * 2
    asked[0].cache_salt = "salt"
    assert original(asked[0], 0, 16, 0) != original(asked[1], 0, 16, 0)


def test_both_runners_still_tell_logits_processors_of_requests():
    for runner in (LogitsProcessorV1, LogitsProcessorV2):
        assert "validate_params" in vars(runner)
    told = []
    batch = SimpleNamespace(
        is_pooling_model=False,
        num_reqs=2,
        batch_update_builder=SimpleNamespace(get_and_reset=lambda requests: None),
        thinking_budget_state_holder=None,
        logitsprocs=SimpleNamespace(all=[SimpleNamespace(update_state=told.append)]),
    )
    InputBatch.refresh_metadata(batch)
    assert told == [None]
    assert list(inspect.signature(LogitsProcessorV2.add_request).parameters) == [
        "self",
        "req_idx",
        "sampling_params",
    ]


def test_runner_v2_still_tells_which_rows_its_batch_has(monkeypatch):
    """V1's rows are the batch's, and it fills in none."""
    assert CommonAttentionMetadata.__dataclass_fields__["req_idx"].default is None
    told, rows = {}, np.array([5])
    monkeypatch.setattr(default, "build_attn_metadata", lambda **given: told.update(given))
    batch = MagicMock(
        idx_mapping_np=rows,
        query_start_loc_np=np.array([0, 1]),
        is_prefilling_np=np.array([True]),
        num_reqs=1,
        max_query_len=1,
    )
    state = MagicMock(supports_mm_inputs=False)
    default.DefaultModelState.prepare_attn(state, batch, None, (), None, [], None)
    assert told["req_idx"] is rows


def test_drafts_still_forbid_logits_processors():
    """The reason for ``load_with_drafts``, and what it does."""
    drafting = SimpleNamespace(
        speculative_config="some",
        scheduler_config=SimpleNamespace(max_num_seqs=1),
        compilation_config=None,
    )
    given = (drafting, torch.device("cpu"), False, False)
    with pytest.raises(ValueError, match="speculative"):
        inspect.unwrap(logits_processor.build_logitsprocs)(*given, (NoSettings,))
    # Importing it has called ``load_with_drafts``.
    built = logits_processor.build_logitsprocs(*given, (NoSettings,))
    assert isinstance(built.argmax_invariant[-1], NoSettings)
    with pytest.raises(ValueError, match="speculative"):
        logits_processor.build_logitsprocs(*given, (NoSettings, LogitsProcessorV1))


def test_a_call_of_all_engines_still_returns_the_first_ones_answer():
    """The reason for ``ask_all_engines``."""

    async def ask(*args, engine="?"):
        return args, engine

    client: Any = object.__new__(DPLBAsyncMPClient)
    client.core_engines, client._call_utility_async = ["one", "two"], ask
    every = [(("m", 1), "one"), (("m", 1), "two")]
    assert asyncio.run(client.call_utility_all_async("m", 1)) == every
    assert asyncio.run(client.call_utility_async("m", 1)) == every[0]
    given = ("m", 2.0, (3,), {"k": 4})
    asked, _ = asyncio.run(client.collective_rpc_async(*given))
    assert asked == ("collective_rpc", *given)


def test_utility_calls_still_reach_methods_of_the_engine_core():
    """The reason for ``add_engine_method``: by name, and nothing else of the core can be asked."""
    core: Any = object.__new__(EngineCoreProc)
    core.added = lambda value: value + 1
    core.shutdown_state, core.output_queue = EngineShutdownState.RUNNING, queue.Queue()
    core._handle_client_request(EngineCoreRequestType.UTILITY, (0, 7, "added", (2,)))
    _, outputs = core.output_queue.get_nowait()
    assert outputs.utility_output.result.result == 3


def test_how_many_api_servers_there_are_is_still_a_private_field():
    """``api_processes``."""
    config = VllmConfig(parallel_config=ParallelConfig(_api_process_count=3, _api_process_rank=1))
    assert compat.api_processes(config) == 3
    assert not hasattr(config.parallel_config, "api_process_count")


def test_the_platform_of_vllms_own_cpu_build_is_told_from_ours(monkeypatch):
    """``is_vllms_cpu_build``; ``is_cpu`` is true of both."""
    zen = ZenCpuPlatform()
    for platform, vllms in ((CpuPlatform(), True), (zen, True), (TorchCpuPlatform(), False)):
        monkeypatch.setattr(platforms, "_current_platform", platform)
        assert platform.is_cpu()
        assert compat.is_vllms_cpu_build() == vllms


def test_vllms_own_metrics_are_in_the_registry_that_its_metrics_route_shows(monkeypatch):
    """``metrics_registry``: those of all processes where there are several."""
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    assert compat.metrics_registry() is REGISTRY


def test_an_engine_in_this_process_still_shows_little_and_cannot_be_closed():
    """``config_of``, ``close``; ``test_evals_engine.py`` makes several engines with them."""
    assert not {"vllm_config", "close", "shutdown"} & {*dir(LLM)}


def test_beam_search_still_drops_extra_arguments():
    assert "extra_args" not in BeamSearchParams.__struct_fields__


class Patched:
    def asked(self):
        return ["vLLM"]


def test_the_latest_engine_of_a_process_says_what_is_checked(monkeypatch):
    """An earlier one may have been closed, and have had other settings."""
    monkeypatch.setitem(patching.PATCHED, "a test", (f"{__name__}:Patched.asked",))
    for name in ("first", "second"):
        patching.patch("a test", lambda original, *args, name=name: [name, *original(*args)])
    assert Patched().asked() == ["second", "vLLM"]


def test_scoring_over_http_still_reads_no_settings():
    assert GenerativeScoringRequest.model_config["extra"] == "allow"
    assert "vllm_xargs" not in GenerativeScoringRequest.model_fields


OPENAI = (ChatCompletionRequest, CompletionRequest, ResponsesRequest)
SPEECH = (TranscriptionRequest, TranslationRequest)


def test_streams_still_begin_before_parameters_are_checked():
    """The reason for ``check_http_requests``: nothing of a generator runs before it is asked."""
    assert inspect.isasyncgenfunction(AsyncLLM.generate)
    for protocol in (*OPENAI, *SPEECH):
        assert protocol.model_config["extra"] == "allow"
        prompt = {"prompt": "x"} if protocol is CompletionRequest else {}
        prompt |= {"file": UploadFile(BytesIO())} if protocol in SPEECH else {}
        asked = protocol(model="m", messages=[], input="", vllm_xargs={"a": 1}, **prompt)
        assert asked.to_sampling_params(1, {}).extra_args == {"a": 1}
    for protocol in (ChatCompletionRequest, CompletionRequest, *SPEECH):
        assert callable(protocol.to_beam_search_params)


def test_extra_arguments_over_http_are_still_typed_without_booleans():
    """The reason for ``keep_booleans``."""
    typed = dict[str, str | int | float | list[str | int | float]] | None
    asked = {"model": "m", "messages": [], "input": "", "max_tokens": 1}
    compat.keep_booleans()
    for protocol in (*OPENAI, AnthropicMessagesRequest):
        assert get_type_hints(protocol)["vllm_xargs"] == typed
        given = {"vllm_xargs": {"a": True, "b": 1, "c": 1.0, "d": "x", "e": [1, "x"]}}
        # A prompt is what completions need and responses refuse.
        prompt = {"prompt": "x"} if protocol is CompletionRequest else {}
        read = protocol.model_validate_json(json.dumps({**asked, **prompt, **given})).vllm_xargs
        assert {name: (type(v), v) for name, v in read.items()} == {
            name: (type(v), v) for name, v in given["vllm_xargs"].items()
        }
    for protocol in SPEECH:
        assert get_type_hints(protocol)["vllm_xargs"] == typed
        # A form's field.
        form = {"file": UploadFile(BytesIO()), "vllm_xargs": '{"a": true, "b": 1}'}
        read = protocol.model_validate(form).vllm_xargs
        assert (read["a"], read["b"]) == (True, 1)
        assert (type(read["a"]), type(read["b"])) == (bool, int)


def test_a_block_is_found_under_a_hash_of_ours_and_counted_while_nobody_holds_it():
    """``publish_block``, ``evictable_blocks``; vLLM itself caches blocks of requests' tokens."""
    pool = BlockPool(num_gpu_blocks=4, enable_caching=True, hash_block_size=16)
    [block] = pool.get_new_blocks(1)
    page = BlockHash(b"a page of a bank")
    compat.publish_block(pool, block, make_block_hash_with_group_id(page, 1), 64)
    assert pool.get_cached_block(page, [1]) == [block]
    assert pool.get_cached_block(page, [0]) is None
    assert compat.evictable_blocks([block, pool.null_block]) == 0
    pool.free_blocks([block])
    free = pool.get_num_free_blocks()
    assert compat.evictable_blocks([block, pool.null_block]) == 1
    pool.touch([block])
    assert pool.get_num_free_blocks() == free - 1
    pool.evict_blocks({block.block_id})
    assert pool.get_cached_block(page, [1]) is None


def test_copies_that_a_manager_asks_for_reach_the_workers():
    """``copy_blocks_before_forward``; and ``managers_of``, which says whom to ask."""
    whole = make_manager(64, caching=True)
    core = SimpleNamespace(scheduler=SimpleNamespace(kv_cache_manager=whole))
    ours = compat.managers_of(core)[BANK]
    assert isinstance(ours, PagedBankManager)
    source, target = whole.block_pool.get_new_blocks(2)
    compat.copy_blocks_before_forward(ours, [(source, target)])
    copies, retained = whole.take_kv_cache_block_copies()
    assert copies == [(source.block_id, target.block_id)]
    assert retained == [source, target]


def test_the_grouped_product_is_still_private_and_takes_what_we_give(monkeypatch):
    """``experts/fused_child.py`` runs it."""
    assert "invoke_fused_moe_triton_kernel" not in fused_moe_package.__all__
    takes = inspect.signature(fused_moe.invoke_fused_moe_triton_kernel)
    asked = []
    monkeypatch.setattr(
        fused_moe,
        "invoke_fused_moe_triton_kernel",
        lambda *given, **named: asked.append(takes.bind(*given, **named).arguments),
    )
    x, weights, out = torch.ones(2, 3), torch.ones(4, 5, 3), torch.ones(2, 4, 5)
    monkeypatch.setattr(triton_utils, "tl", SimpleNamespace(float16=16, bfloat16=17, float32=32))
    compat.grouped_product(x, weights, out, (x, x, x), None, {})
    assert (asked[0]["A"], asked[0]["B"], asked[0]["C"]) == (x, weights, out)
    assert asked[0]["compute_type"] == 32
    tiles = compat.grouped_product_tiles(8, 128, 296, 3584)
    assert {"BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M"} <= set(tiles)


def test_every_group_still_has_a_slot_mapping_padded_with_minus_one():
    """Runner V1's; V2's pads in a kernel. The reason for the long rows of
    ``PagedBankSpec.max_num_blocks_per_req``, and what ``rows_of_requests`` reads.
    """
    mapping = torch.tensor([7, 3, 9, 9])
    group = SimpleNamespace(kv_cache_spec=None, layer_names=["a.memory"])
    runner = SimpleNamespace(
        kv_cache_config=SimpleNamespace(kv_cache_groups=[group]),
        input_batch=SimpleNamespace(
            block_table=[SimpleNamespace(slot_mapping=SimpleNamespace(gpu=mapping))]
        ),
    )
    _, by_layer = GPUModelRunner._get_slot_mappings(runner, 4, 2, 2)
    assert by_layer["a.memory"].tolist() == [7, 3, PAD_SLOT_ID, PAD_SLOT_ID]
    assert PAD_SLOT_ID == -1
    assert "slot_mapping" in ForwardContext.__dataclass_fields__
    assert "num_tokens" not in ForwardContext.__dataclass_fields__


def test_an_operator_finds_its_layer_and_its_metadata_in_a_step_of_vllms():
    """``layers_by_name``, which a stage without memory adds itself to; ``layer_in_step``,
    ``metadata_of_step``.
    """
    config = VllmConfig()
    compat.layers_by_name(config)["a.memory"] = "a layer"
    stage = StageWithoutMemory(config, PaceConfig(), 8, "a.stage")
    assert config.compilation_config.static_forward_context["a.stage"] is stage
    with set_forward_context({"a.memory": "metadata"}, config):
        assert compat.layer_in_step("a.memory") == "a layer"
        assert compat.metadata_of_step() == {"a.memory": "metadata"}
    with set_forward_context(None, config):
        assert compat.metadata_of_step() is None


@pytest.mark.parametrize("mode", [CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL])
@pytest.mark.parametrize("capturing", [False, True])
def test_a_step_says_whether_a_piece_of_it_is_captured(mode, capturing, monkeypatch):
    """``in_graph_piece``"""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    with set_forward_context(None, VllmConfig(), cudagraph_runtime_mode=mode):
        assert compat.in_graph_piece() == (capturing and mode == CUDAGraphMode.PIECEWISE)


def test_layers_that_share_caches_are_still_told_by_an_attribute_that_not_all_have():
    """``has_own_cache``; one that shares has the other's spec."""
    tiny = Path(__file__).parents[1] / "scripts" / "tiny"
    config = VllmConfig(model_config=ModelConfig(str(tiny), dtype="float32"))
    with set_current_vllm_config(config):
        sizes = {"num_heads": 1, "head_size": 32, "scale": 1.0, "cache_config": config.cache_config}
        own = Attention(**sizes, prefix="layers.0.attn")
        shared = Attention(
            **sizes, prefix="layers.1.attn", kv_sharing_target_layer_name="layers.0.attn"
        )
    assert shared.get_kv_cache_spec(config) == own.get_kv_cache_spec(config) is not None
    assert compat.has_own_cache(own)
    assert not compat.has_own_cache(shared)
    assert not hasattr(AttentionLayerBase, "kv_sharing_target_layer_name")
    assert compat.has_own_cache(object.__new__(StageWithoutMemory))


def test_block_tables_still_name_blocks_that_a_window_let_go_of():
    """``hides_freed_windows``: runner V1 has no cure, and V2's is the newest vLLM's."""
    newest = vllm.__version__.startswith("0.33")
    for v2 in (False, True):
        config = SimpleNamespace(use_v2_model_runner=v2)
        assert compat.hides_freed_windows(config) is (v2 and newest)
    named = inspect.signature(MultiGroupBlockTable.commit_block_table).parameters
    assert "num_computed_tokens" not in named


def test_rows_of_requests_leaves_padding_out(monkeypatch):
    slots = {"a.memory": torch.full((4,), -1), "a.attn": torch.tensor([7, 3, -1, -1])}
    context = SimpleNamespace(slot_mapping=slots)
    monkeypatch.setattr("vllm.forward_context.get_forward_context", lambda: context)
    assert compat.rows_of_requests(3).tolist() == [True, True, False]
    context.slot_mapping = {}
    assert compat.rows_of_requests(3) is None


def test_ops_know_nothing_of_vllm_and_imports_point_one_way():
    package = Path(pacellm_vllm.__file__).parent
    # A part imports itself and those before it; a longer name stands for what it holds alone.
    order = [
        "sentences",
        "ops",
        "experts.errors",
        "experts.settings",
        "config",
        "request",
        "compat",
        "models.table",
        "experts",
        "sessions",
        "memory",
        "platform",
        "models",
        "serving",
        "flags",
        "evals",
        "verify",
        "plugin",
        "cli",
    ]
    without_vllm = order[: order.index("compat")]

    def part_of(name):
        return max((part for part in order if f"{name}.".startswith(f"{part}.")), key=len)

    for path in package.rglob("*.py"):
        name = ".".join(path.relative_to(package).with_suffix("").parts)
        if name == "__init__":
            continue
        part = part_of(name)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                top, _, rest = node.module.partition(".")
                assert not (part in without_vllm and top == "vllm"), path
                if top == "pacellm_vllm" and rest:
                    assert order.index(part_of(rest)) <= order.index(part), (path, node.module)


def test_streamed_input_is_still_checked_where_it_is_processed():
    """``prepare_requests``: turns come with this keyword, in both front ends."""
    parameters = inspect.signature(inspect.unwrap(InputProcessor.process_inputs)).parameters
    assert parameters["resumable"].default is False


def test_answers_are_still_made_on_the_front_end_with_their_reason(monkeypatch):
    """``follow_answers``: what it wraps, and what it reads of a request's state."""
    made = [*inspect.signature(inspect.unwrap(RequestState.make_request_output)).parameters]
    assert made[1:4] == ["new_token_ids", "pooling_output", "finish_reason"]
    states = OutputProcessor(None, log_stats=False)
    params = SamplingParams(detokenize=False)
    order = []
    answers = SimpleNamespace(put=lambda answer: order.append(answer.outputs[0].token_ids))
    states.add_request(engine_request("one", params), None, queue=answers)
    state = states.request_states["one"]
    make = RequestState.make_request_output

    def made(state, *given, **named):
        order.append("made")
        return make(state, *given, **named)

    monkeypatch.setattr(RequestState, "make_request_output", made)
    states.process_outputs([EngineCoreOutput("one", [7, 8])])
    assert state.detokenizer.output_token_ids == [7, 8]
    # So that a client who has the answer finds it in the session.
    assert order == ["made", [7, 8]]


def engine_request(request_id, params):
    return EngineCoreRequest(
        request_id=request_id,
        external_req_id=request_id,
        prompt_token_ids=[1, 2],
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def test_a_request_on_the_front_end_has_its_clients_id_and_what_was_cached():
    """What ``hold_spans`` hands on of a request."""
    states = OutputProcessor(None, log_stats=False)
    states.add_request(engine_request("one", SamplingParams(detokenize=False)), None)
    state = states.request_states["one"]
    assert (state.external_req_id, state.num_cached_tokens) == ("one", 0)


def test_spans_are_still_written_in_one_call_without_a_place_for_more(monkeypatch):
    """``hold_spans``: the processor makes the span's attributes itself."""
    states = OutputProcessor(None, log_stats=True, tracing_enabled=True)
    states.add_request(engine_request("one", SamplingParams(detokenize=False)), None)
    written = []
    monkeypatch.setattr(
        output_processor, "instrument_manual", lambda **span: written.append(span["attributes"])
    )
    monkeypatch.setattr(OutputProcessor, "do_tracing", inspect.unwrap(OutputProcessor.do_tracing))
    parameters = inspect.signature(OutputProcessor.do_tracing).parameters
    assert list(parameters) == ["self", "engine_core_output", "req_state", "iteration_stats"]
    done = EngineCoreOutput("one", [7], finish_reason=FinishReason.LENGTH)
    states.process_outputs([done], 1.0, IterationStats())
    [attributes] = written
    assert attributes[SpanAttributes.GEN_AI_REQUEST_ID] == "one"


def test_a_turns_last_token_is_still_taken_back_under_asynchronous_scheduling():
    turn = SimpleNamespace(
        resumable=True,
        num_computed_tokens=9,
        num_output_placeholders=1,
        num_in_flight_tokens=1,
        streaming_queue=[],
    )
    scheduler = SimpleNamespace(
        num_waiting_for_streaming_input=0, _enqueue_waiting_request=lambda _: None
    )
    assert not Scheduler._handle_stopped_request(scheduler, turn)
    assert turn.num_computed_tokens == 8


def test_pools_tell_nothing_of_a_group_that_is_kept_out_of_events():
    """``keep_out_of_events``; vLLM would look for each block's hash among its request's."""
    pool = BlockPool(
        num_gpu_blocks=4, enable_caching=True, hash_block_size=16, enable_kv_cache_events=True
    )
    gone = []
    compat.keep_out_of_events(pool, 1, gone.extend)
    hashes = [make_block_hash_with_group_id(BlockHash(b"a page"), group) for group in (0, 1)]
    blocks = pool.get_new_blocks(2)
    for block, block_hash in zip(blocks, hashes, strict=True):
        compat.publish_block(pool, block, block_hash, 16)
    pool.emit_cached_block_events(None, 0, 16, 1)
    assert pool.take_events() == []
    pool.evict_blocks({block.block_id for block in blocks})
    assert gone == hashes[1:]
    [event] = pool.take_events()
    assert event.group_idx == 0


def test_cached_tokens_are_still_the_least_of_all_groups():
    """The reason for ``count_cached_tokens_without``, and what it does."""
    manager = make_manager(64, caching=True)
    request = make_request("one", [1] * 100, caching=True)
    assert place(manager, request, 100) == 0
    original = inspect.unwrap(KVCacheManager.estimate_cached_tokens)
    assert (original(manager, request), manager.estimate_cached_tokens(request)) == (0, 96)


def test_a_later_turn_still_brings_parameters_of_its_own():
    """The reason for ``watch_turns``, and what it does."""
    added, checked = [], []

    async def send(request):
        added.append(request)

    async def take(parameters, resumable=True):
        request = engine_request("one", parameters)
        request.resumable = resumable
        await AsyncLLM._add_request(front, request, None, None, 0, None)

    def check(config, first, later):
        checked.append((config, first.max_tokens, later.max_tokens))
        if first.max_tokens != later.max_tokens:
            raise ValueError("pacellm: no.")

    front = SimpleNamespace(
        output_processor=OutputProcessor(None, log_stats=False),
        engine_core=SimpleNamespace(add_request_async=send),
        check_admission=lambda request_id: None,
        log_requests=False,
        vllm_config="a config",
    )
    one, two = (SamplingParams(max_tokens=n, detokenize=False) for n in (1, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AsyncLLM, "_add_request", inspect.unwrap(AsyncLLM._add_request))
        asyncio.run(take(one))
        asyncio.run(take(two))
        assert len(added) == 2
        front.output_processor = OutputProcessor(None, log_stats=False)
        compat.watch_turns(check)
        for parameters in (one, one):
            asyncio.run(take(parameters))
        with pytest.raises(VLLMValidationError, match=r"^pacellm: no \(request 'one'\)\.$"):
            asyncio.run(take(two))
        # The turn after it is compared with the first one as well; the end of all is no turn.
        asyncio.run(take(one))
        asyncio.run(take(two, resumable=False))
    assert len(added) == 6
    assert checked == [("a config", 1, n) for n in (1, 2, 1)]


def test_vllms_cpu_attention_still_keeps_layers_apart():
    """The reason for ``pack_cpu_attention``; what it makes differs in nothing but the layouts."""
    assert CPUAttentionBackend.supported_kv_cache_layouts() == (KVCacheLayout.LBHNC,)
    packed = packing(CPUAttentionBackend)
    assert packed.supported_kv_cache_layouts() == (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)
    assert packed.get_impl_cls() is CPUAttentionBackend.get_impl_cls()
    assert packed.get_builder_cls() is CPUAttentionBackend.get_builder_cls()
    assert packing(CPUAttentionBackend) is packed
    assert packing(packed) is packed
    assert packing(SimpleNamespace) is SimpleNamespace


@pytest.mark.parametrize("wrapped", [False, True])
def test_vllms_cpu_runner_still_zeroes_plain_groups_alone(wrapped):
    """The reason for ``set_cpu_worker``."""
    spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=8, dtype=torch.float32)
    spec = UniformTypeKVCacheSpecs.from_specs({"layer": spec}) if wrapped else spec
    cache = torch.ones(2, 4)
    group = SimpleNamespace(kv_cache_spec=spec, layer_names=["layer"])
    runner = SimpleNamespace(
        kv_cache_config=SimpleNamespace(kv_cache_groups=[group]),
        compilation_config=SimpleNamespace(
            static_forward_context={"layer": SimpleNamespace(kv_cache=cache)}
        ),
    )
    CPUModelRunner._zero_block_ids(runner, [1])
    assert bool(cache[1].any()) == wrapped


@pytest.mark.parametrize("named", ["auto", "vllm.v1.worker.cpu_worker.CPUWorker", CPU_WORKER])
def test_the_cpu_worker_is_ours_unless_another_is_named(named):
    engine = SimpleNamespace(parallel_config=SimpleNamespace(worker_cls=named))
    compat.set_cpu_worker(engine, CPU_WORKER)
    assert engine.parallel_config.worker_cls == CPU_WORKER
    engine.parallel_config.worker_cls = "somebody.Worker"
    with pytest.raises(ValueError, match=r"^pacellm: worker class somebody\.Worker does not work"):
        compat.set_cpu_worker(engine, CPU_WORKER)


@pytest.fixture
def state_updates(monkeypatch):
    """``ssu_dispatch`` as in a worker that has chosen nothing yet."""
    monkeypatch.setattr(ssu_dispatch, "_mamba_ssu_backend", None)
    return ssu_dispatch


def planned_states(wrapped):
    spec = MambaSpec(block_size=16, shapes=((2,),), dtypes=(torch.float32,))
    if wrapped:
        spec = UniformTypeKVCacheSpecs.from_specs({"layer": spec})
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)])


@pytest.mark.parametrize("wrapped", [False, True])
def test_states_in_groups_of_their_own_specs_are_still_overlooked(state_updates, wrapped):
    state_updates.initialize_mamba_ssu_backend(MambaConfig(), planned_states(wrapped))
    assert (state_updates._mamba_ssu_backend is None) == wrapped


def test_the_block_size_is_still_chosen_when_weights_are_loaded(monkeypatch):
    """The reason for ``with_final_blocks``; of the executor in one process."""
    order = []

    class Worker:
        def __init__(self, **_):
            for name in ("init_worker", "init_device", "load_model"):
                setattr(self, name, lambda name=name, **_: order.append(name))

    monkeypatch.setattr(uniproc_executor, "WorkerWrapperBase", Worker)
    monkeypatch.setattr(uniproc_executor, "set_worker_net_device", lambda *_: None, raising=False)
    chosen = SimpleNamespace(update_block_size_for_backend=lambda _: order.append("block size"))
    monkeypatch.setattr(uniproc_executor, "current_platform", chosen)
    executor = object.__new__(uniproc_executor.UniProcExecutor)
    executor.vllm_config = executor.shared_worker_lock = None
    executor._distributed_args = lambda: ("", 0, 0)
    executor._init_executor()
    assert order == ["init_worker", "init_device", "load_model", "block size"]


def test_layers_that_share_caches_are_still_left_out_of_groups_of_their_own_specs():
    """The reason for ``place_shared_layers``, and what it does."""
    spec = MambaSpec(block_size=16, shapes=((2,),), dtypes=(torch.float32,))
    add = worker_utils.add_kv_sharing_layers_to_kv_cache_groups
    compat.place_shared_layers()
    patched = worker_utils.add_kv_sharing_layers_to_kv_cache_groups
    for function, names in ((inspect.unwrap(add), {"one"}), (patched, {"one", "other"})):
        group = SimpleNamespace(
            layer_names=["one"], kv_cache_spec=UniformTypeKVCacheSpecs.from_specs({"one": spec})
        )
        function({"other": "one"}, [group])
        assert group.layer_names == ["one", "other"]
        assert group.kv_cache_spec.kv_cache_specs.keys() == names
