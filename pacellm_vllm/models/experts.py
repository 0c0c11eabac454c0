"""Experts in a vLLM decoder: weights in expert order as they load, and which FFNs are routed."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    get_tp_group,
)
from vllm.model_executor.layers.linear import RowParallelLinear

from pacellm_vllm.compat import plugin_logger
from pacellm_vllm.experts.errors import ExpertsError
from pacellm_vllm.experts.loading import ExpertsPlan, Reorder
from pacellm_vllm.experts.settings import EXPERT_COUNTS, ExpertsConfig, check_ranks
from pacellm_vllm.models.ffn import FeedForward
from pacellm_vllm.models.routed import RoutedExperts, way_of
from pacellm_vllm.sentences import first_refusal

logger = plugin_logger()

# What FFNs with experts are made of, and where they hang: those that the loader knows by name.
_KINDS = (("gate_up_proj", "down_proj"), ("up_proj", "down_proj"), ("c_fc", "c_proj"))
_PLACE = re.compile(r"(?:^|\.)layers\.\d+\.mlp$")

# Those that hand whole tensors, under the checkpoint's names, to the model.
LOAD_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "runai_streamer", "npcache", "pt")

_SAID = {
    "grouped": "grouped by expert",
    "fused": "by the fused MoE kernel",
    "masked": "by masking, which saves no time here",
}


def check_ffn(ffn: FeedForward) -> None:
    """Raise ``ExpertsError`` unless neurons of ``ffn`` can be moved and routed."""
    known = (ffn.input_name, ffn.output_name) in _KINDS and _PLACE.search(ffn.name)
    if not known or not isinstance(ffn.output, RowParallelLinear):
        kinds = ", ".join("/".join(kind) for kind in _KINDS)
        raise ExpertsError(
            f"pacellm: {ffn.name} ({type(ffn.module).__name__}) is not an FFN for experts (it has "
            f"{ffn.input_name}/{ffn.output_name}); it must have one of {kinds} in layers.<i>.mlp, "
            "shared out among ranks: serve the model without experts."
        )


class ModelExperts:
    """The experts of one model: its plan, and the routed FFNs whose routers it fills."""

    def __init__(self, vllm_config: VllmConfig, config: ExpertsConfig) -> None:
        self.config = config
        self.plan = plan_experts(vllm_config, config)
        self.routed: dict[int, RoutedExperts] = {}
        self._orders: dict[int, torch.Tensor | None] = {}
        self._way = way_of(vllm_config)
        self._gated = True

    def attach(self, ffn: FeedForward, index: int) -> RoutedExperts | None:
        """What routes ``ffn``, the one of layer ``index``; None where routing is off.

        Raises ``ExpertsError`` if its neurons cannot be moved.
        """
        check_ffn(ffn)
        self._gated = ffn.gated
        if not self.config.routed:
            return None
        self.routed[index] = RoutedExperts(
            self.config, self.plan.num_experts, ffn, self._way, index
        )
        return self.routed[index]

    def reorder(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[Any]:
        """``weights`` with the neurons in expert order, whatever the number of ranks."""
        pass_ = Reorder(self.plan, self._observe, self._gated, self._orders)
        yield from pass_(weights)
        check_agreement(pass_.orders)
        if get_tensor_model_parallel_rank() == 0:
            logger.info("pacellm: %s; %s.", self.plan.summary, self._routing())

    def report(self) -> dict[int, dict[str, Any]]:
        """By layer: K, how its experts are computed, and what ``RoutedExperts.report`` counted."""
        return {
            layer: {"num_experts": self.plan.num_experts, **routed.report()}
            if (routed := self.routed.get(layer))
            else {"num_experts": self.plan.num_experts, "way": "all", "tokens": None, "share": 1.0}
            for layer in self.plan.layers
        }

    def _observe(self, index: int, gate: torch.Tensor, up: torch.Tensor | None) -> None:
        if index in self.routed:
            self.routed[index].router.fill(gate, up)

    def _routing(self) -> str:
        if not self.config.routed:
            return "every token computes all of them"
        part = (
            f"{self.config.top_k}"
            if self.config.top_k
            else f"those with {100 * (self.config.mass or 1):g} % of the predicted activation"
        )
        return f"a token computes {part}, {_SAID[self._way]}"


def plan_experts(vllm_config: VllmConfig, config: ExpertsConfig) -> ExpertsPlan:
    """The plan for this engine's model; ``ExpertsError`` if the settings do not fit it."""
    model = vllm_config.model_config
    layers = model.get_total_num_hidden_layers()
    return ExpertsPlan.of(config, layers, model.hf_text_config.intermediate_size)


def check_experts(vllm_config: VllmConfig, config: ExpertsConfig) -> None:
    """Raise ``ExpertsError`` about settings, or features of the engine, that do not fit."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    mixture = next((n for n in EXPERT_COUNTS if getattr(model.hf_text_config, n, None)), None)
    load_format = vllm_config.load_config.load_format
    refusals = {
        f"a mixture-of-experts model ({mixture})": (
            mixture is not None,
            "its FFNs are experts already; serve it without pacellm",
        ),
        "a multimodal model": (
            model.hf_config is not model.hf_text_config,
            "clustered checkpoints were tested on text models; serve it without experts",
        ),
        f"quantised weights ({model.quantization})": (
            model.quantization is not None,
            "neurons cannot be moved in packed weights; cluster the original checkpoint, quantise "
            "the result, and serve that as the base architecture",
        ),
        "LoRA": (
            vllm_config.lora_config is not None,
            "an adapter made for the original order of neurons would act on others; drop "
            "--enable-lora, or merge the adapter before clustering",
        ),
        "pipeline parallelism": (
            parallel.pipeline_parallel_size > 1,
            "loading has not been tested across stages; use --tensor-parallel-size",
        ),
        "speculative decoding": (
            vllm_config.speculative_config is not None,
            "drafts have not been tested with experts; drop --speculative-config",
        ),
        "weight transfer": (
            vllm_config.weight_transfer_config is not None,
            "weights come a tensor at a time, and neurons are moved a whole FFN at a time; drop "
            "--weight-transfer-config",
        ),
        "KV transfer": (
            vllm_config.kv_transfer_config is not None,
            "no connector checks that both engines have the same experts; drop "
            "--kv-transfer-config",
        ),
        "dual-batch overlap or microbatches": (
            bool(parallel.use_ubatching),
            "they have not been tested; drop --enable-dbo and --ubatch-size",
        ),
        f"--load-format {load_format}": (
            load_format not in LOAD_FORMATS,
            f"weights must pass through the model's loader; use one of {', '.join(LOAD_FORMATS)}",
        ),
    }
    if refusal := first_refusal("experts do", refusals):
        raise ExpertsError(refusal)
    plan = plan_experts(vllm_config, config)
    check_ranks(plan.num_experts, parallel.tensor_parallel_size)


def check_agreement(orders: dict[int, torch.Tensor | None]) -> None:
    """Raise ``ExpertsError`` unless all tensor parallel ranks have the same orders."""
    if get_tensor_model_parallel_world_size() == 1:
        return
    digest = hashlib.sha256()
    for index in sorted(orders):
        order = orders[index]
        digest.update(str(index).encode() + (b"" if order is None else order.numpy().tobytes()))
    group = get_tp_group()
    found: list[Any] = [None] * group.world_size
    torch.distributed.all_gather_object(found, digest.hexdigest(), group=group.cpu_group)
    if len(set(found)) > 1:
        raise ExpertsError(
            "pacellm: tensor parallel ranks clustered to different orders; run pacellm cluster "
            "once and give its directory as experts.path."
        )
