"""Odd requests and operators' interventions: as without memory, and the memory goes on right."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection

import pytest
import requests
from servers import FORKED, serving

TEXT = "The old farmer walked slowly to the market and sold his grey horse. " * 20
LONG = {"prompt": TEXT, "max_tokens": 300, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """A server that is developed on, whose memory acts from token 64 on."""
    log = tmp_path_factory.mktemp("log") / "server.log"
    command = [*FORKED, "serve", str(model), "--preset", "official", "--segment-size", "64"]
    command += ["--dtype", "float32", "--max-model-len", "2048", "--block-size", "16"]
    command += ["--kv-cache-memory-bytes", str(32 << 20), "--served-model-name", "tiny"]
    with serving(command, log, VLLM_SERVER_DEV_MODE="1") as url:
        yield url
        assert requests.get(f"{url}/health", timeout=30).status_code == 200


def complete(server, name=None, **body):
    headers = {"X-Request-Id": name} if name else None
    body = {"model": "tiny", "max_tokens": 8, "temperature": 0, **body}
    return requests.post(f"{server}/v1/completions", json=body, headers=headers, timeout=120)


def texts(answer):
    assert answer.status_code == 200, answer.text[:500]
    return [choice["text"] for choice in answer.json()["choices"]]


def test_requests_of_one_name_at_once_are_several_requests(server):
    asked = [{"prompt": TEXT, "n": 2, "temperature": 1, "seed": seed} for seed in range(4)]
    alone = [texts(complete(server, **body)) for body in asked]
    with ThreadPoolExecutor() as pool:
        together = list(pool.map(lambda body: texts(complete(server, "same", **body)), asked))
    assert together == alone
    assert all(len(found) == 2 for found in alone)


@pytest.mark.parametrize("prompt", ["", [], [[]], [""], ["", TEXT]])
def test_an_empty_prompt_is_a_400(server, prompt):
    assert complete(server, prompt=prompt).status_code == 400


@pytest.mark.parametrize("beside", [{"pacellm_alpha": 1}, {"vllm_xargs": {"pacellm_alpha": 1}}])
def test_settings_of_a_score_are_a_400(server, beside):
    body = {"model": "tiny", "query": "Sold", "items": [" his", " a"], "label_token_ids": [5, 6]}
    url = f"{server}/generative_scoring"
    assert requests.post(url, json=body, timeout=60).status_code == 200
    answer = requests.post(url, json={**body, **beside}, timeout=60)
    assert answer.status_code == 400
    assert "pacellm: 'pacellm_alpha' is not read by this route" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "beside",
    [{"extra_args": {"pacellm_alpha": 1}}, {"extra_body": {"vllm_xargs": {"pacellm_alpha": 1}}}],
)
def test_settings_where_another_way_in_has_them_are_a_400(server, beside):
    answer = complete(server, prompt=TEXT, **beside)
    assert answer.status_code == 400
    assert "'pacellm_alpha' is not a field of a request; put it into vllm_xargs" in answer.text


@pytest.mark.parametrize("token", ["-1", "999999"])
def test_a_bias_for_a_token_that_is_none_is_a_400(server, token):
    answer = complete(server, prompt="Hi", logit_bias={token: 5})
    assert answer.status_code == 400
    assert "logit_bias" in answer.text


def test_a_prompt_is_echoed_without_an_answer(server):
    [said] = texts(complete(server, prompt=TEXT, echo=True, max_tokens=0))
    assert said == TEXT


def test_prompt_logprobs_know_nothing_of_requests_with_other_settings(server):
    complete(server, prompt=TEXT, vllm_xargs={"pacellm_alpha": 1.0})

    def logprobs(**more):
        answer = complete(server, prompt=TEXT, max_tokens=1, prompt_logprobs=0, **more)
        [choice] = answer.json()["choices"]
        return [next(iter(row.values()))["logprob"] for row in choice["prompt_logprobs"][1:]]

    found = logprobs()
    assert found == pytest.approx(logprobs(cache_salt="another"), abs=1e-4)
    strong = logprobs(vllm_xargs={"pacellm_alpha": 1.0})
    assert found[:63] == pytest.approx(strong[:63], abs=1e-4)
    assert found[63:] != pytest.approx(strong[63:], abs=1e-2)


@pytest.mark.parametrize(
    "intervention",
    [
        "/reset_prefix_cache",
        "/reset_prefix_cache?reset_running_requests=true",
        "/pause?mode=keep",
        "/pause?mode=wait",
        "/pause?mode=abort",
    ],
)
def test_an_answer_survives_what_an_operator_does_in_a_segment(server, intervention):
    [want] = texts(complete(server, cache_salt="alone", **LONG))
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(complete, server, **LONG)
        wait_for(lambda: metric(server, "num_requests_running") == 1)
        done = requests.post(server + intervention, timeout=60)
        assert done.status_code == 200, done.text
        if intervention.startswith("/pause"):
            assert requests.post(f"{server}/resume", timeout=60).status_code == 200
        answer = asked.result()
    [said] = texts(answer)
    if "abort" in intervention:
        assert answer.json()["choices"][0]["finish_reason"] == "abort"
        assert want.startswith(said)
    else:
        assert said == want


def test_requests_given_up_while_they_wait_behind_a_hit_leave_nothing(server):
    complete(server, prompt=TEXT)
    body = {"model": "tiny", "prompt": [f"{TEXT} {i}" for i in range(40)], "max_tokens": 500}
    clients = [HTTPConnection(server.removeprefix("http://")) for _ in range(2)]
    for client in clients:
        headers = {"Content-Type": "application/json"}
        client.request("POST", "/v1/completions", json.dumps(body), headers)
    wait_for(lambda: metric(server, "num_requests_waiting") > 0)
    for client in clients:
        client.close()
    counted = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    wait_for(lambda: not any(metric(server, name) for name in counted))


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def metric(server, name):
    lines = requests.get(f"{server}/metrics", timeout=30).text.splitlines()
    [line] = [line for line in lines if line.startswith(f"vllm:{name}{{")]
    return float(line.rsplit(None, 1)[1])
