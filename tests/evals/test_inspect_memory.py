"""``pacellm inspect memory``: what it reads out of pages is the oracle's bank of the same text."""

import json
import random
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from oracle import OracleModel
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from vllm import SamplingParams

from pacellm_vllm.cli import main
from pacellm_vllm.evals import banks
from pacellm_vllm.evals.answers import offline_engine
from pacellm_vllm.evals.text import sentences
from pacellm_vllm.serving.recorder import RECORD_METHOD, RECORDED_METHOD

TINY = Path(__file__).parent.parent.parent / "scripts" / "tiny"
ENGINE = {"dtype": "float32", "block_size": 16, "kv_cache_memory_bytes": 32 << 20}
PACE = {
    "preset": "official",
    "layers": [1, 3],
    "segment_size": 64,
    "bank_size": 40,
    "max_insertions": 5,
}
SEGMENTS, REST = 6, 11


def write_text(path, seed):
    source = sentences(random.Random(seed))
    path.write_text(" ".join(next(source) for _ in range(60)))
    return path


def inspect(text, *words, model=TINY):
    flags = ["--preset", "official", "--layers", "1,3", "--segment-size", "64", "--bank-size", "40"]
    flags += ["--max-insertions", "5", "--engine", json.dumps(ENGINE), *words]
    return main(["inspect", "memory", str(model), "--text", str(text), *flags])


def clear_text(path, count):
    """A text whose every memory decision is clear of a tie, and the oracle that has read it."""
    oracle, tokenizer = OracleModel(TINY, PACE), AutoTokenizer.from_pretrained(TINY)
    for seed in range(12):
        oracle.forward(tokenizer(write_text(path, seed).read_text()).input_ids[:count])
        if min(bank.closest_call for bank in oracle.banks.values()) > 1e-6:
            return oracle, tokenizer
    raise AssertionError("no text without a near tie")


def test_the_report_is_the_oracles_bank(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    text, out, count = tmp_path / "text.txt", tmp_path / "out", 64 * SEGMENTS + REST
    oracle, tokenizer = clear_text(text, count)
    recorded, read_banks = {}, banks.read_banks

    def spy(found, tokenizer):
        # What a worker says must survive the way from another process.
        recorded.update(msgspec.msgpack.decode(msgspec.msgpack.encode(found), strict=False))
        return read_banks(found, tokenizer)

    monkeypatch.setattr(banks, "read_banks", spy)
    assert inspect(text, "--tokens", str(count), "--out", str(out)) == 0
    report = json.loads((out / "memory.json").read_text())
    assert report["tokens"] == count
    assert {path.name for path in out.glob("*.png")} == {"map.png", "history.png"}

    for index, bank in oracle.banks.items():
        layer, valid = report["layers"][str(index)], bank.num_valid
        keys = torch.tensor(np.frombuffer(recorded[index]["keys"], np.float32)).view(valid, -1)
        torch.testing.assert_close(keys, bank.keys[:valid], rtol=1e-4, atol=1e-4)
        assert [slot["usage"] for slot in layer["slots"]] == bank.usage[:valid].tolist()
        assert len(layer["current"]) == REST

        commits = layer["commits"]
        assert [commit["segment"] for commit in commits] == list(range(SEGMENTS))
        for kind in ("merged", "filled", "replaced", "dropped"):
            assert sum(c[kind] for c in commits) == bank.counts["slots"][kind], kind
        later = {kind: sum(c[kind] for c in commits[1:]) for kind in ("high", "mid", "low")}
        assert later == {kind: bank.counts["write"][kind] for kind in later}
        assert layer["rates"]["mid"] == later["mid"] / (64 * (SEGMENTS - 1))
        unit = torch.nn.functional.normalize(bank.keys[:valid], dim=1)
        pairs = (unit @ unit.T)[~torch.eye(valid, dtype=torch.bool)]
        assert commits[-1]["cosine"] == pytest.approx(float(pairs.mean()), abs=1e-4)

        model = oracle.model
        with torch.no_grad():
            hidden = model.model.layers[index].mlp.down_proj(bank.keys[:valid])
            best = model.lm_head(model.model.norm(hidden)).argmax(-1).tolist()
        said = [slot["tokens"][0] for slot in layer["slots"]]
        same = [tokenizer.decode([b]) == s for b, s in zip(best, said, strict=True)]
        assert sum(same) >= 0.95 * valid
    assert report["layers"]["1"]["slots"] != report["layers"]["3"]["slots"]


def test_a_model_that_overflows_is_told_apart_from_an_empty_bank(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    model = shutil.copytree(TINY, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 1e30
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert inspect(write_text(tmp_path / "text.txt", 0), "--tokens", "70", model=model) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("pacellm: of 70 tokens layer 1 gave 70 activations that are not finite")


def test_a_recording_that_is_not_taken_away_harms_nobody(monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    params = SamplingParams(temperature=0, max_tokens=1)
    prompt = {"prompt_token_ids": list(range(10, 80))}
    engine = {**ENGINE, "max_model_len": 128, "enable_prefix_caching": False}
    with offline_engine(str(TINY), {"segment_size": 64}, engine) as llm:
        for _ in range(2):
            assert llm.collective_rpc(RECORD_METHOD) == [None]
            llm.generate([prompt], params, use_tqdm=False)
        llm.generate([prompt], params, use_tqdm=False)
        with pytest.raises(RuntimeError, match="a recorded request must run alone"):
            llm.collective_rpc(RECORDED_METHOD, args=(1,))
        assert llm.collective_rpc(RECORD_METHOD) == [None]
        llm.generate([prompt], params, use_tqdm=False)
        [recorded] = llm.collective_rpc(RECORDED_METHOD, args=(1,))
    assert [len(layer["commits"]) for layer in recorded.values()] == [1, 1]


def test_what_cannot_be_recorded_is_refused_in_a_sentence(tmp_path, capsys):
    text = write_text(tmp_path / "text.txt", 0)
    for words, sentence in (
        (["--tokens", "64"], "64 tokens end within the first segment of 64"),
        (["--engine", '{"tensor_parallel_size": 2}'], "tensor_parallel_size = 2 is not possible"),
        (["--alpha", "2"], "alpha = 2 is not allowed"),
        (["--text", str(tmp_path / "none")], "cannot be read"),
        (["--colour", "red"], "unknown argument '--colour'"),
    ):
        assert inspect(text, *words) == 2
        said = capsys.readouterr().err
        assert sentence in said
        assert said.count("\n") == 1
