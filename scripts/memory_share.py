"""How much of a running engine's processor time the memory takes, on a CPU.

    OMP_NUM_THREADS=1 python scripts/memory_share.py

One engine of ``bench_serving.py``'s mid shape with memory in two layers; the time inside of the
memory layers and of the metadata they share, against the rest of each step. Unlike a comparison
of two engines it does not see how differently two processes run, nor what the memory does to the
rest of a step (caches, one more KV cache group).
"""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_serving import SHAPES, make_prompts, memory_layers, raise_norms, write_checkpoint

CHUNK = 512
inside = 0.0


def watch(owner: type, name: str) -> None:
    """Count the processor time in one method."""
    method: Callable[..., Any] = getattr(owner, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        global inside
        begun = time.process_time()
        result = method(*args, **kwargs)
        inside += time.process_time() - begun
        return result

    setattr(owner, name, watched)


def main() -> None:
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR")
    os.environ.setdefault("PACELLM_CPU_PLATFORM", "1")
    from vllm import LLM, SamplingParams

    from pacellm_vllm.memory.backend import BankMetadataBuilder
    from pacellm_vllm.memory.layer import PaceMemory

    shape = SHAPES["mid"]
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(Path(directory), shape, 4096, "float32", weights=False)
        engine = LLM(
            directory,
            dtype="float32",
            max_model_len=4096,
            max_num_batched_tokens=CHUNK,
            load_format="dummy",
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            kv_cache_memory_bytes=2**29,
            hf_overrides={"architectures": ["PaceQwen2ForCausalLM"]},
            additional_config={"pacellm": {"layers": memory_layers(shape["layers"], 2)}},
        ).llm_engine
    raise_norms(engine)
    watch(PaceMemory, "forward")
    watch(BankMetadataBuilder, "build")

    def go(what: str, steps: int) -> None:
        global inside
        inside, begun = 0.0, time.process_time()
        for _ in range(steps):
            engine.step()
        total = time.process_time() - begun
        print(
            f"{what}: {1e3 * total / steps:.1f} ms a step, memory {1e3 * inside / steps:.2f} ms, "
            f"{inside / (total - inside):.2%} of the rest"
        )

    for i in range(2):
        params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, detokenize=False)
        prompt = make_prompts(i, 1, 4 * CHUNK, shape["vocab"])[0]
        engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
        go(f"prefill of {CHUNK} tokens, first segment", 2)
        go(f"prefill of {CHUNK} tokens, second segment", 2)
        go("decode step of 1", 30)
        engine.abort_request([str(i)], internal=False)
        while engine.has_unfinished_requests():
            engine.step()


if __name__ == "__main__":
    main()
