"""A real server under mixed load; ``scripts/soak.py`` is the command.

``server`` starts, stops and measures it, ``samples`` are requests whose answer is known,
``hostile`` are requests that have to be refused, ``load`` are the clients, ``tally`` counts and
judges.
"""

import os
import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent.parent / "tests"
if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))
os.environ.setdefault("PACELLM_CPU_PLATFORM", "1")
