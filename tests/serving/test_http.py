"""A real server on the quick start's model: completions, chat, streams, batches, the report."""

import itertools
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
from openai import OpenAI
from servers import ENV, PACELLM, VLLM, serving

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "LICENSE").read_text()
KEY = "secret"
HEADERS = {"Authorization": f"Bearer {KEY}"}
# In float32: rounding of bfloat16 differs by how many tokens a step has, with and without memory.
ENGINE = ["--dtype", "float32", "--max-model-len", "4096"]
ENGINE += ["--kv-cache-memory-bytes", str(64 << 20)]
CHAT = [{"role": "user", "content": TEXT[:3000]}]
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """The base URL of ``pacellm serve`` with an API key."""
    log = tmp_path_factory.mktemp("log") / "server.log"
    # More alpha than the default's, for memory to be seen in what is said.
    command = [*PACELLM, "serve", str(model), "--bank-size", "50", "--alpha", "0.1", *ENGINE]
    with serving([*command, "--api-key", KEY, "--served-model-name", "tiny"], log) as url:
        yield url
        assert "pacellm: memory in layers 1, 3 of 4, preset gentle" in log.read_text()


@pytest.fixture(scope="module")
def client(server):
    return OpenAI(base_url=f"{server}/v1", api_key=KEY, timeout=120, max_retries=0)


def report(server):
    answer = requests.get(f"{server}/plugins/pacellm/memory", headers=HEADERS, timeout=60)
    answer.raise_for_status()
    return answer.json()


def test_completions_pass_through_the_memory_and_are_counted(server, client):
    before = report(server)
    reply = client.completions.create(
        model="tiny", prompt=TEXT[:4000], max_tokens=MAX_TOKENS, temperature=0
    )
    after = report(server)
    assert after["active"] is True
    assert list(after["layers"]) == ["1", "3"]
    assert after["experts"] == {}
    tokens = reply.usage.prompt_tokens + reply.usage.completion_tokens - 1
    for layer, counts in after["layers"].items():
        old = before["layers"][layer]
        assert sum(counts[kind] - old[kind] for kind in ("high", "mid", "low")) == tokens
        assert counts["commits"] - old["commits"] == tokens // 256
        assert (counts["preset"], counts["bank_size"]) == ("gentle", 50)
        assert counts["slots_peak"] == 50


