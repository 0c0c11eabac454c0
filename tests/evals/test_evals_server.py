"""Evaluations of a running server: the answers of this process, of the configuration it runs."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import benchmark_files
import pytest
from servers import FORKED, serving

from pacellm_vllm.cli import main
from pacellm_vllm.evals.records import EvalError
from pacellm_vllm.evals.report import unchecked
from pacellm_vllm.evals.server import Server
from pacellm_vllm.evals.settings import Setting

ENGINE = {"dtype": "float32", "block_size": 16, "kv_cache_memory_bytes": 32 << 20}
GRID = ["--needles", "3", "--digits", "2", "--max-tokens", "3", "--depths", "0,100"]
GRID += ["--samples", "5", "--quiet", "--memory", '{"segment_size": 64}']
TASKS = "longbench_triviaqa,infinitebench_passkey,mmlu_anatomy"
SUITE = ["--tasks", TASKS, "--limit", "2", "--max-length", "300", "--quiet"]
SUITE += ["--memory", '{"segment_size": 64}', "--configs", "official"]

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture(scope="module")
def tiny_server(tiny, tmp_path_factory):
    """The URL of a server with ``official`` memory and segments of 64 tokens; its name is tiny."""
    command = [*FORKED, "serve", tiny, "--preset", "official", "--segment-size", "64"]
    command += ["--dtype", "float32", "--block-size", "16", "--max-model-len", "640"]
    command += ["--kv-cache-memory-bytes", str(32 << 20), "--served-model-name", "tiny"]
    # As a generation_config.json beside a model would; an evaluation is greedy all the same.
    command += ["--override-generation-config", '{"repetition_penalty": 1.5}']
    with serving(command, tmp_path_factory.mktemp("server") / "server.log") as base:
        yield f"{base}/v1"


def measured(kind, model, out, *words):
    assert main(["eval", kind, model, "--out", str(out), *words]) == 0
    return json.loads((out / "report.json").read_text())


def of(url):
    return ["--base-url", url, "--served-model-name", "tiny"]


def test_needles_are_found_as_in_this_process(tiny, tiny_server, tmp_path):
    words = [*GRID, "--lengths", "128", "--configs", "official"]
    engine = json.dumps({**ENGINE, "max_model_len": 512})
    here = measured("niah", tiny, tmp_path / "here", *words, "--engine", engine)
    there = measured("niah", tiny, tmp_path / "there", *words, *of(tiny_server))
    assert there["configs"] == here["configs"]
    checked = there["engines"]["official"]
    assert checked["checked"] is True
    assert checked["config"] == here["engines"]["official"]["config"]
    assert checked["config"]["layers"] == [1, 3]
    assert "was not checked" not in (tmp_path / "there" / "report.md").read_text()


@pytest.mark.parametrize(
    ("configs", "wrong"),
    [
        ("paper", "its preset is 'official', not 'paper'"),
        ("off", "it runs with memory"),
        ('{"mine": {"layers": [0], "segment_size": 64}}', r"its layers is [1, 3], not [0]"),
    ],
)
def test_a_server_of_another_configuration_is_refused(
    tiny, tiny_server, tmp_path, capsys, configs, wrong
):
    words = ["--lengths", "128", "--configs", configs, "--base-url", tiny_server]
    words = [*GRID, *words, "--served-model-name", "tiny"]
    assert main(["eval", "niah", tiny, "--out", str(tmp_path), *words]) == 2
    assert wrong in capsys.readouterr().err


def results(out):
    lines = [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]
    return [line for line in lines if "id" in line]


def test_benchmarks_are_answered_as_in_this_process(tiny, tiny_server, tmp_path):
    data = ["--data", str(benchmark_files.write_all(tmp_path / "data"))]
    engine = ["--engine", json.dumps({**ENGINE, "max_model_len": 640})]
    here = measured("suite", tiny, tmp_path / "here", *SUITE, *data, *engine)
    there = measured("suite", tiny, tmp_path / "there", *SUITE, *data, *of(tiny_server))
    assert there["tasks"] == here["tasks"]
    assert there["tasks"]["infinitebench_passkey"]["scores"]["official"] > 0
    for a, b in zip(results(tmp_path / "here"), results(tmp_path / "there"), strict=True):
        if a["id"].startswith("mmlu"):
            benchmark_files.assert_near(a.pop("output"), b.pop("output"))
        assert a == b

    words = [*SUITE, *data, *of(tiny_server), "--route", "chat"]
    words += ["--tasks", "infinitebench_passkey,niah_single_1,longbench_lcc"]
    messages = measured("suite", tiny, tmp_path / "chat", *words)
    asked = {name: task["chat"] for name, task in messages["settings"]["tasks"].items()}
    assert asked == {"infinitebench_passkey": True, "niah_single_1": True, "longbench_lcc": False}
    assert messages["tasks"]["infinitebench_passkey"]["scores"]["official"] > 0
    assert messages["tasks"]["niah_single_1@256"]["scores"]["official"] > 0


def test_a_loglikelihood_is_that_of_transformers(tiny, tiny_server):
    prompts, expected = benchmark_files.scored(tiny)
    # Memory acts after a segment.
    assert len(prompts[0][0]) < 64
    benchmark_files.assert_near(
        Server(tiny_server, "tiny", "none").loglikelihood(prompts), expected
    )


class Plain(BaseHTTPRequestHandler):
    """A vLLM server without our route."""

    def do_GET(self):
        found = self.path == "/v1/models"
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write(b'{"data": [{"id": "m", "max_model_len": 64}]}' if found else b"{}")

    def log_message(self, *args):
        pass


def test_a_server_that_does_not_say_what_it_runs_is_reported_as_such():
    with HTTPServer(("127.0.0.1", 0), Plain) as plain:
        threading.Thread(target=plain.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{plain.server_port}/v1"
        server = Server(url, "m", "none")
        server.check(Setting("official", {}), {"alpha": 0.2})
        with pytest.raises(EvalError, match="serves m, not other"):
            Server(url, "other", "none")
        plain.shutdown()
    assert server.describe() == {"checked": False, "config": None, "engine": {"max_model_len": 64}}
    [sentence] = unchecked({"official": server.describe(), "off": {"checked": True}})
    assert "`official` was not checked" in sentence
    with pytest.raises(EvalError, match="did not answer"):
        Server(url, "m", "none")
