"""Custom operators, and the one of vLLM's that is borrowed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def register_custom_op(name: str, function: Callable[..., None], mutates: list[str]) -> None:
    """Register ``torch.ops.vllm.<name>``, which returns nothing and writes to ``mutates``.

    Symptom: graphs are split at operators of vLLM's own library only, which it shows nobody but in
    its utilities.
    Can go when ``torch.library.custom_op`` costs as little in every step.
    """
    from vllm.utils.torch_utils import direct_register_custom_op

    def fake(*args: Any, **kwargs: Any) -> None:
        return None

    direct_register_custom_op(op_name=name, op_func=function, mutates_args=mutates, fake_impl=fake)


def add_splitting_op(vllm_config: VllmConfig, op_name: str) -> None:
    """Keep ``torch.ops.vllm.<op_name>`` out of compiled and captured graphs.

    Symptom: the op reads this step's metadata on the host, which a graph would freeze.
    vLLM's own state-carrying layers add themselves to the same list.
    Can go when custom ops can be declared splitting where they are registered.
    """
    name = f"vllm::{op_name}"
    ops = vllm_config.compilation_config.splitting_ops
    if ops is not None and name not in ops:
        ops.append(name)


def eager_in_graphs(function: Callable[..., None]) -> Callable[..., None]:
    """Run the body of a custom op eagerly during breakable CUDA graph capture.

    Symptom and end: those of :func:`add_splitting_op`, under VLLM_USE_BREAKABLE_CUDAGRAPH=1.
    """
    from vllm.compilation.breakable_cudagraph import eager_break_during_capture

    return eager_break_during_capture(function)


def grouped_product_tiles(tokens: int, experts: int, width: int, inner: int) -> dict[str, int]:
    """Tile sizes for :func:`grouped_product`: vLLM's defaults for such a mixture of experts.

    Symptom and end: those of :func:`grouped_product`.
    """
    from vllm.model_executor.layers.fused_moe.fused_moe import get_default_config

    return get_default_config(tokens, experts, width, inner, experts, None)


def grouped_product(
    x: torch.Tensor,
    weights: torch.Tensor,
    out: torch.Tensor,
    groups: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    bias: torch.Tensor | None,
    tiles: dict[str, int],
) -> None:
    """``out[t, e] = weights[e] x[t] + bias[e]`` for some pairs of token t and expert e, on a GPU.

    Args:
        x: [tokens, H], bf16 or fp16.
        weights: [experts, n, H], any strides; bias [experts, n].
        out: [tokens, experts, n], written for the pairs only.
        groups: pairs t experts + e by expert, the expert of each tile, and how many pairs, as
            ``experts.fused.by_expert`` makes them for ``tiles["BLOCK_SIZE_M"]``.

    Symptom: vLLM's public ``fused_experts`` puts a fixed number of experts, a known activation and
    the sum over experts into one call; the product inside is not public.
    Can go when it is, or when our kernels have one.
    """
    from vllm.model_executor.layers.fused_moe import fused_moe
    from vllm.triton_utils import tl

    fused_moe.invoke_fused_moe_triton_kernel(
        x,
        weights,
        out,
        A_scale=None,
        B_scale=None,
        topk_weights=None,
        sorted_token_ids=groups[0],
        expert_ids=groups[1],
        num_tokens_post_padded=groups[2],
        mul_routed_weight=False,
        top_k=len(weights),
        config=tiles,
        compute_type={
            torch.float16: tl.float16,
            torch.bfloat16: tl.bfloat16,
            torch.float32: tl.float32,
        }[x.dtype],
        use_fp8_w8a8=False,
        use_int8_w8a8=False,
        use_int8_w8a16=False,
        use_int4_w4a16=False,
        per_channel_quant=False,
        B_bias=bias,
    )
