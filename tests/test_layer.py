"""The memory's custom op: who has no pages passes through, anything else unexpected is an error."""

from types import SimpleNamespace

import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.forward_context import override_forward_context

from pacellm_vllm.config import PaceConfig
from pacellm_vllm.memory import layer
from pacellm_vllm.memory.layer import PaceMemory

NAME = "model.layers.1.mlp.memory"


def run(metadata):
    """What the op makes of three tokens when a step's attention metadata is ``metadata``."""
    a, out = torch.randn(3, 8), torch.full((3, 8), float("nan"))
    memory = SimpleNamespace(
        run=lambda a, out, mine: out.copy_(a + mine), check_whole=lambda a: None
    )
    context = SimpleNamespace(attn_metadata=metadata, no_compile_layers={NAME: memory})
    with override_forward_context(context):
        torch.ops.vllm.pacellm_memory(a, out, NAME)
    return out - a


def test_a_profiling_run_passes_through():
    assert torch.equal(run(None), torch.zeros(3, 8))


def test_a_step_runs_the_layer_on_its_own_metadata():
    assert run({NAME: 1.0, "model.layers.1.self_attn.attn": 5.0}).sub(1).abs().max() < 1e-6


@pytest.mark.parametrize("metadata", [[{NAME: 1.0}, {NAME: 1.0}], (), SimpleNamespace(), {}])
def test_metadata_that_names_no_bank_is_an_error_and_not_a_profiling_run(metadata):
    with pytest.raises(RuntimeError) as error:
        run(metadata)
    message = str(error.value)
    assert message.startswith(f"pacellm: vLLM ran {NAME} with attention metadata of type ")
    assert type(metadata).__name__ in message
    assert "\n" not in message


def test_a_graph_piece_is_refused(monkeypatch):
    memory = SimpleNamespace()
    context = SimpleNamespace(
        no_compile_layers={NAME: memory},
        attn_metadata=None,
        cudagraph_runtime_mode=CUDAGraphMode.PIECEWISE,
    )
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    a = SimpleNamespace(is_cuda=True)
    with (
        override_forward_context(context),
        pytest.raises(RuntimeError, match="sees no requests; pass --enforce-eager"),
    ):
        layer._memory_op(a, None, NAME)


@pytest.mark.parametrize("rows", [2, 3])
def test_a_layer_that_is_given_some_of_the_tokens_only_is_an_error(rows):
    """As mixtures of experts are whose ranks share tokens out; padding is more rows, not fewer."""
    ran = []
    memory = SimpleNamespace(prefix=NAME, _run_plain=lambda *args: ran.append(args))
    metadata = SimpleNamespace(device=None, plain=SimpleNamespace(num_tokens=3))
    a = torch.randn(rows, 8)
    if rows == 3:
        PaceMemory.run(memory, a, a, metadata)
        assert ran
    else:
        with pytest.raises(RuntimeError, match="was given 2 of the step's 3 tokens"):
            PaceMemory.run(memory, a, a, metadata)


@pytest.mark.parametrize("whole", [True, False], ids=["outputs", "activations"])
def test_the_first_step_of_several_ranks_looks_at_outputs_only(whole, monkeypatch):
    """Of activations each rank holds a share; a profiling run is a step, too."""
    layers = {}
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=layers, splitting_ops=None),
        device_config=SimpleNamespace(device_type="cpu"),
    )
    monkeypatch.setattr(layer, "get_current_vllm_config", lambda: config)
    monkeypatch.setattr(layer, "get_tensor_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(layer, "tensor_model_parallel_all_reduce", lambda x: x + 5)
    memory = PaceMemory(PaceConfig(), 1, 8, NAME, whole=whole)
    context = SimpleNamespace(attn_metadata=None, no_compile_layers=layers)
    a = torch.randn(3, 8)
    with override_forward_context(context):
        if whole:
            with pytest.raises(RuntimeError, match="on each tensor parallel rank a part"):
                memory(a)
        assert torch.equal(memory(a), a)


@pytest.mark.parametrize("share", [1.0, 0.4], ids=["the whole", "a part"])
def test_ranks_that_hold_different_outputs_are_found_out_in_the_first_step(share, monkeypatch):
    """Two ranks, whose outputs add up to twice the first one's, or to the one's over its share."""
    a = torch.randn(3, 8)
    whole = a / share
    other = a if share == 1 else whole - a
    monkeypatch.setattr(layer, "tensor_model_parallel_all_reduce", lambda x: x + other)
    monkeypatch.setattr(layer, "get_tensor_model_parallel_world_size", lambda: 2)
    memory = SimpleNamespace(_to_check=True, prefix=NAME)
    if share == 1:
        PaceMemory.check_whole(memory, a)
    else:
        with pytest.raises(RuntimeError, match=r"layers\.1\.mlp returns on each .* a part"):
            PaceMemory.check_whole(memory, a)
    assert not memory._to_check