def test_chat_streams_say_what_chat_says_and_what_the_engine_says_offline(client, model):
    plain = client.chat.completions.create(
        model="tiny", messages=CHAT, max_tokens=MAX_TOKENS, temperature=0
    )
    streamed = client.chat.completions.create(
        model="tiny", messages=CHAT, max_tokens=MAX_TOKENS, temperature=0, stream=True
    )
    said = plain.choices[0].message.content
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == said
    program = """
import json, sys
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], dtype="float32", max_model_len=4096, kv_cache_memory_bytes=64 << 20,
          additional_config={"pacellm": {"bank_size": 50, "alpha": 0.1}})
params = SamplingParams(temperature=0, max_tokens=int(sys.argv[3]))
print("SAID", json.dumps(llm.chat(json.loads(sys.argv[2]), params)[0].outputs[0].text))
"""
    offline = subprocess.run(
        [sys.executable, "-c", program, str(model), json.dumps(CHAT), str(MAX_TOKENS)],
        capture_output=True,
        text=True,
        check=True,
        env={**ENV, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    )
    [line] = [line for line in offline.stdout.splitlines() if line.startswith("SAID ")]
    assert json.loads(line.removeprefix("SAID ")) == said


def ask(server, **body):
    request = {"model": "tiny", "prompt": TEXT[:4000], "max_tokens": 24, "temperature": 0, **body}
    return requests.post(f"{server}/v1/completions", json=request, headers=HEADERS, timeout=120)


def token_logprobs(server, settings):
    answer = ask(server, vllm_xargs=settings, logprobs=0).json()
    return tuple(answer["choices"][0]["logprobs"]["token_logprobs"])


def test_a_request_sets_its_own_memory(server):
    settings = {
        "engine's": {},
        "the same, said": {"pacellm_alpha": 0.1},
        "strong": {"pacellm": '{"alpha": 1.0, "noise": 0.9}'},
        "off": {"pacellm_enabled": False},
        "off, as text": {"pacellm_enabled": "false"},
    }
    # The second time all prompts are cached, so that no two answers differ by rounding.
    cold, said = ({n: token_logprobs(server, s) for n, s in settings.items()} for _ in range(2))
    for name, logprobs in cold.items():
        assert logprobs == pytest.approx(said[name], abs=1e-4)
    assert said["engine's"] == said["the same, said"]
    assert said["off"] == said["off, as text"]
    for one, other in itertools.combinations(("engine's", "strong", "off"), 2):
        assert said[one] != pytest.approx(said[other], abs=1e-2)


def test_bad_request_settings_are_a_400_with_a_sentence(server):
    for body, sentence in (
        ({"vllm_xargs": {"pacellm_alpha": 3}}, "pacellm: alpha = 3 is not allowed in a request"),
        (
            {"vllm_xargs": {"pacellm_preset": "paper"}},
            "pacellm: a request cannot set 'pacellm_preset'",
        ),
        (
            {"vllm_xargs": {"pacellm_alpha": 0.3}, "use_beam_search": True, "n": 2},
            "pacellm: 'pacellm_alpha' is not supported with use_beam_search",
        ),
    ):
        answer = ask(server, **body)
        assert answer.status_code == 400, answer.text
        assert sentence in answer.json()["error"]["message"]
    assert ask(server).status_code == 200
    assert ask(server, use_beam_search=True, n=2).status_code == 200


def test_the_report_wants_the_api_key(server):
    url = f"{server}/plugins/pacellm/memory"
    assert requests.get(url, timeout=10).status_code == 401
    wrong = {"Authorization": "Bearer wrong"}
    assert requests.get(url, headers=wrong, timeout=10).status_code == 401
    assert requests.get(url, headers=HEADERS, timeout=60).status_code == 200


def used_blocks(server):
    lines = requests.get(f"{server}/metrics", timeout=10).text.splitlines()
    return sum(
        float(line.split()[-1]) for line in lines if line.startswith("vllm:kv_cache_usage_perc")
    )


def test_a_client_that_hangs_up_frees_its_blocks(server):
    request = {"model": "tiny", "prompt": TEXT[:2000], "max_tokens": 3000, "ignore_eos": True}
    with requests.post(
        f"{server}/v1/completions",
        json={**request, "stream": True},
        headers=HEADERS,
        stream=True,
        timeout=60,
    ) as stream:
        lines = stream.iter_lines()  # the connection closes when this is collected
        assert next(lines)
        deadline = time.monotonic() + 90
        while not used_blocks(server):
            assert time.monotonic() < deadline
            time.sleep(0.2)
    deadline = time.monotonic() + 90
    while used_blocks(server):
        assert time.monotonic() < deadline, "blocks are still in use"
        time.sleep(0.2)


def test_run_batch_answers_a_file(model, tmp_path):
    lines = [
        {
            "custom_id": name,
            "method": "POST",
            "url": url,
            "body": {"model": str(model), "max_tokens": 4, **body},
        }
        for name, url, body in (
            ("chat", "/v1/chat/completions", {"messages": CHAT}),
            ("short", "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        )
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = subprocess.run(
        [*VLLM, "run-batch", "-i", str(source), "-o", str(target), "--model", str(model), *ENGINE],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=ENV,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    answers = {line["custom_id"]: line for line in map(json.loads, target.read_text().splitlines())}
    assert set(answers) == {"chat", "short"}
    for answer in answers.values():
        assert answer["response"]["status_code"] == 200
        assert answer["response"]["body"]["usage"]["completion_tokens"] > 0
    assert "pacellm: memory in layers 1, 3 of 4" in done.stdout + done.stderr


def test_structured_output_and_beams_do_not_depend_on_the_schedule(model):
    program = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams
text, schedule = sys.argv[2], json.loads(sys.argv[3])
llm = LLM(sys.argv[1], dtype="float32", max_model_len=4096, block_size=32,
          kv_cache_memory_bytes=64 << 20,
          structured_outputs_config={"backend": "xgrammar"}, **schedule)
digits = StructuredOutputsParams(regex="[0-9]{3}-[a-f]{5}")
params = SamplingParams(temperature=0, max_tokens=32, structured_outputs=digits)
prompts = [text[:1500], text[500:2500]]
said = [output.outputs[0].text for output in llm.generate(prompts, params)]
beams = llm.beam_search([{"prompt": p} for p in prompts], BeamSearchParams(3, 6))
print("SAID", json.dumps([said, [[b.tokens[-6:] for b in o.sequences] for o in beams]]))
"""
    answers = []
    for schedule in (
        {"max_num_batched_tokens": 64, "max_num_seqs": 2, "enable_prefix_caching": False},
        {"max_num_batched_tokens": 2048, "max_num_seqs": 16, "enable_prefix_caching": True},
    ):
        done = subprocess.run(
            [sys.executable, "-c", program, str(model), TEXT, json.dumps(schedule)],
            capture_output=True,
            text=True,
            check=False,
            env={**ENV, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        [line] = [line for line in done.stdout.splitlines() if line.startswith("SAID ")]
        answers.append(json.loads(line.removeprefix("SAID ")))
    assert answers[0] == answers[1]
    assert all(re.fullmatch("[0-9]{3}-[a-f]{5}", text) for text in answers[0][0])
