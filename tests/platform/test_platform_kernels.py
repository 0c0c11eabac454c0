"""Every operator of the CPU platform against a per-token truth."""

import math

import pytest
import torch
from vllm.model_executor.layers.activation import FastGELU, NewGELU, QuickGELU

from pacellm_vllm.platform import activations, kernels, paged_attention  # noqa: F401

NAN = float("nan")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def make_cache(layout, num_blocks, kv_heads, block_size, head_size, dtype):
    """One layer's key and value views, as CPUAttentionBackendImpl.forward cuts them."""
    layers = 3
    shape = (kv_heads, block_size, 2 * head_size)
    if layout == "LBHNC":
        layer = torch.full((layers, num_blocks, *shape), NAN, dtype=dtype)[1]
    else:
        layer = torch.full((num_blocks, layers, *shape), NAN, dtype=dtype)[:, 1]
        assert not layer.is_contiguous()
    views = layer.view(num_blocks, kv_heads, 2 * block_size, head_size)
    return views.chunk(2, dim=2)


class Batch:
    """Random requests whose cache is NaN wherever no token of theirs belongs."""

    def __init__(self, q_lens, kv_lens, layout, dtype, block_size=16, heads=6, kv_heads=2, dim=24):
        generator = torch.Generator().manual_seed(sum(kv_lens))

        def rand(*shape):
            return torch.randn(*shape, generator=generator).to(dtype)

        self.q_lens, self.kv_lens, self.dtype = q_lens, kv_lens, dtype
        per_req = [-(-n // block_size) for n in kv_lens]
        num_blocks = sum(per_req) + 4
        self.key_cache, self.value_cache = make_cache(
            layout, num_blocks, kv_heads, block_size, dim, dtype
        )
        ids = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
        # Spare entries of the table are as arbitrary as rows reused by vLLM leave them.
        self.block_table = torch.full((len(kv_lens), max(per_req) + 2), 1 << 30, dtype=torch.int32)
        self.keys, self.values = [], []
        for req, (n, blocks) in enumerate(zip(kv_lens, per_req, strict=True)):
            mine, ids = ids[:blocks], ids[blocks:]
            self.block_table[req, :blocks] = torch.tensor(mine, dtype=torch.int32)
            self.keys.append(rand(n, kv_heads, dim))
            self.values.append(rand(n, kv_heads, dim))
            for pos in range(n):
                block, offset = mine[pos // block_size], pos % block_size
                self.key_cache[block, :, offset] = self.keys[req][pos]
                self.value_cache[block, :, offset] = self.values[req][pos]
        self.query = rand(sum(q_lens), heads, dim)
        self.starts = torch.tensor([0, *q_lens]).cumsum(0).to(torch.int32)

    def run(self, causal=True, window=-1, softcap=0.0, dynamic_causal=None, sinks=None):
        output = torch.full_like(self.query, NAN)
        torch.ops._C.cpu_attention_with_kv_cache(
            self.query,
            self.key_cache,
            self.value_cache,
            output,
            self.starts,
            torch.tensor(self.kv_lens, dtype=torch.int32),
            0.3,
            causal,
            None,
            window,
            self.block_table,
            softcap,
            torch.empty(0),
            sinks,
            dynamic_causal,
        )
        return output.double()

    def truth(self, causal=True, window=-1, softcap=0.0, dynamic_causal=None, sinks=None):
        out = []
        for req, (q_len, kv_len) in enumerate(zip(self.q_lens, self.kv_lens, strict=True)):
            is_causal = causal if dynamic_causal is None else bool(dynamic_causal[req])
            k, v = self.keys[req].double(), self.values[req].double()
            for i in range(q_len):
                query = self.query[self.starts[req] + i].double()
                pos = kv_len - q_len + i
                seen = [
                    j
                    for j in range(kv_len)
                    if (j <= pos or not is_causal) and (window <= 0 or abs(pos - j) < window)
                ]
                heads = []
                for head, q in enumerate(query):
                    group = head // (query.shape[0] // k.shape[1])
                    logits = (k[seen, group] @ q) * 0.3
                    if softcap:
                        logits = softcap * torch.tanh(logits / softcap)
                    if sinks is not None:
                        logits = torch.cat([logits, sinks[head : head + 1].double()])
                    heads.append(logits.softmax(0)[: len(seen)] @ v[seen, group])
                out.append(torch.stack(heads))
        return torch.stack(out)

    def check(self, **options):
        got, want = self.run(**options), self.truth(**options)
        tolerance = TOLERANCE[self.dtype]
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


SINKS = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0, 4.0])
# Decode of very different lengths, chunked prefill, whole prefill, a request of no token.
MIXED = {"q_lens": [1, 7, 1, 19, 0, 1, 33], "kv_lens": [5, 40, 33, 19, 9, 1, 33]}


@pytest.mark.parametrize("layout", ["LBHNC", "BLHNC"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 1},
        {"window": 6},
        {"window": 16},
        {"window": 17, "softcap": 2.0},
        {"softcap": 1.5},
        {"causal": False},
        {"causal": False, "window": 5},
        {"sinks": SINKS},
        {"sinks": SINKS, "window": 6, "softcap": 2.0},
    ],
    ids=str,
)
def test_attention_equals_per_token_truth(layout, dtype, options):
    Batch(**MIXED, layout=layout, dtype=dtype).check(**options)


