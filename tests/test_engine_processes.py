"""However vLLM starts its processes, each has what it needs of ours, and no more."""

import json

import pytest
from checkpoints import make_prompt
from engines import BLOCK_SIZE, engine
from servers import printed_by
from test_engine_drafts import ngram
from test_engine_requests import PACE, ask, said

from pacellm_vllm.compat import PATCHED

# The second run finds the first one's prefixes, each under its own settings.
RUN = """
import json, sys
if sys.argv[1] == "fork":  # before vLLM takes names; on a CPU it would spawn
    import forked
    forked.fork()
from patches import ours_in_vllm
from vllm import LLM, SamplingParams
from vllm.v1.engine.utils import get_mp_context

def main(model, settings, cases):
    llm = LLM(model, **settings)
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in cases]
    params = [SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False,
                             extra_args=extra) for _, extra in cases]
    runs = [llm.generate(prompts, params, use_tqdm=False) for _ in range(2)]
    print(json.dumps({
        "said": [[list(o.outputs[0].token_ids) for o in outputs] for outputs in runs],
        "cached": [o.num_cached_tokens for o in runs[1]],
        "patched": list(ours_in_vllm()),
        "started": get_mp_context().get_start_method(),
    }))

if __name__ == "__main__":
    main(*map(json.loads, sys.argv[2:]))
"""
ASKS = [None, {"pacellm_alpha": 0.9}, {"pacellm_enabled": False}]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_front_end_engine_core_and_workers_are_each_patched(method, checkpoint, tmp_path):
    cases = [(make_prompt(seed, 150), extra) for seed in range(2) for extra in ASKS]
    with engine(checkpoint("llama"), PACE, speculative_config=ngram(2)) as running:
        truth = said(ask(running, cases, max_tokens=20))
    program = tmp_path / "program.py"
    program.write_text(RUN)
    settings = {
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "max_model_len": 1024,
        "block_size": BLOCK_SIZE,
        "kv_cache_memory_bytes": 64 << 20,
        "enforce_eager": True,
        "tensor_parallel_size": 2,
        "speculative_config": ngram(2),
        "hf_overrides": {"architectures": ["PaceLlamaForCausalLM"]},
        "additional_config": {"pacellm": PACE},
    }
    given = map(json.dumps, (str(checkpoint("llama")), settings, cases))
    found = json.loads(printed_by(program, method, *given, VLLM_ENABLE_V1_MULTIPROCESSING="1")[-1])
    assert found["started"] == method
    assert found["said"] == [truth, truth]
    # Of 150 tokens: a copy of the bank each three segments of 32, or whole blocks without memory.
    assert found["cached"] == [96, 96, 149 // BLOCK_SIZE * BLOCK_SIZE] * 2
    assert {*found["patched"]} <= {
        *PATCHED["load_with_drafts"],
        *PATCHED["check_http_requests"],
        *PATCHED["prepare_requests"],
        *PATCHED["refuse_in_beam_search"],
        *PATCHED["refuse_in_scoring"],
        *PATCHED["watch_turns"],
    }
