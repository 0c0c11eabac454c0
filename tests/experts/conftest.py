"""Tiny checkpoints, clustered into a directory of the test's own."""

import pytest
import torch
from clustered import SETTINGS
from ffn_models import tiny_model

from pacellm_vllm.experts.rewrite import cluster_checkpoint


@pytest.fixture
def save(tmp_path):
    def save(arch="qwen2", shard_size="1GB", dtype=torch.float32, **sizes):
        path = tmp_path / "model"
        tiny_model(arch, **sizes).to(dtype).save_pretrained(path, max_shard_size=shard_size)
        return path

    return save


@pytest.fixture
def run_cluster(tmp_path):
    """Cluster into ``tmp_path/out`` with a cache of its own."""

    def run_cluster(source, settings=SETTINGS, **kwargs):
        kwargs = {"cache": tmp_path / "cache", "progress": False, **kwargs}
        return cluster_checkpoint(source, tmp_path / "out", settings, **kwargs)

    return run_cluster
