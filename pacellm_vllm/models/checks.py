"""What is refused before an engine starts, each with one sentence."""

from typing import Any

from vllm import SamplingParams, envs
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.input_processor import InputProcessor

from pacellm_vllm import CONFIG_KEY
from pacellm_vllm.compat import (
    add_logits_processor,
    add_worker_extension,
    check_http_requests,
    follow_answers,
    is_vllms_cpu_build,
    keep_booleans,
    plugin_logger,
    prepare_requests,
    set_cpu_worker,
    watch_turns,
)
from pacellm_vllm.config import PaceConfig, PaceConfigError
from pacellm_vllm.memory.backend import takes_kernels
from pacellm_vllm.memory.batch import BatchSettings, NoSettings, WithDrafts, WithKernels
from pacellm_vllm.models.compared import TEXTS_COMPARED, compared_as
from pacellm_vllm.models.experts import check_experts
from pacellm_vllm.models.settings import read_config
from pacellm_vllm.models.table import ARCHITECTURES, WHY_NOT, is_pace, pace_architecture
from pacellm_vllm.ops.rules import UpdateRule
from pacellm_vllm.platform import CPU_WORKER
from pacellm_vllm.request import RequestSettings, ours_in, with_journal_key
from pacellm_vllm.sentences import first_refusal
from pacellm_vllm.sessions.admission import admit, check_request, check_sessions, ended

logger = plugin_logger()

REPORT_EXTENSION = "pacellm_vllm.serving.report.MemoryReport"


def check_engine(vllm_config: VllmConfig) -> None:
    """Validate our configuration against the engine's; for ``Pace*`` architectures.

    Raises ``PaceConfigError``, or ``ExpertsError`` about experts.
    """
    config = read_config(vllm_config)
    refusals = {
        "vLLM's Rust front end": (
            envs.VLLM_USE_RUST_FRONTEND,
            "it would check no settings of requests, and has neither sessions nor reports; unset "
            "VLLM_USE_RUST_FRONTEND",
        ),
        "LoRA on gpt-oss": (
            vllm_config.lora_config is not None
            and vllm_config.model_config.architecture == "PaceGptOssForCausalLM",
            "vLLM knows by the architecture's name how the weights of its experts are interleaved, "
            "and would cut adapters apart; drop --enable-lora, or merge the adapter",
        ),
    }
    if refusal := first_refusal("this package does", refusals):
        raise PaceConfigError(refusal)
    layers = config.resolve_layers(vllm_config.model_config.get_total_num_hidden_layers())
    if layers:
        _check_memory(vllm_config)
        set_cpu_worker(vllm_config, CPU_WORKER)
        _check_caching(vllm_config, config)
        watch_turns(_check_turn)
        doubt = not_compared(vllm_config.model_config.architecture)
        for sentence in filter(None, (known_harm(config), growth(config), doubt)):
            logger.warning(sentence)
    if config.experts is not None:
        check_experts(vllm_config, config.experts)
    add_worker_extension(vllm_config, REPORT_EXTENSION)
    processor = _settings_class(vllm_config) if layers else NoSettings
    add_logits_processor(vllm_config, processor)
    keep_booleans()

    def check(params: SamplingParams) -> None:
        settings = RequestSettings.of(params.extra_args)
        processor.check(settings, params.n)
        check_request(settings, config, params.n)

    check_http_requests(ours_in, check)
    prepare_requests(_why_no_streams, _extra_args, _admit)
    if config.session_tokens:
        check_sessions(vllm_config)
        follow_answers(ended)


