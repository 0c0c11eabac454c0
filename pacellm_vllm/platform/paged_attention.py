"""Attention over the paged KV cache of vLLM's CPU backend, in PyTorch.

Both caches are ``[blocks, kv_heads, block_size, head_size]`` views with arbitrary strides.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Bounds on temporary tensors, in elements, which also keep them near the caches: gathered keys (or
# values) of one decode batch, and the mask (with soft-capping: the logits) of one prefill tile.
_GATHER_ELEMENTS = 1 << 20
_TILE_ELEMENTS = 1 << 22


def attend(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    output: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    causals: Sequence[bool],
    block_table: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> None:
    """Write to ``output`` what each request's last tokens see of its cache.

    query and output ``[tokens, heads, head_size]``, query_start_loc ``[reqs + 1]``, seq_lens
    ``[reqs]``, causals one per request, block_table ``[reqs, blocks]`` int32, sinks ``[heads]``.
    What they and ``window`` mean, and what is never read: ``kernels.attention_with_kv_cache``.
    """
    starts = query_start_loc.tolist()
    kv_lens = seq_lens.tolist()
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
