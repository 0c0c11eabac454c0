"""The HTTP API as an attacker would use it: 4xx with a short sentence, and a server that lives."""

import json
import subprocess
import sys

import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import ENV, FORKED, serving

KEY = "secret"
HEADERS = {"Authorization": f"Bearer {KEY}"}
ENGINE = ["--dtype", "float32", "--max-model-len", "1024"]
ENGINE += ["--kv-cache-memory-bytes", str(32 << 20)]
SAID = [{"role": "user", "content": "Hi"}]
ONE = {"max_tokens": 1, "temperature": 0}
# A request of one token to each route that reaches the engine.
ROUTES = {
    "/v1/completions": {"prompt": "Hi", **ONE},
    "/v1/chat/completions": {"messages": SAID, **ONE},
    "/v1/chat/completions/batch": {"messages": [SAID, SAID], **ONE},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 1, "temperature": 0},
    "/v1/messages": {"messages": SAID, "model": "tiny", **ONE},
}
STREAMS = set(ROUTES) - {"/v1/chat/completions/batch"}
SHORT = 1024  # bytes of an answer that refuses


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """The base URL of a server with memory and an API key, healthy to the end."""
    log = tmp_path_factory.mktemp("log") / "server.log"
    command = [*FORKED, "serve", str(model), *ENGINE]
    with serving([*command, "--api-key", KEY, "--served-model-name", "tiny"], log) as url:
        yield url
        assert requests.get(f"{url}/health", timeout=30).status_code == 200


def post(server, route, **more):
    body = json.dumps({**ROUTES[route], **more})
    headers = {**HEADERS, "Content-Type": "application/json"}
    return requests.post(server + route, data=body, headers=headers, timeout=120)


def refused(answer, words="pacellm: "):
    assert 400 <= answer.status_code < 500, answer.text[:SHORT]
    assert len(answer.content) < SHORT
    assert words in answer.text


HOSTILE = {
    "out of range": {"pacellm_alpha": 3},
    "near miss": {"pacellm-alpha": 0.5},
    "near miss in capitals": {"PACELLM_alpha": 0.5},
    "a boolean": {"pacellm_alpha": True},
    "a list": {"pacellm_alpha": [0.5]},
    "not a number": {"pacellm_noise": float("nan")},
    "too deep": {"pacellm": "[" * 100_000},
    "objects too deep": {"pacellm": '{"alpha":' * 100_000},
    "a number too long": {"pacellm": '{"alpha": ' + "1" * 5000 + "}"},
    "too large": {"pacellm": '{"alpha": 1e400}'},
    "twice": {"pacellm": '{"alpha": 0.1, "alpha": 0.9}'},
    "twice in two ways": {"pacellm": '{"alpha": 0.1}', "pacellm_alpha": 0.1},
    "half a character": {"pacellm_alpha": "\ud800"},
    "half a character in a key": {"pacellm_\ud800": 1},
    "a megabyte": {"pacellm": "x" * 1_000_000},
    "a number of a megabyte": {"pacellm_alpha": "1" * 1_000_000},
    "a key of a megabyte": {"pacellm_" + "x" * 1_000_000: 1},
    "a megabyte of marks": {"pacellm" + "\u0300\u0316" * 500_000: 1},
    "many keys": {f"pacellm_{i}": i for i in range(10_000)},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_settings_are_refused_in_a_sentence(name, server):
    for route in ROUTES:
        refused(post(server, route, vllm_xargs=HOSTILE[name]))
    # Before the stream begins.
    for route in STREAMS:
        refused(post(server, route, vllm_xargs=HOSTILE[name], stream=True))


@pytest.mark.parametrize("route", ROUTES)
def test_other_shapes_are_a_short_4xx_too(route, server):
    for name, value in (
        ("null", None),
        ("an object", {"alpha": 0.5}),
        ("more than 64 bits", 2**64),
        ("far more", 10**400),
    ):
        answer = post(server, route, vllm_xargs={"pacellm_alpha": value})
        assert 400 <= answer.status_code < 500, name
        assert len(answer.content) < 2 * SHORT
    for xargs in ([], "pacellm_alpha", [["pacellm_alpha", 0.5]]):
        assert post(server, route, vllm_xargs=xargs).status_code in (400, 422)


def test_settings_beside_the_extra_arguments_are_refused(server):
    for route in set(ROUTES) - {"/v1/messages"}:  # which shows plugins no fields but its own
        refused(post(server, route, pacellm_alpha=0.5), "put it into vllm_xargs")
    for route in ("/v1/completions", "/v1/chat/completions"):
        for more in ({"vllm_xargs": {"PaceLLM.alpha": 0.5}}, {"pacellm": {"alpha": 0.5}}):
            answer = post(server, route, use_beam_search=True, n=2, **more)
            refused(answer, "is not supported with use_beam_search")
    refused(post(server, "/v1/completions", n=2, temperature=1, vllm_xargs={"pacellm_alpha": 3}))


@pytest.mark.parametrize("route", ROUTES)
def test_good_settings_are_taken(route, server):
    for xargs in (
        {"pacellm_enabled": False},
        {"pacellm_enabled": 0, "pacellm_alpha": "5e-1"},
        {"pacellm": '{"alpha": 0.5, "noise": null}', "another": "y" * 1_000_000},
        {"alpha": 3, "pace": "x", "": 1},
    ):
        assert post(server, route, vllm_xargs=xargs).status_code == 200
        if route in STREAMS:
            assert post(server, route, vllm_xargs=xargs, stream=True).status_code == 200


FIELDS = ["enabled", "alpha", "noise", "theta_high", "theta_low"]
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 0.5, 1, "0.5", "1e-3", "-0", "nan"])
VALUES = NUMBERS | st.booleans() | st.text(max_size=20) | st.lists(NUMBERS, max_size=3)
OBJECTS = st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=9), VALUES, max_size=4)
KEYS = st.sampled_from([f"pacellm_{name}" for name in FIELDS] * 3 + ["pacellm-alpha", "other"])
XARGS = st.dictionaries(KEYS | st.text(max_size=9), VALUES, max_size=4) | st.builds(
    lambda text, rest: {**rest, "pacellm": text},
    OBJECTS.map(json.dumps) | st.text(max_size=40),
    st.dictionaries(KEYS, VALUES, max_size=1),
)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_whatever_the_settings_the_answer_is_an_answer_or_a_sentence(route, stream, server):
    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(xargs=XARGS)
    def ask(xargs):
        answer = post(server, route, vllm_xargs=xargs, stream=stream)
        if answer.status_code == 200:
            assert b'"error"' not in answer.content
        else:
            # The other sentence is vLLM's own about integers.
            words = "pacellm: " if "pacellm: " in answer.text else "between -2**63 and 2**64"
            refused(answer, words)

    ask()


def test_schemathesis_finds_nothing_on_our_route(server, tmp_path):
    """Against the server's OpenAPI document: methods, headers and queries, with and without key."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server}/openapi.json"]
    command += ["--include-path", "/plugins/pacellm/memory", "--checks", "all", "--no-color"]
    command += ["--max-examples", "50", "--generation-deterministic"]
    for header in (f"Authorization: Bearer {KEY}", "X-Other: 1"):
        done = subprocess.run(
            [*command, "--header", header],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,  # where it leaves a cache
            env=ENV,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
        assert "1 selected" in done.stdout