def _check_caching(vllm_config: VllmConfig, config: PaceConfig) -> None:
    """See to it that prefixes can be found where segments end.

    vLLM keeps the blocks of windows at the ends of prompts only, unless told to keep all.

    Beside recurrent layers no prefixes are cached unless blocks were chosen for it: a prefix can be
    reused where its blocks, its states and its banks all are, at the ends of segments of whole
    blocks. vLLM makes blocks large there, of a size that is known only when the model is built; a
    size that is too small for a state it raises, and ``plan_spec`` may refuse it.
    """
    cache = vllm_config.cache_config
    if not vllm_config.model_config.is_hybrid:
        if cache.prefix_cache_retention_interval == 0:
            cache.prefix_cache_retention_interval = None
        return
    if not cache.enable_prefix_caching:
        return
    if not cache.user_specified_block_size or config.segment_size % cache.block_size:
        cache.enable_prefix_caching = False
        logger.warning(
            "pacellm: prefix caching is off, because beside recurrent layers a segment must be "
            "whole KV blocks, which vLLM makes large there; set --block-size and segment_size to "
            "match, or pass --no-enable-prefix-caching."
        )


def _extra_args(vllm_config: VllmConfig, params: SamplingParams, request_id: str) -> Any:
    """What a request's extra arguments become; those of other engines stay as they are."""
    if not carries_memory(vllm_config):
        return params.extra_args
    traced = is_traced(vllm_config) and params.n == 1 and notes_tokens(vllm_config)
    return with_journal_key(params.extra_args, request_id, traced)


def notes_tokens(vllm_config: VllmConfig) -> bool:
    """Whether workers of an engine with memory note what it does to a request's tokens."""
    return not _settings_class(vllm_config).no_reports


def is_traced(vllm_config: VllmConfig) -> bool:
    """Whether vLLM writes a span of each request."""
    return vllm_config.observability_config.otlp_traces_endpoint is not None


def _admit(processor: InputProcessor, request: EngineCoreRequest) -> None:
    """What a request reads of its session; of other engines' nothing is looked at."""
    if not is_pace(processor.vllm_config):
        return
    params = request.sampling_params
    if request.resumable and params and RequestSettings.of(params.extra_args).report:
        raise PaceConfigError(
            "pacellm: a report is about one answer, and streamed input has one for each turn; drop "
            "pacellm_report."
        )
    admit(processor, request, read_config)


def can_report(vllm_config: VllmConfig) -> bool:
    """Whether the workers of a checked engine have our extension, and not another one."""
    return vllm_config.parallel_config.worker_extension_cls == REPORT_EXTENSION


def carries_memory(vllm_config: VllmConfig) -> bool:
    """Whether a checked engine has layers with memory."""
    return _settings_class(vllm_config) in (vllm_config.model_config.logits_processors or ())


def _settings_class(vllm_config: VllmConfig) -> type[BatchSettings]:
    """Of an engine with memory."""
    if takes_kernels(current_platform.device_type):
        return WithKernels
    return WithDrafts if vllm_config.speculative_config else BatchSettings


def _why_no_streams(vllm_config: VllmConfig) -> str | None:
    """Why an engine takes no streamed input; None where it may, as every engine without memory."""
    if not carries_memory(vllm_config) or not vllm_config.scheduler_config.async_scheduling:
        return None
    return (
        "pacellm: streamed input does not work with memory and asynchronous scheduling, because a "
        "bank has read the token that vLLM takes back at the end of a turn; serve with "
        "--no-async-scheduling."
    )


def _check_turn(vllm_config: VllmConfig, first: SamplingParams, later: SamplingParams) -> None:
    """``PaceConfigError`` where a turn of streamed input changes what memory computes."""
    if not carries_memory(vllm_config):
        return
    rules = read_config(vllm_config).rules()
    mine, its = (RequestSettings.of(params.extra_args).key(rules) for params in (first, later))
    if mine != its:
        raise PaceConfigError(
            "pacellm: a later turn of streamed input cannot change the memory's settings, because "
            "a request that is preempted is computed again from its beginning under one set of "
            "them; give every turn the settings of the first."
        )


def known_harm(config: PaceConfig) -> str | None:
    """What ``config`` does to real models, one sentence; None if nothing is known against it."""
    if not config.noise or not config.alpha or not config.negative_k or config.clip:
        return None
    return (
        f"pacellm: noise = {config.noise:g} adds the least similar slots to every token, and in "
        "some models one of them is the attention sink, whose activation is enormous: with preset "
        "official SmolLM2-135M lost 0.43 nats a token from position 1024 to 4096, with paper 1.85; "
        "set clip to true or use preset gentle, unless you reproduce published results."
    )


