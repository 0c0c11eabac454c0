"""The GPU path of routed experts, as far as a machine without a GPU can show it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pacellm_vllm.experts.fused import by_expert

CHILD = Path(__file__).with_name("fused_child.py")


@pytest.fixture(scope="module")
def children():
    """Both at once: each spends most of its time on imports."""
    started = {
        what: subprocess.Popen(
            [sys.executable, str(CHILD), what],
            # Told that no GPU is visible, vLLM has Triton without one.
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for what, environment in (("interpret", {"TRITON_INTERPRET": "1"}), ("compile", {}))
    }
    yield started
    for process in started.values():
        process.kill()
        process.wait()


def result_of(process):
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-2000:]
    return json.loads(out.splitlines()[-1])


def test_the_interpreted_kernels_are_the_masked_truth(children):
    found = result_of(children["interpret"])
    assert len(found["errors"]) == 32
    # One graph each for top_k and mass, whatever the number of tokens.
    assert found["graphs"] == 2
    for name, error in found["errors"].items():
        assert error <= (1e-5 if "float32" in name else 2e-3), name


def test_the_kernels_compile_for_hopper(children):
    sizes = result_of(children["compile"])
    assert len(sizes) == 7
    assert min(sizes.values()) > 10_000


@pytest.mark.parametrize("tile", [1, 16])
@pytest.mark.parametrize(("tokens", "experts", "share"), [(1, 5, 0.5), (33, 7, 0.3), (9, 4, 0)])
def test_pairs_come_by_expert_in_whole_tiles(tokens, experts, share, tile):
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(tokens, experts, generator=generator) < share
    pairs, of_tile, count = by_expert(chosen, tile)
    assert (pairs.dtype, of_tile.dtype, count.dtype) == (torch.int32,) * 3
    # Shapes do not depend on who chose what.
    assert len(pairs) == len(of_tile) * tile == len(by_expert(~chosen, tile)[0])
    found = []
    for number, expert in enumerate(of_tile[: int(count) // tile].tolist()):
        for pair in pairs[number * tile : (number + 1) * tile].tolist():
            if pair < tokens * experts:
                assert pair % experts == expert
                found.append((expert, pair // experts))
    assert found == [tuple(pair) for pair in chosen.T.nonzero().tolist()]
    assert (pairs[int(count) :] == tokens * experts).all()
