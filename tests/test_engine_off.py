"""Installed but not configured: the plugin changes nothing, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

from checkpoints import make_prompt

RUN = """
import json, sys
from engines import engine, prompt_logprobs
from vllm.plugins import load_general_plugins
with engine(sys.argv[1], max_num_batched_tokens=64) as running:
    outputs = running.generate(json.loads(sys.argv[2]), 24, prompt_logprobs=0, logprobs=0)
    print("RESULT", json.dumps([
        (
            list(o.outputs[0].token_ids),
            [x.hex() for x in prompt_logprobs(o)],
            [next(iter(entry.values())).logprob.hex() for entry in o.outputs[0].logprobs],
        )
        for o in outputs
    ]))
    print("CONFIG", running.core.vllm_config.compute_hash())
    print("PACELLM", "pacellm_vllm.plugin" in sys.modules)
"""


def run(checkpoint, plugins):
    """Tokens and logprobs of an engine in a process of its own that loads only these plugins."""
    env = {**os.environ, "VLLM_PLUGINS": plugins, "PYTHONPATH": str(Path(__file__).parent)}
    prompts = json.dumps([make_prompt(seed, 30 + 50 * seed) for seed in range(4)])
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(checkpoint), prompts],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    return {name: line.split(" ", 1)[1] for line in lines if (name := line.split(" ")[0]).isupper()}


def test_an_engine_without_memory_is_the_same_with_and_without_the_plugin(checkpoint):
    without = run(checkpoint(), "pacellm_cpu")
    installed = run(checkpoint(), "pacellm_cpu,pacellm")
    assert (without["PACELLM"], installed["PACELLM"]) == ("False", "True")
    assert json.loads(installed["RESULT"]) == json.loads(without["RESULT"])
    assert installed["CONFIG"] == without["CONFIG"]
