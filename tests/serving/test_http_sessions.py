"""Sessions over HTTP: chat, streams, tenants, what is refused, and what is reported."""

import subprocess
import time
from pathlib import Path

import pytest
import requests
from servers import ENV, FORKED, PACELLM, serving
from session_truth import Truth
from test_session_engine import NUMBERS, PLACES, TOLD
from transformers import AutoTokenizer

MODEL = str(Path(__file__).parent.parent.parent / "scripts" / "tiny")
SERVE = [*FORKED, "serve", MODEL, "--session-tokens", "4000", "--layers", ""]
SERVE += ["--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"]
SERVE += ["--kv-cache-memory-bytes", str(64 << 20), "--served-model-name", "tiny"]
TEMPLATE = "{% for m in messages %}{{ m.role }}\n{{ m.content }}\n{% endfor %}assistant\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("server")
    (directory / "chat.jinja").write_text(TEMPLATE)
    command = [*SERVE, "--chat-template", str(directory / "chat.jinja")]
    with serving(command, directory / "server.log") as url:
        yield url


@pytest.fixture(scope="module")
def tokenizer():
    found = AutoTokenizer.from_pretrained(MODEL)
    found.chat_template = TEMPLATE
    return found


def post(server, route, session, salt=None, **body):
    own = {"pacellm_session": session} if isinstance(session, str) else session
    body |= {"model": "tiny", "max_tokens": 5, "temperature": 0, "vllm_xargs": own}
    body |= {"return_token_ids": True, **({"cache_salt": salt} if salt else {})}
    return requests.post(f"{server}/v1/{route}", json=body, timeout=120)


def chat(server, session, text, salt=None, **body):
    answer = post(
        server,
        "chat/completions",
        session,
        salt,
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}],
        **body,
    )
    assert answer.status_code == 200, answer.text
    said = answer.json()
    return said["prompt_token_ids"], said["choices"][0]["token_ids"], said


def rendered(tokenizer, text):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )


def asks(place):
    return f"What is the magic number of {place}?"


def test_a_chat_reads_within_its_message_what_another_chat_was_told(server, tokenizer):
    truth = Truth(tokenizer)
    for text in (TOLD[0], TOLD[1], asks("rome"), asks("dakar")):
        prompt = rendered(tokenizer, text)
        got, answer, said = chat(server, "chats", text)
        assert got == truth.read(prompt)
        assert said["usage"]["prompt_tokens"] == len(got)
        truth.write(prompt, answer)
        read = tokenizer.decode(got)
        # The template around it is whole, and the text stands before the question.
        whole = tokenizer.decode(prompt)
        assert read.startswith(whole[: whole.index(text)])
        assert read.endswith(whole[whole.index(text) :])
        report = requests.get(f"{server}/plugins/pacellm/answers/{said['id']}", timeout=60).json()
        assert report["session"]["tokens"] == len(got) - len(prompt)
        if text.startswith("What"):
            assert str(NUMBERS[text.split()[-1][:-1]]) in read
            assert report["session"]["pages"] == 2


def test_a_stream_and_a_completion_are_of_the_same_session(server, tokenizer):
    with requests.post(
        f"{server}/v1/completions",
        json={
            "model": "tiny",
            "prompt": TOLD[0],
            "max_tokens": 3,
            "stream": True,
            "vllm_xargs": {"pacellm_session": "stream"},
        },
        stream=True,
        timeout=120,
    ) as stream:
        lines = [line for line in stream.iter_lines() if line]
    assert lines[-1] == b"data: [DONE]"
    got, _, _ = chat(server, {"pacellm_session": "stream"}, asks("lima"))
    assert f"lima is {NUMBERS['lima']}" in tokenizer.decode(got)


def test_tenants_have_sessions_of_their_own(server, tokenizer):
    for salt, text in (("one", TOLD[0]), ("two", TOLD[1])):
        chat(server, "shared", text, salt)
    for salt, told in (("one", TOLD[0]), ("two", TOLD[1]), ("three", ""), (None, "")):
        for place in PLACES:
            own = {"pacellm_session": "shared", "pacellm_session_write": False}
            got, _, _ = chat(server, own, asks(place), salt)
            assert (f"{place} is {NUMBERS[place]}" in tokenizer.decode(got)) == (place in told)


def running(server):
    """How many requests the engine has."""
    lines = requests.get(f"{server}/metrics", timeout=60).text.splitlines()
    name = "vllm:num_requests_running"
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def wait_until(so):
    deadline = time.monotonic() + 60
    while not so():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_client_that_hangs_up_leaves_nothing(server, tokenizer):
    body = {"model": "tiny", "prompt": TOLD[0], "max_tokens": 600, "ignore_eos": True}
    body |= {"stream": True, "vllm_xargs": {"pacellm_session": "gone"}}
    with requests.post(f"{server}/v1/completions", json=body, stream=True, timeout=60) as stream:
        lines = stream.iter_lines()
        assert next(lines)
        wait_until(lambda: running(server))
    del lines
    wait_until(lambda: not running(server))
    got, _, _ = chat(server, "gone", asks("rome"))
    assert got == rendered(tokenizer, asks("rome"))


def test_what_is_refused_is_a_400_before_a_stream_begins(server):
    for own, more, sentence in (
        ({"pacellm_session": "a"}, {"n": 2, "temperature": 1}, "not n = 2"),
        ({"pacellm_session": ""}, {}, "a name of 1 to 256 characters"),
        ({"pacellm_session_write": False}, {}, "must name a session"),
        ({"pacellm_alpha": 0.5}, {}, "carries no memory that a request could set"),
    ):
        body = {"model": "tiny", "prompt": "Hi", "stream": True, "vllm_xargs": own, **more}
        answer = requests.post(f"{server}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 400, answer.text
        assert sentence in answer.json()["error"]["message"]


def test_what_sessions_keep_is_counted_and_bounded(server):
    for n in range(12):
        chat(server, f"many {n}", " ".join(f"word{n}x{i}" for i in range(60)))
    sessions = requests.get(f"{server}/plugins/pacellm/memory", timeout=60).json()["sessions"]
    assert sessions["pages"] == 4000 // 128 + 1
    assert sessions["tokens"] <= sessions["pages"] * 128
    assert sessions["evicted"] > 0


def test_several_api_servers_are_refused():
    done = subprocess.run(
        [*PACELLM, *SERVE[len(FORKED) :], "--api-server-count", "2", "--port", "1"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=ENV,
    )
    assert done.returncode != 0
    assert "session_tokens does not work with several API servers" in done.stdout + done.stderr