@pytest.mark.parametrize("block_size", [16, 32, 48])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(1, 1, 8), (4, 4, 5), (9, 3, 40)])
def test_attention_takes_any_block_and_head_size(block_size, heads, kv_heads, dim):
    batch = Batch(
        **MIXED,
        layout="BLHNC",
        dtype=torch.float32,
        block_size=block_size,
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
    )
    batch.check()
    batch.check(window=9)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("options", [{}, {"window": 11}, {"causal": False, "window": 4}], ids=str)
def test_attention_in_small_tiles_and_batches(monkeypatch, softcap, options):
    monkeypatch.setattr(paged_attention, "_TILE_ELEMENTS", 200)
    monkeypatch.setattr(paged_attention, "_GATHER_ELEMENTS", 100)
    batch = Batch(
        q_lens=[23, 1, 1, 30], kv_lens=[23, 70, 64, 50], layout="BLHNC", dtype=torch.float32
    )
    batch.check(softcap=softcap, **options)


def test_causality_may_differ_per_request():
    flags = torch.tensor([1, 0, 1, 0, 1, 0, 1], dtype=torch.int32)
    Batch(**MIXED, layout="LBHNC", dtype=torch.float32).check(causal=False, dynamic_causal=flags)


@pytest.mark.parametrize("window", [6, 16, 20])
def test_pages_left_behind_by_the_window_are_not_read(window):
    batch = Batch(q_lens=[1, 5, 1], kv_lens=[61, 50, 22], layout="BLHNC", dtype=torch.float32)
    want = batch.truth(window=window)
    for req, (q_len, kv_len) in enumerate(zip(batch.q_lens, batch.kv_lens, strict=True)):
        for pos in range(max(0, kv_len - q_len - window + 1)):
            block = batch.block_table[req, pos // 16]
            batch.key_cache[block, :, pos % 16] = NAN
            batch.value_cache[block, :, pos % 16] = NAN
    torch.testing.assert_close(batch.run(window=window), want, rtol=1e-5, atol=1e-5)


def test_decode_gathers_only_its_own_blocks():
    """The whole cache is never copied: a gather costs what the requests hold."""
    cache = torch.empty(4096, 2, 64, 8)[:, :, :32]
    index_ops = paged_attention._blocks_of(cache, torch.tensor([3, 1]))
    assert index_ops.shape == (2, 2, 32, 8)
    with torch.profiler.profile(profile_memory=True) as profile:
        paged_attention._blocks_of(cache, torch.tensor([3, 1]))
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())
    assert allocated < cache.numel()


def test_refuses_alibi():
    batch = Batch(q_lens=[1], kv_lens=[3], layout="LBHNC", dtype=torch.float32)
    with pytest.raises(NotImplementedError, match="ALiBi"):
        kernels.attention_with_kv_cache(
            batch.query,
            batch.key_cache,
            batch.value_cache,
            torch.empty_like(batch.query),
            batch.starts,
            torch.tensor([3]),
            1.0,
            True,
            torch.ones(6),
            -1,
            batch.block_table,
            0.0,
            torch.empty(0),
            None,
            None,
        )


