"""Experts in a vLLM decoder: weights in expert order as they load, and routed FFNs."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from vllm.config import CompilationMode, VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    get_tp_group,
    tensor_model_parallel_all_reduce,
)
from vllm.platforms import current_platform

from pacellm_vllm.compat import plugin_logger
from pacellm_vllm.experts.errors import ExpertsError
from pacellm_vllm.experts.ffn import FfnWeights, grouped_activations, grouped_output, masked
from pacellm_vllm.experts.loading import ExpertsPlan, Reorder
from pacellm_vllm.experts.routing import ExpertRouter
from pacellm_vllm.experts.settings import ExpertsConfig, check_ranks
from pacellm_vllm.platform.torch_cpu import TorchCpuPlatform

logger = plugin_logger()

# Fields of a Hugging Face configuration that say how many experts a mixture has.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")

# Those that hand whole tensors, under the checkpoint's names, to the model.
LOAD_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "runai_streamer", "npcache", "pt")


class RoutedExperts(nn.Module):
    """What an FFN computes for each token: the experts that its router chooses.

    The router knows the experts of all tensor parallel ranks, so ranks choose alike; each
    computes its own. On the pure-PyTorch CPU platform tokens are grouped by expert; elsewhere
    everything is computed and then masked, with shapes that graphs can hold.
    """

    def __init__(self, config: ExpertsConfig, num_experts: int, mlp: Any, grouped: bool) -> None:
        super().__init__()
        weight = mlp.gate_up_proj.weight
        self.router = ExpertRouter(
            num_experts,
            mlp.gate_up_proj.input_size,
            mlp.act_fn,
            top_k=config.top_k,
            mass=config.mass,
            dtype=weight.dtype,
            device=weight.device,
        )
        self.grouped = grouped
        ranks = get_tensor_model_parallel_world_size()
        share = num_experts // ranks
        rank = get_tensor_model_parallel_rank()
        self.mine = slice(rank * share, (rank + 1) * share)

    def activations(self, mlp: Any, x: torch.Tensor) -> torch.Tensor:
        """This rank's activations [tokens, D / ranks], zero in experts that were not chosen."""
        chosen = self.router.choose(x)[:, self.mine]
        if self.grouped:
            return grouped_activations(x, _weights(mlp), chosen)
        gate_up, _ = mlp.gate_up_proj(x)
        return masked(mlp.act_fn(gate_up), chosen)

    def output(self, mlp: Any, x: torch.Tensor) -> torch.Tensor:
        """The FFN's output [tokens, H] for ``x`` [tokens, H]."""
        if not self.grouped:
            out, _ = mlp.down_proj(self.activations(mlp, x))
            return out
        out = grouped_output(x, _weights(mlp), self.router.choose(x)[:, self.mine])
        down = mlp.down_proj
        if down.reduce_results and down.tp_size > 1:
            out = tensor_model_parallel_all_reduce(out)
        return out


def _weights(mlp: Any) -> FfnWeights:
    down = mlp.down_proj
    return FfnWeights(
        mlp.gate_up_proj.weight,
        down.weight,
        mlp.act_fn,
        mlp.gate_up_proj.bias,
        # As RowParallelLinear: the sum over ranks has it once.
        down.bias if down.tp_rank == 0 else None,
    )


class ModelExperts:
    """The experts of one model: its plan, and the routed FFNs whose routers it fills."""

    def __init__(self, vllm_config: VllmConfig, config: ExpertsConfig) -> None:
        self.config = config
        self.plan = plan_experts(vllm_config, config)
        self.routed: dict[int, RoutedExperts] = {}
        # vLLM's own CPU build packs weights, and a compiled model cannot loop over experts.
        self._grouped = (
            isinstance(current_platform, TorchCpuPlatform)
            and vllm_config.compilation_config.mode == CompilationMode.NONE
        )

    def attach(self, mlp: Any, index: int) -> None:
        """Route the FFN of layer ``index``, if it has experts and routing is on."""
        if self.config.routed and index in self.plan.layers:
            self.routed[index] = RoutedExperts(
                self.config, self.plan.num_experts, mlp, self._grouped
            )
            mlp.experts = self.routed[index]

    def reorder(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[Any]:
        """``weights`` with the neurons in expert order, whatever the number of ranks."""
        pass_ = Reorder(self.plan, self._observe)
        yield from pass_(weights)
        check_agreement(pass_.orders)
        if get_tensor_model_parallel_rank() == 0:
            logger.info("pacellm: %s; %s.", self.plan.summary, self._routing())

    def _observe(self, index: int, gate: torch.Tensor, up: torch.Tensor) -> None:
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
        how = "grouped by expert" if self._grouped else "by masking, which saves no time here"
        return f"a token computes {part}, {how}"


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
        f"--load-format {load_format}": (
            load_format not in LOAD_FORMATS,
            f"weights must pass through the model's loader; use one of {', '.join(LOAD_FORMATS)}",
        ),
    }
    for what, (found, why) in refusals.items():
        if found:
            raise ExpertsError(f"pacellm: experts do not work with {what}: {why}.")
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
