"""The trained tiny model, and a server of it with memory that all evaluation tests share."""

from pathlib import Path

import pytest
from servers import PACELLM, serving

TINY = Path(__file__).parent.parent.parent / "scripts" / "tiny"


@pytest.fixture(scope="session")
def tiny():
    return str(TINY)


@pytest.fixture(scope="session")
def tiny_server(tmp_path_factory):
    """The URL of a server with ``official`` memory and segments of 64 tokens; its name is tiny."""
    command = [*PACELLM, "serve", str(TINY), "--segment-size", "64"]
    command += ["--dtype", "float32", "--block-size", "16", "--max-model-len", "640"]
    command += ["--kv-cache-memory-bytes", str(32 << 20), "--served-model-name", "tiny"]
    with serving(command, tmp_path_factory.mktemp("server") / "server.log") as base:
        yield f"{base}/v1"


@pytest.fixture
def in_this_process(monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
