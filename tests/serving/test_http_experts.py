"""A clustered checkpoint behind the HTTP API: no flag, the same answers, and routed on request."""

import subprocess
from pathlib import Path

import requests
import torch
from servers import PACELLM, VLLM, serving
from transformers import AutoModelForCausalLM, AutoTokenizer

from pacellm_vllm.serving.command import all_plugins

TINY = Path(__file__).parent.parent.parent / "scripts" / "tiny"
PROMPT = "The old farmer carries the basket. The magic number of Rome is 47. The magic number of"
ENGINE = ["--dtype", "float32", "--max-model-len", "512", "--kv-cache-memory-bytes", str(64 << 20)]
TOKENS = 16


def complete(url, model):
    body = {"model": model, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    answer = requests.post(f"{url}/v1/completions", json=body, timeout=120)
    answer.raise_for_status()
    return answer.json()["choices"][0]["text"]


def test_a_clustered_checkpoint_answers_as_the_original(tmp_path):
    out = str(tmp_path / "clustered")
    cluster = [*PACELLM, "cluster", str(TINY), out, "--experts", "16"]
    subprocess.run(cluster, check=True, capture_output=True)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    said = model.generate(prompt, max_new_tokens=TOKENS, do_sample=False)[0, prompt.shape[1] :]

    log = tmp_path / "server.log"
    plugins = ["env", f"VLLM_PLUGINS={all_plugins()}"]
    with serving([*plugins, *VLLM, "serve", out, *ENGINE], log) as url:
        assert complete(url, out).split() == tokenizer.decode(said).split()
        answer = requests.get(f"{url}/plugins/pacellm/memory", timeout=60)
    # A server's directories are its own.
    assert str(tmp_path) not in answer.text
    report = answer.json()
    every = {"num_experts": 16, "way": "all", "tokens": None, "share": 1.0}
    assert (report["config"]["layers"], report["config"]["experts"]["num_experts"]) == ([], None)
    assert report["engine"]["dtype"] == "float32"
    del report["config"], report["engine"]
    assert report == {
        "active": True,
        "layers": {},
        "pool": {},
        "sessions": {},
        "experts": {str(layer): every for layer in range(4)},
    }
    assert "pacellm: 16 experts in layers 0 to 3" in log.read_text()
    assert "every token computes all of them" in log.read_text()
