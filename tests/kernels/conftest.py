"""These tests need Triton's interpreter: ``test_kernels.py`` starts a process of its own for them."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