def growth(config: PaceConfig) -> str | None:
    """One sentence where slots may grow without bound; None where they cannot."""
    rules = config.rules()
    fed_back = rules.alpha * (rules.mid_weight + (rules.noise if rules.negative_k else 0.0))
    if rules.update is UpdateRule.PAPER or fed_back <= 1:
        return None
    return (
        f"pacellm: alpha x ({rules.mid_weight:g} + noise) = {fed_back:g} is above 1, so what is "
        "merged into slots can grow from segment to segment, in float16 until it is no number; "
        "set a smaller alpha or noise."
    )


def not_compared(architecture: str) -> str | None:
    """One sentence where memory of ``architecture`` was not held to anything independent."""
    base = ARCHITECTURES[architecture]
    if base.architecture in TEXTS_COMPARED:
        return (
            f"pacellm: memory in {base.architecture} was compared with an independent computation "
            "for texts, and not for what else it takes; docs/models.md lists those that were."
        )
    if compared_as(base):
        return None
    return (
        f"pacellm: memory in {base.architecture} was not compared with an independent "
        "computation, only its layers were recognised by what they are made of; docs/models.md "
        "lists the architectures that were."
    )


def _check_memory(vllm_config: VllmConfig) -> None:
    model = vllm_config.model_config
    parallel = vllm_config.parallel_config
    refusals = {
        "speculative decoding like this": _speculation(vllm_config),
        "pipeline parallelism on model runner V2": (
            parallel.pipeline_parallel_size > 1 and vllm_config.use_v2_model_runner,
            "it tells only the last stage what requests have set; set VLLM_USE_V2_MODEL_RUNNER=0 "
            "or use --tensor-parallel-size",
        ),
        "recurrent layers on model runner V2": (
            bool(model.is_hybrid and vllm_config.use_v2_model_runner),
            "it does not say which request a row of a batch is of, and settings would be "
            "another's; set VLLM_USE_V2_MODEL_RUNNER=0",
        ),
        "batch-invariant mode on model runner V2": (
            envs.VLLM_BATCH_INVARIANT and vllm_config.use_v2_model_runner,
            "it wants to know of every layer with a cache that a token's bits do not depend on its "
            "batch, which was not looked at on a GPU; unset VLLM_BATCH_INVARIANT, or set "
            "VLLM_USE_V2_MODEL_RUNNER=0",
        ),
        "one KV cache manager for all kinds of layers": (
            vllm_config.scheduler_config.disable_hybrid_kv_cache_manager is True,
            "banks need one of their own; drop --disable-hybrid-kv-cache-manager",
        ),
        "context parallelism": (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
            "a bank needs all tokens of its request on one rank; set the context parallel sizes "
            "to 1",
        ),
        "a model without attention": (
            bool(model.is_attention_free),
            "those that vLLM has are recurrent throughout and have no FFN to remember anything of; "
            "serve it without pacellm",
        ),
        "recurrent layers in pipeline stages": (
            bool(model.is_hybrid and parallel.pipeline_parallel_size > 1),
            "stages with different numbers of attention layers would need pages of different "
            "sizes; use --tensor-parallel-size",
        ),
        "an encoder-decoder model": (
            bool(model.is_encoder_decoder),
            "a bank knows one sequence of tokens; serve it without pacellm",
        ),
        "a device like this": (
            not (current_platform.is_cpu() or current_platform.is_cuda()),
            "its kernels are built for CUDA and were never compiled for another GPU, and its plain "
            "operators wait for the host; serve it without pacellm",
        ),
        "latent attention (MLA) on vLLM's own CPU build": (
            is_vllms_cpu_build() and bool(model.use_mla),
            "its kernels want each layer's cache apart, and banks share blocks; serve it without "
            "pacellm, or on a GPU",
        ),
        "pictures of this model on a CPU": (
            current_platform.is_cpu() and model.is_mm_prefix_lm and _takes_pictures(model),
            "its decoder lets the tokens of a picture see each other, and vLLM's attention on a "
            "CPU lets them see earlier ones only; pass --limit-mm-per-prompt '{\"image\": 0}'",
        ),
        "dual-batch overlap or microbatches": (
            bool(parallel.use_ubatching),
            "parts of a batch would read one step's metadata; drop --enable-dbo and --ubatch-size",
        ),
        "KV transfer": (
            vllm_config.kv_transfer_config is not None,
            "tokens computed elsewhere carry no memory; drop --kv-transfer-config",
        ),
        "expert parallelism of shared tokens": (
            parallel.use_sequence_parallel_moe,
            "each tensor parallel rank computes some of the tokens only, and its banks need all; "
            "drop --enable-expert-parallel, or serve without data parallelism",
        ),
        "fast prefill": (
            vllm_config.cache_config.kv_sharing_fast_prefill,
            "layers that share caches compute the last tokens of a prompt only, and banks need "
            "all; drop --kv-sharing-fast-prefill",
        ),
        "fault tolerance": (
            parallel.enable_fault_tolerance,
            "a step that failed leaves blocks in the prefix cache whose banks were never written; "
            "drop --enable-fault-tolerance",
        ),
        # vLLM turns it into a KV transfer after this check.
        "KV offloading": (
            vllm_config.cache_config.kv_offloading_size is not None,
            "attention's blocks would come back without the banks; drop --kv-offloading-size",
        ),
        "sleep mode": (
            bool(model.enable_sleep_mode),
            "waking with banks has not been tested; drop --enable-sleep-mode",
        ),
        "the pooling runner": (
            model.runner_type != "generate",
            "memory is tested for generation only; serve the base architecture",
        ),
    }
    if refusal := first_refusal("memory does", refusals):
        raise PaceConfigError(refusal)