@pytest.mark.parametrize("layout", ["LBHNC", "BLHNC"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_reshape_and_cache_writes_its_slots_only(layout, dtype):
    block_size, kv_heads, dim = 16, 3, 10
    key_cache, value_cache = make_cache(layout, 7, kv_heads, block_size, dim, dtype)
    slots = [5 * 16 + 15, 16, -1, 33, 2 * 16 + 14, -1, 110]
    # More rows than slots: the model's padded tokens. Strided: slices of a fused projection.
    key, value = torch.randn(9, 2, kv_heads, dim).to(dtype).unbind(1)
    torch.ops._C.cpu_attn_reshape_and_cache(
        key, value, key_cache, value_cache, torch.tensor(slots), "vec"
    )
    for cache, rows in ((key_cache, key), (value_cache, value)):
        want = torch.full(cache.shape, NAN, dtype=dtype)
        for row, slot in enumerate(slots):
            if slot >= 0:
                want[slot // block_size, :, slot % block_size] = rows[row]
        torch.testing.assert_close(cache, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("block_size", [16, 32])
def test_slot_mapping_equals_per_token_truth(block_size):
    q_lens, positions = [3, 0, 1, 20], []
    starts = torch.tensor([0, *q_lens]).cumsum(0).to(torch.int32)
    for first, q_len in zip([30, 0, 64, 11], q_lens, strict=True):
        positions += range(first, first + q_len)
    table = torch.randperm(4 * 6).view(4, 6).to(torch.int32)
    padded = torch.tensor([*positions, 10**6, 10**6])  # stale entries behind the batch
    slots = torch.full((40,), 77)
    kernels.slot_mapping_kernel(
        num_tokens=24,
        max_num_tokens=33,
        query_start_loc_ptr=starts,
        positions_ptr=padded,
        block_table_ptr=table,
        block_table_stride=6,
        slot_mapping_ptr=slots,
        KV_CACHE_BLOCK_SIZE=block_size,
        TOTAL_CP_WORLD_SIZE=1,
        TOTAL_CP_RANK=0,
        CP_KV_CACHE_INTERLEAVE_SIZE=1,
        PAD_ID=-1,
        BLOCK_SIZE=1024,
    )
    requests = [0] * 3 + [2] + [3] * 20
    want = [
        int(table[req, pos // block_size]) * block_size + pos % block_size
        for req, pos in zip(requests, positions, strict=True)
    ]
    assert slots.tolist() == want + [-1] * 9 + [77] * 7


def test_slot_mapping_kernel_is_named_like_the_one_it_replaces():
    from inspect import signature

    from vllm.triton_utils.dispatcher import _kernel_arg_names
    from vllm.v1.worker.block_table import ComputeSlotMappingKernel

    replaced = _kernel_arg_names(ComputeSlotMappingKernel.kernel)
    assert tuple(signature(kernels.slot_mapping_kernel).parameters) == replaced


def test_greedy_argmax():
    logits = torch.tensor([[0.0, 3.0, -1.0], [float("-inf"), -5.0, -6.0]])
    assert torch.ops._C.greedy_argmax(logits).tolist() == [1, 1]


def test_gumbel_sampling_follows_the_distribution_and_the_row_seed():
    rows = 4000
    logits = torch.tensor([1.0, 0.0, float("-inf"), 2.0]).expand(rows, -1).contiguous()
    seeds = torch.arange(rows)
    sampled = torch.ops._C.fused_gumbel_argmax(logits, seeds)
    counts = sampled.bincount(minlength=4).double() / rows
    want = logits[0].double().softmax(0)
    assert counts[2] == 0
    # Four standard deviations of a share.
    assert bool(((counts - want).abs() <= 4 * math.sqrt(0.25 / rows)).all())
    # A row's draw depends on its seed, not on its place in the batch.
    again = torch.ops._C.fused_gumbel_argmax(logits[:10], seeds[100:110])
    assert again.tolist() == sampled[100:110].tolist()


@pytest.mark.parametrize("bias", [None, torch.randn(5)])
def test_small_weight_gemm(bias):
    x, weight = torch.randn(3, 7).bfloat16(), torch.randn(5, 7).bfloat16()
    output = torch.empty(3, 5, dtype=torch.bfloat16)
    packed = torch.ops._C.convert_weight_packed(weight)
    torch.ops._C.weight_packed_linear(output, x, packed, bias, True)
    want = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    torch.testing.assert_close(output.double(), want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("name", "cls"), [("gelu_new", NewGELU), ("gelu_fast", FastGELU), ("gelu_quick", QuickGELU)]
)
def test_activations_equal_vllms_own_formula(name, cls):
    x = 3 * torch.randn(5, 7)
    out = torch.full_like(x, NAN)
    getattr(torch.ops._C, name)(out, x)
    torch.testing.assert_close(out, cls.forward_native(None, x))
