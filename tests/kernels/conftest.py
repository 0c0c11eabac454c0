"""Run where Triton interprets kernels; ``test_kernels.py`` starts a process for that."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
