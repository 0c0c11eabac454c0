"""The GPU path without a GPU: interpreted, compiled, and never waited for by the host."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from kernels.banks import rows_of_pieces

from pacellm_vllm.memory.layout import BankLayout
from pacellm_vllm.memory.pieces import cut_pieces

ROOT = Path(__file__).parents[1]


def run(*command, **env):
    """A Python process in the repository; its output, shown when it fails."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


def test_kernels_equal_the_plain_ops_in_the_interpreter():
    """``tests/kernels``: Triton decides when it is imported whether it interprets."""
    found = run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels", TRITON_INTERPRET="1"
    )
    assert " passed" in found
    assert "skipped" not in found


def test_every_kernel_compiles_for_hopper():
    """At 7B shapes, from the launches of an engine; sm_90 is compiled as sm_90a."""
    found = run("scripts/compile_kernels.py", "--arch", "90")
    rows = [line.split("|")[1:-1] for line in found.splitlines() if line.startswith("| ")][1:]
    kernels = {row[0].strip().removesuffix("_kernel") for row in rows}
    steps = {"similarity", "top_k", "bookkeeping", "blend", "piece_sums", "slot_update"}
    assert kernels == {*steps, "add_groups"}
    for dtype in ("bfloat16", "float16", "float32"):
        found = {row[0].strip() for row in rows if row[1].strip() == dtype}
        assert found == {f"{name}_kernel" for name in kernels}
    # What an H100 program may have, and no array that fell out of registers.
    assert max(int(row[8].split()[0]) for row in rows) <= 227 * 1024
    assert max(int(row[7].split()[0]) for row in rows) <= 64


# Decode with padding and a request's own settings; prefill over two segment ends, mixed in.
BATCHES = {"decode": ([0, 1, 2, 2], [5, 60, 0]), "mixed": ([0, 1, 101, 101], [50, 130, 0])}


@pytest.mark.parametrize("batch", BATCHES)
def test_the_host_waits_for_nothing(batch, monkeypatch):
    """On meta tensors, which cannot be read: metadata, copies and launches of a step."""
    from triton.runtime.jit import JITFunction
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from pacellm_vllm.config import PaceConfig
    from pacellm_vllm.memory.backend import BankMetadataBuilder
    from pacellm_vllm.memory.device import DeviceTables, new_tally
    from pacellm_vllm.request import RequestSettings

    launched = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **kwargs: launched.append(self))
    rules = PaceConfig.from_sources({"segment_size": 48, "bank_size": 7}).rules()
    layout = BankLayout.plan(rules, 64, torch.float32, 2048)
    meta = torch.device("meta")
    builder = object.__new__(BankMetadataBuilder)
    builder._rules = rules
    builder._settings = {0: RequestSettings(alpha=0.5)}
    builder._applied = {}
    builder._tables = DeviceTables(layout, rules, 8, 256, meta)
    builder.kv_cache_spec = SimpleNamespace(layout=layout, grid=None)
    starts, lengths = BATCHES[batch]
    counts = np.diff(starts)
    requests = len(lengths)
    padded = requests if batch == "decode" else starts[-1]
    common = CommonAttentionMetadata(
        query_start_loc=torch.empty(requests + 1, dtype=torch.int32, device=meta),
        query_start_loc_cpu=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.empty(requests, dtype=torch.int32, device=meta),
        num_reqs=requests,
        num_actual_tokens=padded,
        max_query_len=int(counts.max()),
        max_seq_len=1024,
        block_table_tensor=torch.empty(requests, 40, dtype=torch.int32, device=meta),
        slot_mapping=torch.empty(padded, dtype=torch.int64, device=meta),
        seq_lens_cpu_upper_bound=torch.tensor(lengths, dtype=torch.int32),
    )
    step = builder.build(0, common).device
    a = torch.empty(padded + 3, 64, device=meta)
    kv_cache = torch.empty(90, 1, 1, 2048, dtype=torch.uint8, device=meta)
    for reduce in (None, lambda buffer: buffer):
        step.run(
            kv_cache,
            layout,
            torch.float32,
            rules,
            a,
            torch.empty_like(a),
            new_tally(8, meta),
            reduce,
        )
    names = [kernel.fn.__name__ for kernel in launched]
    assert names.count("bookkeeping_kernel") == 2 * len(step.rounds)
    assert len(step.rounds) == (1 if batch == "decode" else 3)
    assert ("piece_sums_kernel" in names) == (batch == "mixed")


