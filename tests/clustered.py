"""Clustering tiny checkpoints in tests, and looking at what became of them."""

import hashlib

import torch
from hf import load_model
from safetensors.torch import load_file

from pacellm_vllm.experts import cache
from pacellm_vllm.experts.cluster import cluster
from pacellm_vllm.experts.settings import ClusterSettings

SETTINGS = ClusterSettings(8)


def logits(path):
    model = load_model(path, dtype=torch.float32)
    tokens = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tokens).logits


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def digests(path):
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def weights(path):
    return {
        k: v for file in sorted(path.glob("model*.safetensors")) for k, v in load_file(file).items()
    }


def count_calls(monkeypatch, stop_at=None):
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    real = cluster
    monkeypatch.setattr(cache, "cluster", counted)
    return calls


def left_behind(tmp_path):
    return [p.name for p in tmp_path.iterdir() if p.name not in ("model", "cache")]
