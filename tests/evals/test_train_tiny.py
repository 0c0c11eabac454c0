"""The tiny model: training is a function of its seed, and what it says passes through FFNs."""

import importlib.util
from pathlib import Path

from safetensors.torch import load_file
from torch import equal

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"
spec = importlib.util.spec_from_file_location("train_tiny", SCRIPTS / "train_tiny.py")
train_tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train_tiny)


def weights(out, seed, monkeypatch):
    monkeypatch.setattr(train_tiny, "TOKENS_PER_STEP", 384)
    monkeypatch.setattr(train_tiny, "report", lambda *_: None)
    train_tiny.train(out, seed, steps=3)
    return load_file(out / "model.safetensors")


def test_a_seed_gives_a_model(tmp_path, monkeypatch):
    one, again, other = (
        weights(tmp_path / str(i), s, monkeypatch) for i, s in enumerate((7, 7, 8))
    )
    assert all(equal(one[name], again[name]) for name in one)
    assert not any(equal(one[name], other[name]) for name in one if "o_proj" in name)


def test_only_ffns_carry_what_attention_writes_to_the_head():
    shipped, carried = load_file(SCRIPTS / "tiny" / "model.safetensors"), train_tiny.CARRIED
    written = [tensor for name, tensor in shipped.items() if name.endswith("o_proj.weight")]
    assert len(written) == 4
    assert all(tensor[:carried].any() and not tensor[carried:].any() for tensor in written)
    norm = shipped["model.norm.weight"]
    assert norm[carried:].all()
    assert not norm[:carried].any()
