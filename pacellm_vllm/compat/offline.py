"""An engine in this process that is not for good."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.config import VllmConfig


def config_of(llm: LLM) -> VllmConfig:
    """The checked configuration of an engine.

    Symptom: ``LLM`` shows its model's only.
    Can go when it shows all.
    """
    return llm.llm_engine.vllm_config


def close(llm: LLM) -> None:
    """Take an engine down, so that this process can make the next one.

    Symptom: ``LLM`` ends when it is forgotten and not before, and leaves its process groups behind.
    Can go when it can be closed.
    """
    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
