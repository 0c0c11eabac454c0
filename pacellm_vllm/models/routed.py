"""RoutedExperts: an FFN of a vLLM decoder of which each token computes some experts."""

from typing import Any, Literal

import torch
from torch import nn
from vllm.config import CompilationMode, VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON

from pacellm_vllm.compat import register_custom_op, rows_of_requests
from pacellm_vllm.experts.ffn import FfnWeights, grouped_activations, grouped_output, masked
from pacellm_vllm.experts.fused import fused_activations, fused_output
from pacellm_vllm.experts.routing import ExpertRouter
from pacellm_vllm.experts.settings import ExpertsConfig
from pacellm_vllm.memory.layer import PaceMemory, note_experts
from pacellm_vllm.models.ffn import FeedForward
from pacellm_vllm.platform.torch_cpu import TorchCpuPlatform

Way = Literal["grouped", "fused", "masked"]
_COMPUTE = {
    "grouped": (grouped_activations, grouped_output),
    "fused": (fused_activations, fused_output),
}


def way_of(vllm_config: VllmConfig) -> Way:
    """How routed experts are computed in this engine.

    ``grouped``: expert by expert in plain PyTorch, on our CPU platform. ``fused``: by kernels, on
    an NVIDIA GPU. ``masked``: everything is computed, and zero where it was not chosen.
    """
    compiled = vllm_config.compilation_config.mode != CompilationMode.NONE
    # vLLM's own CPU build packs weights, and a compiled model cannot loop over experts.
    if isinstance(current_platform, TorchCpuPlatform) and not compiled:
        return "grouped"
    # On float32 the kernel would multiply in tf32.
    half = vllm_config.model_config.dtype in (torch.bfloat16, torch.float16)
    return "fused" if current_platform.is_cuda() and HAS_TRITON and half else "masked"


class RoutedExperts(nn.Module):
    """What an FFN computes for each token: the experts that its router chooses.

    The router knows the experts of all tensor parallel ranks, so ranks choose alike; each
    computes its own. ``counts`` [2] int64 are experts computed, and tokens. ``index`` is the
    decoder layer's.
    """

    counts: torch.Tensor

    def __init__(
        self, config: ExpertsConfig, num_experts: int, ffn: FeedForward, way: Way, index: int
    ) -> None:
        super().__init__()
        weight = ffn.input.weight
        self.router = ExpertRouter(
            num_experts,
            ffn.input.input_size,
            ffn.activation,
            top_k=config.top_k,
            mass=config.mass,
            gated=ffn.gated,
            dtype=weight.dtype,
            device=weight.device,
        )
        self.way = way
        self._index = index
        counts = torch.zeros(2, dtype=torch.int64, device=weight.device)
        self.register_buffer("counts", counts, persistent=False)
        self._ffn = ffn
        share = num_experts // get_tensor_model_parallel_world_size()
        rank = get_tensor_model_parallel_rank()
        self._mine = slice(rank * share, (rank + 1) * share)

    def activations(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's activations [tokens, D / ranks], zero in experts that were not chosen."""
        chosen = self._choose(x)
        if self.way == "masked":
            return masked(self._ffn.activation(_project(self._ffn.input, x)), chosen)
        compute, _ = _COMPUTE[self.way]
        return compute(x, _weights(self._ffn), chosen)

    def output(self, x: torch.Tensor, memory: PaceMemory | None) -> torch.Tensor:
        """The FFN's output [tokens, H] for ``x`` [tokens, H]."""
        down = self._ffn.output
        if memory is not None or self.way == "masked":
            a = self.activations(x)
            return _project(down, a if memory is None else memory(a))
        _, compute = _COMPUTE[self.way]
        out = compute(x, _weights(self._ffn), self._choose(x))
        if down.reduce_results and down.tp_size > 1:
            out = tensor_model_parallel_all_reduce(out)
        return out

    def report(self) -> dict[str, Any]:
        """How experts are computed, for how many tokens, and which share of them; on the host."""
        computed, tokens = self.counts.tolist()
        experts = tokens * self.router.num_experts
        return {"way": self.way, "tokens": tokens, "share": computed / experts if tokens else None}

    def _choose(self, x: torch.Tensor) -> torch.Tensor:
        """Which of this rank's experts each token computes, [tokens, K / ranks] bool."""
        chosen = self.router.choose(x)
        torch.ops.vllm.pacellm_count_experts(chosen, self.counts, self._index)
        return chosen[:, self._mine].contiguous()


class RoutedFeedForward:
    """Mixin: an FFN of which each token computes the experts that ``experts`` chooses."""

    experts: RoutedExperts
    memory: PaceMemory | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Models of vLLM's Transformers backend have a batch of one.
        out = self.experts.output(x.reshape(-1, x.shape[-1]), self.memory)
        return out.view(x.shape)


def route(ffn: FeedForward, experts: RoutedExperts, memory: PaceMemory | None) -> None:
    """Let ``ffn`` compute what ``experts`` choose, with ``memory`` in between if there is one."""
    base = type(ffn.module)
    ffn.module.__class__ = type(f"Routed{base.__name__}", (RoutedFeedForward, base), {})
    ffn.module.experts, ffn.module.memory = experts, memory


def _project(linear: Any, x: torch.Tensor) -> torch.Tensor:
    """What a linear layer of vLLM's makes of ``x``; some return a bias beside it."""
    out = linear(x)
    return out[0] if linear.return_bias else out


def _weights(ffn: FeedForward) -> FfnWeights:
    return FfnWeights(
        ffn.input.weight,
        ffn.output.weight,
        ffn.activation,
        ffn.input.bias,
        # As RowParallelLinear: the sum over ranks has it once.
        ffn.output.bias if ffn.output.tp_rank == 0 else None,
    )


def _count_op(chosen: torch.Tensor, counts: torch.Tensor, index: int) -> None:
    """Add what the tokens of requests chose to ``counts``, on their device, and note it for those
    that asked to be told.
    """
    note_experts(index, chosen)
    real = rows_of_requests(len(chosen))
    if real is not None:
        counts += torch.stack([(chosen & real[:, None]).sum(), real.sum()])


register_custom_op("pacellm_count_experts", _count_op, mutates=["counts"])
