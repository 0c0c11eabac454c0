"""Where this plugin's lines are printed."""

from __future__ import annotations

import logging

from vllm.logger import init_logger


def plugin_logger() -> logging.Logger:
    """The logger of this plugin.

    Symptom: vLLM configures handlers for loggers below ``vllm`` only, so a logger named after our
    own package prints nothing.
    Can go when plugins' loggers are configured too.
    """
    return init_logger("vllm.plugins.pacellm")
