"""PyTorch versions of the ``torch.ops._C`` operators that vLLM's CPU backend calls.

Importing this module registers them. Names, schemas and meaning are those of
csrc/cpu/torch_bindings.cpp, so the callers (v1/worker/cpu_worker.py, v1/sample/,
v1/attention/backends/cpu_attn.py, model_executor/layers/utils.py) run unchanged.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pacellm_vllm.platform.operators import operator
from pacellm_vllm.platform.paged_attention import attend


@operator("init_cpu_memory_env(SymInt[] node_ids) -> ()")
def init_cpu_memory_env(node_ids: list[int]) -> None:
    """Do nothing: NUMA binding (csrc/cpu/utils.cpp) is left to the operating system."""


@operator(
    "compute_slot_mapping_kernel_impl(Tensor query_start_loc, Tensor positions, "
    "Tensor block_table, Tensor(a3!) slot_mapping, SymInt block_size) -> ()"
)
def compute_slot_mapping(
    query_start_loc: Tensor,
    positions: Tensor,
    block_table: Tensor,
    slot_mapping: Tensor,
    block_size: int,
) -> None:
    """Write each token's cache slot, ``block_table[request, pos // bs] * bs + pos % bs``.

    query_start_loc ``[reqs + 1]`` int32, positions ``[tokens]`` int64, block_table
    ``[reqs, blocks]`` int32, slot_mapping ``[>= tokens]`` int64 (csrc/cpu, same name).
    """
    request = torch.repeat_interleave(query_start_loc.diff())
    tokens = request.numel()
    pos = positions[:tokens]
    block = block_table[request, pos // block_size].to(torch.int64)
    slot_mapping[:tokens] = block * block_size + pos % block_size


# The parameters must be named exactly as the Triton kernel's: vLLM then passes them by name.
def slot_mapping_kernel(
    num_tokens: int,
    max_num_tokens: int,
    query_start_loc_ptr: Tensor,
    positions_ptr: Tensor,
    block_table_ptr: Tensor,
    block_table_stride: int,
    slot_mapping_ptr: Tensor,
    KV_CACHE_BLOCK_SIZE: int,
    TOTAL_CP_WORLD_SIZE: int,
    TOTAL_CP_RANK: int,
    CP_KV_CACHE_INTERLEAVE_SIZE: int,
    PAD_ID: int,
    BLOCK_SIZE: int,
) -> None:
    """Stand in for ``ComputeSlotMappingKernel.kernel`` (v1/worker/block_table.py).

    Shapes as in ``compute_slot_mapping``; slots ``num_tokens .. max_num_tokens`` become PAD_ID.
    """
    if TOTAL_CP_WORLD_SIZE != 1:
        raise NotImplementedError(
            "Context parallelism is not implemented on the torch CPU platform."
        )
    compute_slot_mapping(
        query_start_loc_ptr, positions_ptr, block_table_ptr, slot_mapping_ptr, KV_CACHE_BLOCK_SIZE
    )
    slot_mapping_ptr[num_tokens:max_num_tokens] = PAD_ID


@operator("greedy_argmax(Tensor logits) -> Tensor")
def greedy_argmax(logits: Tensor) -> Tensor:
    """Index of the largest logit: ``[rows, vocab]`` to int64 ``[rows]``."""
    return logits.argmax(-1)


@operator("fused_gumbel_argmax(Tensor logits, Tensor seeds) -> Tensor")
def fused_gumbel_argmax(logits: Tensor, seeds: Tensor) -> Tensor:
    """Sample from softmax(logits): float32 ``[rows, vocab]``, int64 seeds ``[rows]`` to ``[rows]``.

    Each row's noise depends on its own seed only, as v1/sample/ops/topk_topp_sampler.py expects;
    the random stream itself is PyTorch's, not the native kernel's.
    """
    noise = torch.empty_like(logits)
    generator = torch.Generator()
    for row, seed in zip(noise, seeds.tolist(), strict=True):
        row.exponential_(generator=generator.manual_seed(seed))
    # A noise of exactly 0 would turn a banned token's -inf into NaN.
    return (logits - noise.clamp_min_(torch.finfo(noise.dtype).tiny).log_()).argmax(-1)


# vLLM sends small half-precision weights to its own GEMM on any CPU with AMX tiles, without
# asking whether that kernel is there (model_executor/layers/utils.py): loading would fail on the
# missing operators. Both can go once check_cpu_sgl_kernel checks for them.
@operator("convert_weight_packed(Tensor weight) -> Tensor")
def convert_weight_packed(weight: Tensor) -> Tensor:
    """Copy ``[out, in]`` as it is: PyTorch needs no packing."""
    return weight.clone()


@operator(
    "weight_packed_linear(Tensor(a0!) output, Tensor mat1, Tensor mat2, Tensor? bias, "
    "bool is_vnni) -> ()"
)
def weight_packed_linear(
    output: Tensor, mat1: Tensor, mat2: Tensor, bias: Tensor | None, is_vnni: bool
) -> None:
    """Write ``mat1 @ mat2.T + bias``: ``[rows, in]``, ``[out, in]``, float32 ``[out]``."""
    output.copy_(F.linear(mat1, mat2, None if bias is None else bias.to(mat1.dtype)))


# Both caches are [blocks, kv_heads, block_size, head_size] views with arbitrary strides: keys and
# values share a block, and in a packed layout so do all layers.


@operator(
    "get_scheduler_metadata(int num_req, int num_heads_q, int num_heads_kv, int head_dim, "
    "Tensor seq_lens, ScalarType dtype, Tensor query_start_loc, bool casual, int window_size, "
    "str isa_hint, bool enable_kv_split, Tensor? dynamic_causal, "
    'str kv_cache_dtype="auto") -> Tensor'
)
def get_scheduler_metadata(*args: Any) -> Tensor:
    """Return an empty plan: attention here needs none (csrc/cpu/cpu_attn.cpp)."""
    return torch.empty(0)


@operator(
    "cpu_attn_reshape_and_cache(Tensor key, Tensor value, Tensor(a2!) key_cache, "
    "Tensor(a3!) value_cache, Tensor slot_mapping, str isa, float k_scale=1.0, "
    'float v_scale=1.0, str kv_cache_dtype="auto") -> ()'
)
def reshape_and_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *_unused: Any,
) -> None:
    """Write new keys and values into their slots (csrc/cpu/cpu_attn.cpp).

    key and value ``[>= tokens, kv_heads, head_size]``, slot_mapping ``[tokens]`` int64; negative
    slots are padding.
    """
    tokens = min(slot_mapping.numel(), key.shape[0])
    slots, key, value = slot_mapping[:tokens], key[:tokens], value[:tokens]
    used = slots >= 0
    if not used.all():
        slots, key, value = slots[used], key[used], value[used]
    block_size = key_cache.shape[2]
    block, offset = slots // block_size, slots % block_size
    key_cache[block, :, offset] = key.to(key_cache.dtype)
    value_cache[block, :, offset] = value.to(value_cache.dtype)


@operator(
    "cpu_attention_with_kv_cache(Tensor query, Tensor key_cache, Tensor value_cache, "
    "Tensor(a3!) output, Tensor query_start_loc, Tensor seq_lens, float scale, bool causal, "
    "Tensor? alibi_slopes, SymInt sliding_window_size, Tensor block_table, float softcap, "
    "Tensor scheduler_metadata, Tensor? s_aux, Tensor? dynamic_causal, float k_scale=1.0, "
    'float v_scale=1.0, str kv_cache_dtype="auto") -> ()'
)
def attention_with_kv_cache(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    output: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    scale: float,
    causal: bool,
    alibi_slopes: Tensor | None,
    window: int,
    block_table: Tensor,
    softcap: float,
    scheduler_metadata: Tensor,
    sinks: Tensor | None,
    dynamic_causal: Tensor | None,
    *_unused: Any,
) -> None:
    """Attend from each request's last tokens to its cache (csrc/cpu/cpu_attn.cpp).

    query ``[tokens, heads, head_size]``, output of the same number of elements,
    query_start_loc ``[reqs + 1]``, seq_lens ``[reqs]``, block_table ``[reqs, blocks]`` int32,
    dynamic_causal ``[reqs]`` in place of ``causal`` if given, sinks ``[heads]``: one more logit of
    every query, whose share of the softmax goes nowhere. With ``window > 0`` the query at
    position p sees p - window + 1 .. p (and, if not causal, as far to the right). Slots outside
    that range or past seq_len never influence the output, whatever they hold.
    """
    if alibi_slopes is not None:
        raise NotImplementedError("ALiBi attention is not implemented on the torch CPU platform.")
    requests = len(seq_lens)
    attend(
        query,
        key_cache,
        value_cache,
        output.view(query.shape),
        query_start_loc,
        seq_lens,
        [causal] * requests if dynamic_causal is None else dynamic_causal.tolist(),
        block_table,
        scale,
        window,
        softcap,
        sinks,
    )
