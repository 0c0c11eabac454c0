import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The quick start's model: random weights, a real tokenizer, memory switched on."""
    path = tmp_path_factory.mktemp("tiny")
    script = ROOT / "scripts" / "make_tiny_model.py"
    subprocess.run([sys.executable, str(script), str(path)], check=True, capture_output=True)
    return path
