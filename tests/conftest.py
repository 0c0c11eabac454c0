"""Checkpoints shared by the whole test run, and the platform that it runs on."""

import os
import sys
from pathlib import Path

# Before anything imports vLLM, and for the processes that tests start.
os.environ.setdefault("PACELLM_CPU_PLATFORM", "1")
# vLLM's own CPU build else wants one NUMA node for each worker.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
if (Path(sys.prefix) / "torchvision").exists():
    # Also for vLLM's processes that look at a model's class.
    sys.path[:0] = [str(Path(__file__).parent / "beside"), str(Path(sys.prefix) / "torchvision")]
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [*sys.path[:2], *filter(None, [os.environ.get("PYTHONPATH")])]
    )

import pytest
from checkpoints import make_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """``checkpoint(arch)``: the directory of a tiny random checkpoint, made on first use."""
    made = {}

    def get(arch="qwen2"):
        if arch not in made:
            made[arch] = make_checkpoint(tmp_path_factory.mktemp(arch), arch)
        return made[arch]

    return get
