"""The trained tiny model, which answers the evaluations of these tests."""

from pathlib import Path

import pytest

TINY = Path(__file__).parent.parent.parent / "scripts" / "tiny"


@pytest.fixture(scope="session")
def tiny():
    return str(TINY)


@pytest.fixture
def in_this_process(monkeypatch):
    # What it does to vLLM makes engines of tests start faster.
    import engines  # noqa: F401

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
