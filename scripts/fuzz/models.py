"""Models: the checkpoints of all architectures, each written once into a folder."""

import json
import os
import shutil
from pathlib import Path

import torch
from checkpoints import make_checkpoint
from safetensors.torch import load_file, save_file

from fuzz.cases import ARCHITECTURES

RANK = 4
FFN = ("gate_proj", "up_proj", "down_proj")


class Models:
    """Checkpoints below ``folder``, which processes one after another, or at once, may share."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def checkpoint(self, architecture: str) -> Path:
        family, sizes = ARCHITECTURES[architecture]
        return self._made(
            architecture.replace(", ", "-").replace(" ", "-"),
            lambda path: make_checkpoint(path, family, **sizes),
        )

    def adapter(self, architecture: str) -> Path:
        """A random LoRA adapter for every FFN projection."""
        weights = load_file(self.checkpoint(architecture) / "model.safetensors")
        return self._made(f"{architecture}-adapter", lambda path: _write_adapter(path, weights))

    def adapted(self, architecture: str) -> Path:
        """The checkpoint with its adapter added to the weights."""
        base, adapter = self.checkpoint(architecture), self.adapter(architecture)
        return self._made(f"{architecture}-adapted", lambda path: _add(path, base, adapter))

    def embeddings(self, architecture: str) -> torch.Tensor:
        """[vocabulary, H]"""
        weights = load_file(self.checkpoint(architecture) / "model.safetensors")
        return weights["model.embed_tokens.weight"]

    def _made(self, name: str, make) -> Path:
        path = self._folder / name
        if not path.exists():
            # Under another name until it is whole.
            partly = self._folder / f"{name}.{os.getpid()}"
            shutil.rmtree(partly, ignore_errors=True)
            make(partly)
            try:
                partly.rename(path)
            except OSError:
                shutil.rmtree(partly)
        return path


def _write_adapter(path: Path, weights: dict[str, torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(5)
    adapter = {}
    for name, weight in sorted(weights.items()):
        module = name.removesuffix(".weight")
        if module.rsplit(".", 1)[-1] in FFN:
            outputs, inputs = weight.shape
            a = torch.randn(RANK, inputs, generator=generator) * inputs**-0.5
            b = torch.randn(outputs, RANK, generator=generator) * 0.3
            adapter[f"base_model.model.{module}.lora_A.weight"] = a
            adapter[f"base_model.model.{module}.lora_B.weight"] = b
    path.mkdir(parents=True)
    save_file(adapter, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "bias": "none"}
    config |= {"target_modules": list(FFN), "base_model_name_or_path": "base"}
    (path / "adapter_config.json").write_text(json.dumps(config))


def _add(path: Path, base: Path, adapter: Path) -> None:
    shutil.copytree(base, path)
    weights = load_file(base / "model.safetensors")
    rows = load_file(adapter / "adapter_model.safetensors")
    for name in weights:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in rows:
            a, b = rows[f"{module}.lora_A.weight"], rows[f"{module}.lora_B.weight"]
            weights[name] = weights[name] + b @ a
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
