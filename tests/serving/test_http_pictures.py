"""A picture in a chat request to a real server with memory, held to the oracle."""

import base64
import io

import pytest
import requests
from pictures import FAMILIES, SeeingOracle, make_picture, make_seeing_checkpoint
from servers import FORKED, serving
from transformers import AutoProcessor

PACE = {"layers": [1, 3], "bank_size": 23, "segment_size": 32, "max_insertions": 5, "alpha": 0.1}
FLAGS = ["--layers", "1,3", "--bank-size", "23", "--segment-size", "32", "--max-insertions", "5"]
FLAGS += ["--alpha", "0.1"]
ENGINE = ["--dtype", "float32", "--max-model-len", "1024", "--max-num-batched-tokens", "64"]
ENGINE += ["--block-size", "16"]
ENGINE += ["--kv-cache-memory-bytes", str(64 << 20), "--mm-hasher-algorithm", "sha256"]
WORDS = "What is in this picture, and what was in the ones before? Say it, say it again, say it."
MAX_TOKENS = 16


def message(picture):
    data = io.BytesIO()
    picture.save(data, format="PNG")
    url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    return [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "text", "text": WORDS},
            ],
        }
    ]


@pytest.mark.parametrize("arch", ["idefics3", "qwen3_vl"])
def test_a_chat_about_a_picture_equals_the_oracle(arch, tmp_path):
    seeing = make_seeing_checkpoint(tmp_path / arch, arch)
    oracle = SeeingOracle(seeing, PACE)
    tokenizer = AutoProcessor.from_pretrained(seeing).tokenizer
    prompt = tokenizer.encode(
        f"<|im_start|>user\n{FAMILIES[arch].placeholder}{WORDS}<|im_end|>\n<|im_start|>assistant\n"
    )
    command = [*FORKED, "serve", str(seeing), *FLAGS, *ENGINE, "--served-model-name", "seeing"]
    with serving(command, tmp_path / "server.log") as url:
        for seed in range(2):
            picture = make_picture(seed)
            answer, _ = oracle.answer(prompt, picture, MAX_TOKENS)
            reply = requests.post(
                f"{url}/v1/chat/completions",
                json={
                    "model": "seeing",
                    "messages": message(picture),
                    "max_tokens": MAX_TOKENS,
                    "temperature": 0,
                    "ignore_eos": True,
                    "return_token_ids": True,
                },
                timeout=120,
            )
            assert reply.status_code == 200, reply.text
            body = reply.json()
            assert body["prompt_token_ids"] == oracle.expand(prompt, picture)[0]
            assert body["choices"][0]["token_ids"] == answer
        report = requests.get(f"{url}/plugins/pacellm/memory", timeout=60).json()
        assert [layer["site"] for layer in report["layers"].values()] == ["activation"] * 2
        assert all(layer["commits"] > 0 for layer in report["layers"].values())