def test_decode_tables_are_those_of_any_other_step():
    """The form that graphs capture, built without a loop over requests, and the general one."""
    from pacellm_vllm.config import PaceConfig
    from pacellm_vllm.memory.device import DeviceTables

    rules = PaceConfig.from_sources({"segment_size": 48, "bank_size": 60}).rules()
    own = PaceConfig.from_sources({"segment_size": 48, "bank_size": 60, "alpha": 0.9}).rules()
    layout = BankLayout.plan(rules, 64, torch.float32, 2048)
    lengths = [1, 20, 47, 48, 49, 97, 1000]
    table = torch.zeros(len(lengths) + 1, 90, dtype=torch.int32)
    tables = [DeviceTables(layout, rules, 8, 64, torch.device("cpu")) for _ in range(2)]
    starts = np.arange(len(lengths) + 1)
    want = tables[0].of_batch(table, starts, np.array(lengths), {2: own}).rounds[0]
    padded = np.array([*lengths, 0])
    got = tables[1].of_singles(table, padded, {2: own}).rounds[0]
    assert torch.equal(got.pieces[:-1], want.pieces)
    assert torch.equal(got.tiles[:-1], want.tiles)
    assert (got.longest, got.summing) == (want.longest, want.summing) == (1, 0)
    # The row that pads: token 7 of row 7, which has no pages.
    assert got.pieces[-1, :5].tolist() == [7, 1, 0, 7, 0]
    # Where graphs read the tables does not move.
    again = tables[1].of_singles(table, padded, {}).rounds[0]
    assert again.pieces.data_ptr() == got.pieces.data_ptr()
    assert again.tiles.data_ptr() == got.tiles.data_ptr()


def test_a_batch_is_cut_for_the_device_as_for_the_plain_ops():
    from pacellm_vllm.config import PaceConfig
    from pacellm_vllm.memory.device import DeviceTables

    rules = PaceConfig.from_sources({"segment_size": 48, "bank_size": 60}).rules()
    own = PaceConfig.from_sources({"segment_size": 48, "bank_size": 60, "alpha": 0.9}).rules()
    layout = BankLayout.plan(rules, 64, torch.float32, 2048)
    tables = DeviceTables(layout, rules, 8, 900, torch.device("cpu"))
    table = torch.zeros(6, 90, dtype=torch.int32)
    rng = np.random.default_rng(0)
    for _ in range(50):
        counts = rng.choice([0, 1, 1, 7, 48, 130], 6)
        lengths = counts + rng.choice([0, 0, 1, 47, 48, 200], 6)
        starts = np.append(0, counts.cumsum())
        step = tables.of_batch(table, starts, lengths, {4: own})
        pieces = cut_pieces(starts.tolist(), lengths.tolist(), layout, rules)
        want = rows_of_pieces(
            [replace(piece, rules=own) if piece.request == 4 else piece for piece in pieces]
        )
        got = np.concatenate([np.zeros((0, 12), np.int32), *(now.pieces for now in step.rounds)])
        # By request, as they are cut; within one round there is one of each.
        got = got[np.argsort(got[:, 0])]
        assert (np.delete(got, (5, 6, 7), 1) == np.delete(want, (5, 6, 7), 1)).all()
        for now in step.rounds:
            assert (now.pieces[:, 3].diff() > 0).all()
            assert now.tokens == now.pieces[:, 1].sum()
        assert step.num_tokens == starts[-1]


def test_a_round_names_the_pieces_of_several_tiles_and_first_those_that_commit():
    from pacellm_vllm.config import PaceConfig
    from pacellm_vllm.ops.kernels.batch import tables_of

    rules = PaceConfig.from_sources({"segment_size": 100, "bank_size": 7}).rules()
    layout = BankLayout.plan(rules, 64, torch.float32, 2048)
    # One tile, a first segment, two tiles that go on, a whole segment, one tile that commits.
    first, counts = [133, 0, 130, 100, 196], [5, 100, 10, 100, 4]
    starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
    lengths = [position + n for position, n in zip(first, counts, strict=True)]
    tables = tables_of(rows_of_pieces(cut_pieces(starts, lengths, layout, rules)), 100)
    assert (tables.summing, tables.committing) == (2, 1)
    assert tables.pieces[:2, 7].tolist() == [3, 2]
    assert tables.pieces[:, 5:7].tolist() == [[0, 1], [1, 4], [5, 2], [7, 4], [11, 1]]
    assert tables.tiles[tables.tiles[:, 0] == 2, 1:3].tolist() == [[105, 2], [107, 8]]


def test_whole_graphs_hold_decode_steps_of_kernels_only():
    """Of other steps the rounds differ in number, and the plain ops loop on the host."""
    from vllm.v1.attention.backend import AttentionCGSupport

    from pacellm_vllm.memory.backend import BankMetadataBuilder

    for device, support in (
        ("cuda", AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE),
        ("cpu", AttentionCGSupport.NEVER),
    ):
        config = SimpleNamespace(device_config=SimpleNamespace(device_type=device))
        assert BankMetadataBuilder.get_cudagraph_support(config, None) == support


def test_a_captured_step_touches_nobody():
    """Dummy steps replay captured graphs while the block table still holds somebody's blocks."""
    from pacellm_vllm.config import PaceConfig
    from pacellm_vllm.memory.backend import BankMetadataBuilder
    from pacellm_vllm.memory.device import DeviceTables

    rules = PaceConfig.from_sources({"segment_size": 48}).rules()
    layout = BankLayout.plan(rules, 64, torch.float32, 8192)
    builder = object.__new__(BankMetadataBuilder)
    builder._tables = DeviceTables(layout, rules, 8, 64, torch.device("cpu"))
    common = SimpleNamespace(num_reqs=5, block_table_tensor=torch.ones(5, 40, dtype=torch.int32))
    (now,) = builder.build_for_cudagraph_capture(common).device.rounds
    assert now.pieces[:, 4].tolist() == [0] * 5
    assert now.tiles.tolist() == [[i, i, 1, i] for i in range(5)]
