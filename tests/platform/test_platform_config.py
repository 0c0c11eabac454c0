"""When the CPU platform is chosen, and what it chooses."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import vllm.platforms
from vllm.config import CompilationMode
from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts
from vllm.v1.kv_cache_interface import KVCacheLayout
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from pacellm_vllm.config import PaceConfigError
from pacellm_vllm.platform import activate, check_platform
from pacellm_vllm.platform.attention import TorchAttentionBackend
from pacellm_vllm.platform.torch_cpu import TorchCpuPlatform

GIB = 1 << 30


def failing_probe():
    raise RuntimeError("no such driver")


@pytest.mark.parametrize(
    ("probes", "chosen"),
    [
        ({"cuda": lambda: None, "rocm": lambda: None}, True),
        ({"cuda": failing_probe, "cpu": lambda: None}, True),
        ({"cuda": lambda: "vllm.platforms.cuda.CudaPlatform"}, False),
        ({"tpu": failing_probe, "cpu": lambda: "vllm.platforms.cpu.CpuPlatform"}, False),
    ],
)
def test_stands_aside_for_the_platforms_of_vllm(monkeypatch, probes, chosen):
    monkeypatch.setattr(vllm.platforms, "builtin_platform_plugins", probes)
    monkeypatch.setenv("PACELLM_CPU_PLATFORM", "1")
    name = "pacellm_vllm.platform.torch_cpu.TorchCpuPlatform"
    assert activate() == (name if chosen else None)


@pytest.mark.parametrize("asked", [None, "", "0"])
def test_nobody_gets_it_who_has_not_asked(asked):
    """Nor does looking cost anything: neither vLLM nor PyTorch is imported for it."""
    program = """
import sys
from pacellm_vllm.platform import activate
print(activate(), sys.modules.keys() & {"torch", "vllm"})
"""
    env = {name: value for name, value in os.environ.items() if name != "PACELLM_CPU_PLATFORM"}
    if asked is not None:
        env["PACELLM_CPU_PLATFORM"] = asked
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout == "None set()\n"


def test_it_says_once_that_it_serves():
    program = """
from multiprocessing import Process
from pacellm_vllm.platform import activate
from vllm.platforms import current_platform
current_platform.is_cpu(), activate()
child = Process(target=activate)
child.start()
child.join()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    [line] = [line for line in (done.stdout + done.stderr).splitlines() if "pacellm:" in line]
    assert "models run on the PyTorch CPU platform (PACELLM_CPU_PLATFORM=1), which is slow." in line


def test_commands_that_start_engines_say_what_to_do_without_a_platform(monkeypatch):
    nothing = SimpleNamespace(is_unspecified=lambda: True)
    monkeypatch.setattr(vllm.platforms, "_current_platform", nothing)
    with pytest.raises(PaceConfigError, match="finds no platform to run on; set PACELLM_CPU_PLA"):
        check_platform()


class PackedBackend:
    @classmethod
    def supported_kv_cache_layouts(cls):
        return (KVCacheLayout.BLNHC, KVCacheLayout.BLHNC)


def test_plain_models_keep_the_stock_layout_and_packed_pages_get_a_block_outermost_one():
    assert get_supported_kv_cache_layouts([TorchAttentionBackend])[0] == KVCacheLayout.LBHNC
    both = get_supported_kv_cache_layouts([TorchAttentionBackend, PackedBackend])
    assert both == [KVCacheLayout.BLHNC]


@pytest.mark.parametrize("block_size", [16, 32, 48, 128])
def test_block_sizes(block_size):
    assert TorchAttentionBackend.supports_block_size(block_size)


def config(max_model_len, kv_bytes=None, share=None, world_size=1):
    from vllm.config import CacheConfig

    if share is None:
        share = CacheConfig().gpu_memory_utilization
    model = SimpleNamespace(
        max_model_len=max_model_len,
        dtype=torch.bfloat16,
        get_num_layers=lambda parallel: 8,
        get_num_kv_heads=lambda parallel: 2,
        get_head_size=lambda: 64,
    )
    return SimpleNamespace(
        model_config=model,
        cache_config=SimpleNamespace(kv_cache_memory_bytes=kv_bytes, gpu_memory_utilization=share),
        parallel_config=SimpleNamespace(world_size=world_size),
    )


@pytest.mark.parametrize(
    ("options", "free", "want"),
    [
        ({"max_model_len": 100}, 64 * GIB, GIB // 2),
        ({"max_model_len": 128 << 10}, 64 * GIB, 2 * (128 << 10) * 4096),
        ({"max_model_len": 1 << 20}, 64 * GIB, 4 * GIB),
        ({"max_model_len": 1 << 20}, 8 * GIB, 2 * GIB),
        ({"max_model_len": 1 << 20, "world_size": 2}, 8 * GIB, GIB),
        ({"max_model_len": 100, "kv_bytes": 7}, 64 * GIB, 7),
        ({"max_model_len": 100, "share": 0.5}, 64 * GIB, None),
    ],
)
def test_default_kv_cache_size(monkeypatch, options, free, want):
    monkeypatch.setattr(
        "pacellm_vllm.platform.torch_cpu.get_memory_node_info",
        lambda node: SimpleNamespace(available_memory=free),
    )
    made = config(**options)
    TorchCpuPlatform._set_default_kv_cache_size(made)
    assert made.cache_config.kv_cache_memory_bytes == want


def test_a_runner_that_compiles_nothing_still_has_no_profiling_run():
    """The reason for what ``CpuWorker`` gives later stages."""
    compiled = []
    for mode in (CompilationMode.NONE, CompilationMode.VLLM_COMPILE):
        config = SimpleNamespace(compilation_config=SimpleNamespace(mode=mode))
        config.compilation_config.inductor_compile_config = {}
        runner = SimpleNamespace(
            vllm_config=config, profile_run=lambda mode=mode: compiled.append(mode)
        )
        CPUModelRunner.warming_up_model(runner)
    assert compiled == [CompilationMode.VLLM_COMPILE]
