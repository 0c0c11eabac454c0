"""What ``register()`` imports, and what an error in it, or a missing package, takes away."""

import json
import os
import subprocess
import sys

import pytest
from checkpoints import make_prompt
from servers import python_path
from test_engine_off import LIGHT

# The last two are what scikit-learn brings along; vLLM asks for none of them.
SKLEARN = ("sklearn", "joblib", "threadpoolctl")
HIDE = "".join(f"import sys; sys.modules[{name!r}] = None\n" for name in SKLEARN)


def child(program, *arguments, hidden=None, **environment):
    """The JSON that ``program`` prints last, and what it logged.

    ``hidden`` is a directory for a ``sitecustomize`` that hides scikit-learn from it and from the
    processes that it starts.
    """
    if hidden:
        (hidden / "sitecustomize.py").write_text(HIDE)
        environment["PYTHONPATH"] = python_path(hidden)
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "VLLM_LOGGING_LEVEL": "INFO", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # vLLM may log its shutdown behind it.
    printed = [line for line in done.stdout.splitlines() if line[:1] in tuple('[{"')]
    return json.loads(printed[-1]), done.stdout + done.stderr


def test_register_imports_next_to_nothing():
    """In the process that imports least of vLLM before: the one that looks at a model class."""
    program = """
import json, sys
import vllm.model_executor.models.registry
before = set(sys.modules)
from pacellm_vllm.plugin import register
register()
register()
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    imported, _ = child(program)
    # The package itself was imported when vLLM looked for platforms.
    assert {*imported} == {*LIGHT, "vllm.model_executor.models.config"}


@pytest.mark.parametrize("broken", ["pacellm_vllm.compat", "pacellm_vllm.models.table"])
def test_an_error_in_register_costs_pace_architectures_only(broken):
    program = """
import json, sys
from types import ModuleType
sys.modules[sys.argv[1]] = ModuleType(sys.argv[1])
import vllm.plugins
from vllm.model_executor.models import ModelRegistry
vllm.plugins.load_general_plugins()
known = ModelRegistry.get_supported_archs()
print(json.dumps(["Qwen2ForCausalLM" in known, "PaceQwen2ForCausalLM" in known]))
"""
    known, log = child(program, broken, VLLM_PLUGINS="pacellm")
    assert known == [True, False]
    [line] = [line for line in log.splitlines() if "pacellm: the plugin" in line]
    assert "could not be registered (ImportError: cannot import name" in line
    assert line.endswith("everything else is as without the plugin.")


def test_memory_needs_no_scikit_learn(checkpoint, tmp_path):
    program = """
import json, sys
from importlib.util import find_spec
from vllm import LLM, SamplingParams
assert find_spec("sklearn") is None
pace = {"layers": [1, 3], "segment_size": 32, "bank_size": 23}
llm = LLM(sys.argv[1], dtype="float32", skip_tokenizer_init=True, max_model_len=256,
          block_size=32, kv_cache_memory_bytes=16 << 20,
          hf_overrides={"architectures": ["PaceQwen2ForCausalLM"]},
          additional_config={"pacellm": pace})
[output] = llm.generate([{"prompt_token_ids": json.loads(sys.argv[2])}],
                        SamplingParams(max_tokens=4, ignore_eos=True, detokenize=False))
[report] = llm.collective_rpc("pacellm_memory_report")
print(json.dumps([counts["commits"] for counts in report.values()]))
"""
    prompt = json.dumps(make_prompt(1, 70))
    commits, _ = child(program, checkpoint(), prompt, hidden=tmp_path)
    assert commits == [2, 2]


def test_clustering_without_scikit_learn_says_what_is_missing(tmp_path):
    program = """
import json, torch
from pacellm_vllm.experts import cache, loading, rewrite
from pacellm_vllm.experts.cluster import cluster
from pacellm_vllm.experts.errors import ExpertsError
try:
    cluster(torch.randn(8, 4), 2)
except ExpertsError as error:
    print(json.dumps(str(error)))
"""
    said, _ = child(program, hidden=tmp_path)
    assert said.startswith("pacellm: clustering needs scikit-learn, which cannot be imported (")
    assert said.endswith("or serve a checkpoint that pacellm cluster has written.")
