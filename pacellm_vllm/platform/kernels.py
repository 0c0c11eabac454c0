"""PyTorch versions of the ``torch.ops._C`` operators that vLLM's CPU backend calls.

Importing this module registers them. Names, schemas and meaning are those of
csrc/cpu/torch_bindings.cpp, so the callers (v1/worker/cpu_worker.py, v1/sample/,
v1/attention/backends/cpu_attn.py, model_executor/layers/utils.py) run unchanged.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

_lib = torch.library.Library("_C", "FRAGMENT")
_Fn = TypeVar("_Fn", bound=Callable[..., Any])

# Bounds on temporary tensors, in elements, which also keep them near the caches: gathered keys (or
# values) of one decode batch, and the mask (with soft-capping: the logits) of one prefill tile.
_GATHER_ELEMENTS = 1 << 20
_TILE_ELEMENTS = 1 << 22


def _op(schema: str) -> Callable[[_Fn], _Fn]:
    def register(fn: _Fn) -> _Fn:
        _lib.define(schema)
        _lib.impl(schema.partition("(")[0], fn, "CompositeExplicitAutograd")
        return fn

    return register


@_op("init_cpu_memory_env(SymInt[] node_ids) -> ()")
def init_cpu_memory_env(node_ids: list[int]) -> None:
    """Do nothing: NUMA binding (csrc/cpu/utils.cpp) is left to the operating system."""


@_op(
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


@_op("greedy_argmax(Tensor logits) -> Tensor")
def greedy_argmax(logits: Tensor) -> Tensor:
    """Index of the largest logit: ``[rows, vocab]`` to int64 ``[rows]``."""
    return logits.argmax(-1)


@_op("fused_gumbel_argmax(Tensor logits, Tensor seeds) -> Tensor")
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
@_op("convert_weight_packed(Tensor weight) -> Tensor")
def convert_weight_packed(weight: Tensor) -> Tensor:
    """Copy ``[out, in]`` as it is: PyTorch needs no packing."""
    return weight.clone()


@_op(
    "weight_packed_linear(Tensor(a0!) output, Tensor mat1, Tensor mat2, Tensor? bias, "
    "bool is_vnni) -> ()"
)
def weight_packed_linear(
    output: Tensor, mat1: Tensor, mat2: Tensor, bias: Tensor | None, is_vnni: bool
) -> None:
    """Write ``mat1 @ mat2.T + bias``: ``[rows, in]``, ``[out, in]``, float32 ``[out]``."""
    output.copy_(F.linear(mat1, mat2, None if bias is None else bias.to(mat1.dtype)))


# Paged attention. Both caches are [blocks, kv_heads, block_size, head_size] views with arbitrary
# strides: keys and values share a block, and in a packed layout so do all layers.


@_op(
    "get_scheduler_metadata(int num_req, int num_heads_q, int num_heads_kv, int head_dim, "
    "Tensor seq_lens, ScalarType dtype, Tensor query_start_loc, bool casual, int window_size, "
    "str isa_hint, bool enable_kv_split, Tensor? dynamic_causal, "
    'str kv_cache_dtype="auto") -> Tensor'
)
def get_scheduler_metadata(*args: Any) -> Tensor:
    """Return an empty plan: attention below needs none (csrc/cpu/cpu_attn.cpp)."""
    return torch.empty(0)


@_op(
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


@_op(
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
    output = output.view(query.shape)
    starts = query_start_loc.tolist()
    kv_lens = seq_lens.tolist()
    causals = [causal] * len(kv_lens) if dynamic_causal is None else dynamic_causal.tolist()
    decodes = []
    for req, kv_len in enumerate(kv_lens):
        begin, end = starts[req], starts[req + 1]
        if end - begin == 1:
            decodes.append(req)
        elif end > begin:
            _attend_many_queries(
                query[begin:end],
                key_cache,
                value_cache,
                output[begin:end],
                block_table[req],
                kv_len,
                scale,
                bool(causals[req]),
                window,
                softcap,
                sinks,
            )
    token_cost = key_cache.shape[1] * key_cache.shape[3]
    for reqs in _batches_of_similar_length(decodes, kv_lens, window, token_cost):
        index = torch.tensor(reqs)
        tokens = query_start_loc[index].to(torch.int64)
        output[tokens] = _attend_one_query_each(
            query[tokens],
            key_cache,
            value_cache,
            block_table[index],
            seq_lens[index].to(torch.int64),
            scale,
            window,
            softcap,
            sinks,
        )


def _batches_of_similar_length(
    reqs: list[int], kv_lens: list[int], window: int, token_cost: int
) -> Iterator[list[int]]:
    """Split requests so that padding at most doubles the work and memory stays bounded."""

    def span(req: int) -> int:
        return min(kv_lens[req], window) if window > 0 else kv_lens[req]

    batch: list[int] = []
    for req in sorted(reqs, key=span, reverse=True):
        if batch:
            longest = span(batch[0])
            too_big = longest * token_cost * (len(batch) + 1) > _GATHER_ELEMENTS
            if too_big or 2 * span(req) < longest:
                yield batch
                batch = []
        batch.append(req)
    if batch:
        yield batch


def _attend_one_query_each(
    query: Tensor,  # [reqs, heads, head_size]
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,  # [reqs, blocks]
    kv_lens: Tensor,  # [reqs] int64
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """Attend from the last position of every request at once; returns the shape of query."""
    reqs = query.shape[0]
    kv_heads, block_size, head_size = key_cache.shape[1:]
    first = (kv_lens - window).clamp_min(0) if window > 0 else torch.zeros_like(kv_lens)
    first_block, last_block = first // block_size, (kv_lens - 1) // block_size
    span = int((last_block - first_block).max()) + 1
    column = first_block[:, None] + torch.arange(span)
    # Rows are padded with a block of their own: the table's spare entries are arbitrary.
    blocks = block_table.gather(1, torch.minimum(column, last_block[:, None])).flatten()
    position = (column[:, :, None] * block_size + torch.arange(block_size)).flatten(1)
    dead = (position >= kv_lens[:, None]) | (position < first[:, None])  # [reqs, kv]
    dead_index = dead.nonzero(as_tuple=True)

    def gather(cache: Tensor) -> Tensor:
        rows = _blocks_of(cache, blocks).to(query.dtype).view(kv_heads, reqs, -1, head_size)
        # Zeroed, not only masked: a dead slot may hold NaN, and 0 * NaN is NaN.
        rows[:, dead_index[0], dead_index[1]] = 0
        return rows

    out = _attend(
        query.unflatten(1, (kv_heads, -1)).transpose(0, 1),
        gather(key_cache),
        gather(value_cache),
        scale,
        softcap,
        ~dead[None, :, None] if dead_index[0].numel() else None,
        sinks=None if sinks is None else sinks.view(kv_heads, 1, -1, 1),
    )
    return out.transpose(0, 1).flatten(1, 2)


def _attend_many_queries(
    query: Tensor,  # [queries, heads, head_size]
    key_cache: Tensor,
    value_cache: Tensor,
    output: Tensor,
    block_row: Tensor,  # [blocks]
    kv_len: int,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> None:
    """Attend from the last positions of one request, a tile of queries at a time."""
    queries, heads = query.shape[:2]
    kv_heads, block_size, head_size = key_cache.shape[1:]
    context = kv_len - queries  # the first query's position

    def first_seen(position: int) -> int:
        return max(0, position - window + 1) if window > 0 else 0

    origin = first_seen(context) // block_size * block_size
    blocks = block_row[origin // block_size : -(-kv_len // block_size)]

    def gather(cache: Tensor) -> Tensor:
        rows = _blocks_of(cache, blocks).to(query.dtype)
        # Every query head of a group looks at the same copy.
        return rows.view(kv_heads, 1, -1, head_size).expand(-1, heads // kv_heads, -1, -1)

    keys, values = gather(key_cache), gather(value_cache)
    grouped = query.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
    unfused = bool(softcap) or sinks is not None
    if causal and window <= 0 and not unfused:
        out = _attend_causally(grouped, keys[:, :, :kv_len], values[:, :, :kv_len], scale)
        output.copy_(out.permute(2, 0, 1, 3).flatten(1, 2))
        return
    row_cost = kv_len * (heads if unfused else 1)
    tile = max(1, _TILE_ELEMENTS // row_cost)
    for begin in range(0, queries, tile):
        end = min(begin + tile, queries)
        low, high = first_seen(context + begin), kv_len
        if causal:
            high = context + end
        elif window > 0:
            high = min(kv_len, context + end + window - 1)
        seen = None
        if causal or window > 0:
            distance = torch.arange(context + begin, context + end)[:, None]
            distance = distance - torch.arange(low, high)
            if causal:
                seen = distance >= 0
            if window > 0:
                near = distance.abs() < window
                seen = near if seen is None else seen & near
        out = _attend(
            grouped[:, :, begin:end],
            keys[:, :, low - origin : high - origin],
            values[:, :, low - origin : high - origin],
            scale,
            softcap,
            seen,
            None if sinks is None else sinks.view(kv_heads, -1, 1, 1),
        )
        output[begin:end] = out.permute(2, 0, 1, 3).flatten(1, 2)


def _attend_causally(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attend from the last positions ``[a, b, queries, head_size]`` of ``[a, b, kv, head_size]``.

    PyTorch's fused kernel knows causal attention from the first position only, and a mask would
    make it compute what it hides and hold [queries, kv] numbers. So what lies before the queries
    is attended to apart, and the two answers are weighed by their log-sum-exps.
    """
    context = key.shape[2] - query.shape[2]
    out, mass = _fused(query, key[:, :, context:], value[:, :, context:], True, scale)
    if not context:
        return out
    before, before_mass = _fused(query, key[:, :, :context], value[:, :, :context], False, scale)
    share = torch.sigmoid(before_mass - mass)[..., None]
    return torch.lerp(out.float(), before.float(), share).to(query.dtype)


def _fused(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The kernel behind ``scaled_dot_product_attention``, which also returns log-sum-exps fp32."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, scale=scale
    )


def _blocks_of(cache: Tensor, blocks: Tensor) -> Tensor:
    """Copy blocks ``[n]`` of a cache view to ``[kv_heads, n, block_size, head_size]``."""
    # Not index_select: it first makes the whole strided cache contiguous.
    return cache.transpose(0, 1)[:, blocks]


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    softcap: float,
    seen: Tensor | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention over ``[a, b, queries or keys, head_size]``; ``seen`` False hides a key.

    ``sinks`` broadcasts to ``[a, b, queries, 1]``.
    """
    if not softcap and sinks is None:
        return F.scaled_dot_product_attention(query, key, value, seen, scale=scale)
    logits = query.float() @ key.float().transpose(-1, -2) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if seen is not None:
        logits = logits.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        sink = sinks.float().expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, sink], dim=-1)
    weights = logits.softmax(-1)[..., : key.shape[-2]]
    return (weights @ value.float()).to(query.dtype)
