"""Installed but not configured: the plugin changes nothing, bit for bit, and imports nothing."""

import json
from pathlib import Path

from checkpoints import make_prompt
from servers import printed_by

from pacellm_vllm import compat

# Requests carry what only engines with memory look at, and would not allow.
RUN = """
import json, sys
from engines import engine, prompt_logprobs
with engine(sys.argv[1], max_num_batched_tokens=64) as running:
    outputs = running.generate(
        json.loads(sys.argv[2]), 24, prompt_logprobs=0, logprobs=0,
        extra_args={"pacellm_alpha": 3, "pacellm": "[["},
    )
    print("RESULT", json.dumps([
        (
            list(o.outputs[0].token_ids),
            [x.hex() for x in prompt_logprobs(o)],
            [next(iter(entry.values())).logprob.hex() for entry in o.outputs[0].logprobs],
        )
        for o in outputs
    ]))
    print("CONFIG", running.core.vllm_config.compute_hash())
    print("MODULES", json.dumps(list(sys.modules)))
    from patches import ours_in_vllm
    print("PATCHED", json.dumps(list(ours_in_vllm())))
"""
# What may be imported, all of it light: see ``test_plugin.py``.
LIGHT = {
    "pacellm_vllm.plugin",
    "pacellm_vllm.compat",
    *(f"pacellm_vllm.compat.{path.stem}" for path in Path(compat.__file__).parent.glob("[!_]*.py")),
    "pacellm_vllm.models",
    "pacellm_vllm.models.table",
    "pacellm_vllm.sentences",
}


def run(checkpoint, plugins):
    """Tokens and logprobs of an engine in a process of its own that loads only these plugins."""
    prompts = json.dumps([make_prompt(seed, 30 + 50 * seed) for seed in range(4)])
    lines = printed_by("-c", RUN, str(checkpoint), prompts, VLLM_PLUGINS=plugins)
    found = {
        name: line.split(" ", 1)[1] for line in lines if (name := line.split(" ")[0]).isupper()
    }
    return {name: text if name == "CONFIG" else json.loads(text) for name, text in found.items()}


def test_an_engine_without_memory_is_the_same_with_and_without_the_plugin(checkpoint):
    without = run(checkpoint(), "pacellm_cpu")
    installed = run(checkpoint(), "pacellm_cpu,pacellm")
    assert installed["RESULT"] == without["RESULT"]
    assert installed["CONFIG"] == without["CONFIG"]
    # The platform imports some of it, too.
    assert {*installed["MODULES"]} - ({*without["MODULES"]} - LIGHT) == LIGHT
    assert installed["PATCHED"] == []
