"""Real engines for tests: in this process, on tiny checkpoints, with what a test wants to see."""

import atexit
import contextlib
import functools
import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import torch

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.models import registry
from vllm.platforms import current_platform
from vllm.v1.executor import multiproc_executor

# Whether this is vLLM's own CPU build, whose attention kernels take blocks of whole 32 tokens.
NATIVE = type(current_platform).__module__ == "vllm.platforms.cpu"
BLOCK_SIZE = 32 if NATIVE else 16


def blocks(tokens: int) -> int:
    """How many blocks hold what attention keeps of ``tokens``."""
    return -(-tokens // BLOCK_SIZE)


# Collecting garbage from all that was imported is most of a test's time: vLLM does it nine times an
# engine, and here it is done once. What is imported by now is never looked at.
_collect = gc.collect
gc.collect = lambda generation=2: _collect(min(generation, 1))
gc.freeze()
# Or what is made in C++ complains at the end of being left.
atexit.register(gc.unfreeze)
gc.freeze = gc.unfreeze = lambda: None

# vLLM looks at each class of model in a process of its own, lest CUDA begin in this one.
registry._run_in_subprocess = lambda look: look()

multiproc_executor.get_mp_context = forked.context

if NATIVE:
    # vLLM looks through all modules for each engine, and stops at an object of llvmlite, which an
    # n-gram drafter loads.
    _register = type(current_platform).register_triton_kernel_overrides
    type(current_platform).register_triton_kernel_overrides = staticmethod(
        functools.cache(_register)
    )


def architecture(path: Any) -> str:
    """The architecture that a checkpoint's config.json names, without our prefix."""
    (name,) = json.loads((Path(path) / "config.json").read_text())["architectures"]
    return name.removeprefix("Pace")


class Engine:
    """One ``LLM`` on token ids; ``core`` is the engine core inside it."""

    def __init__(self, path: Any, **settings: Any) -> None:
        self.llm = LLM(
            model=str(path),
            **{
                "dtype": "float32",
                "skip_tokenizer_init": True,
                "max_model_len": 1024,
                "max_num_seqs": 8,
                "block_size": BLOCK_SIZE,
                # Compiled models are in test_native.py: each takes a minute.
                "enforce_eager": True,
                "kv_cache_memory_bytes": 64 << 20,
                "disable_log_stats": False,
                **settings,
            },
        )
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.pool = self.core.scheduler.kv_cache_manager.block_pool
        self.free_at_start = self.pool.get_num_free_blocks()

    def generate(
        self, prompts: list[list[int]], max_tokens: int = 32, **sampling: Any
    ) -> list[Any]:
        """One ``RequestOutput`` per prompt, greedy unless told otherwise."""
        params = SamplingParams(
            **{
                "temperature": 0,
                "max_tokens": max_tokens,
                "ignore_eos": True,
                "detokenize": False,
                **sampling,
            }
        )
        return self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
        )

    def tokens(self, prompts: list[list[int]], max_tokens: int = 32, **sampling: Any) -> list[Any]:
        return tokens_of(self.generate(prompts, max_tokens, **sampling))

    def metric(self, name: str) -> float:
        """The sum of one counter, such as ``vllm:num_preemptions``."""
        return sum(m.value for m in self.llm.get_metrics() if m.name == name)

    def memories(self) -> dict[int, Any]:
        """The ``PaceMemory`` of each layer that has one."""
        layers = self.core.vllm_config.compilation_config.static_forward_context
        return {layer.index: layer for name, layer in layers.items() if name.endswith(".memory")}

    def model(self) -> Any:
        """The model inside the worker of this process."""
        return self.core.model_executor.driver_worker.worker.model_runner.model

    def all_blocks_are_back(self) -> bool:
        return self.pool.get_num_free_blocks() == self.free_at_start

    def as_new(self) -> "Engine":
        """With an empty prefix cache, for the next test that shares it."""
        assert self.all_blocks_are_back()
        assert self.llm.reset_prefix_cache()
        return self


def tokens_of(outputs: list[Any]) -> list[list[int]]:
    """The first answer's tokens of each output of vLLM's."""
    return [list(output.outputs[0].token_ids) for output in outputs]


def prompt_logprobs(output: Any) -> list[float]:
    """Log-probability of each prompt token after the first; needs ``prompt_logprobs=0``."""
    tokens = output.prompt_token_ids[1:]
    return [
        entry[token].logprob
        for entry, token in zip(output.prompt_logprobs[1:], tokens, strict=True)
    ]


@contextlib.contextmanager
def engine(path: Any, pace: Any = None, **settings: Any) -> Iterator[Engine]:
    """An engine with memory when ``pace`` (what one writes in ``{"pacellm": ...}``) is given."""
    if pace is not None:
        settings.setdefault("hf_overrides", {"architectures": [f"Pace{architecture(path)}"]})
        settings["additional_config"] = {"pacellm": pace}
    running = Engine(path, **settings)
    try:
        yield running
    finally:
        running.llm.llm_engine.engine_core.shutdown()
        del running
        cleanup_dist_env_and_memory()
        _collect()


@contextlib.contextmanager
def poisoned_pages(running: Engine) -> Iterator[list[int]]:
    """Fill every page with NaN bytes before the first step and whenever it is freed uncached.

    Yields the block ids poisoned so far.
    """
    pool, poisoned = running.pool, []
    held = running.core.model_executor.driver_worker.worker.model_runner.kv_caches
    # A recurrent layer has several states.
    caches = [
        part for cache in held for part in ([cache] if isinstance(cache, torch.Tensor) else cache)
    ]

    def poison(blocks: list[Any]) -> None:
        for block in blocks:
            if block.ref_cnt == 0 and not block.is_null and block.block_hash is None:
                poisoned.append(block.block_id)
                for cache in caches:
                    cache[block.block_id].view(torch.uint8).fill_(0xFF)

    free_blocks = pool.free_blocks

    def free_and_poison(blocks: Any, *args: Any, **kwargs: Any) -> None:
        blocks = list(blocks)
        free_blocks(blocks, *args, **kwargs)
        poison(blocks)

    pool.free_blocks = free_and_poison
    poison(pool.blocks)
    try:
        yield poisoned
    finally:
        del pool.free_blocks
