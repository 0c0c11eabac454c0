"""Checkpoints shared by the whole test run."""

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
