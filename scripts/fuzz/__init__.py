"""Random engines held to the oracle; ``scripts/fuzz_engine.py`` is the command.

``cases`` makes an engine and its requests from a seed, ``models`` writes the checkpoints, ``drive``
runs the engine, ``truth`` is the oracle's answer to what was said, ``hits`` bounds what the prefix
cache may say, ``events`` what is told of it, ``judge`` and ``verdict`` put all together, ``breaks``
are faults put in on purpose, ``children`` runs engines in processes of their own, ``own`` tells
vLLM's faults from ours.
"""

import os
import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent.parent / "tests"
if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))
os.environ.setdefault("PACELLM_CPU_PLATFORM", "1")