def _takes_pictures(model: Any) -> bool:
    config = model.multimodal_config
    return config is not None and config.get_limit_per_prompt("image") > 0


def _speculation(vllm_config: VllmConfig) -> tuple[bool, str]:
    """Whether this engine's speculative decoding is refused, and why."""
    config = vllm_config.speculative_config
    if config is None:
        return False, ""
    if config.method != "ngram":
        return True, f"only n-gram drafts have been tested, not {config.method}; use ngram"
    if vllm_config.model_config.is_hybrid:
        return True, "drafts have not been tested with recurrent layers; drop --speculative-config"
    if not current_platform.is_cpu():
        return True, "drafts have been tested on the CPU only; drop --speculative-config"
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        return True, "drafts have not been tested across stages; drop --speculative-config"
    return bool(vllm_config.scheduler_config.async_scheduling), (
        "a bank must know how many drafts were accepted; pass --no-async-scheduling"
    )


def refuse_configuration(vllm_config: VllmConfig, asked: str | None = None) -> None:
    """For every other architecture: refuse a configuration, which would silently do nothing.

    So would the architecture that was ``asked`` for, and that vLLM has put another in place of.
    """
    architecture = vllm_config.model_config.architecture
    if asked:
        raise PaceConfigError(
            f"pacellm: --hf-overrides asks for {asked}, but vLLM serves this checkpoint as "
            f"{architecture}, which carries neither memory nor experts; drop it, or --model-impl "
            "where that is why."
        )
    pace = pace_architecture(architecture)
    reason = WHY_NOT.get(architecture, "pacellm serves what generates text")
    remedy = (
        f'add --hf-overrides \'{{"architectures": ["{pace}"]}}\''
        if pace
        else f"{reason}; drop pacellm from --additional-config"
    )
    raise PaceConfigError(
        f"pacellm: {CONFIG_KEY} is configured but {architecture} carries neither memory nor "
        f"experts; {remedy}."
    )
