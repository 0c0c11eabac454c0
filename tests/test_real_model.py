"""A real checkpoint of this machine against the oracle: ``PACELLM_REAL_MODEL=FOLDER pytest ...``.

Real activations have outliers and real text repeats itself; random checkpoints know neither.
"""

import functools
import os
from pathlib import Path

import pytest
from engines import engine
from oracle import OracleModel
from test_engine_oracle import assert_engine_agrees
from transformers import AutoConfig, AutoTokenizer

MODEL = os.environ.get("PACELLM_REAL_MODEL", "")
pytestmark = pytest.mark.skipif(not MODEL, reason="PACELLM_REAL_MODEL names no checkpoint")

DOCUMENTS = Path(__file__).parent.parent / "docs"
# A decision nearer to a tie than rounding may fall either way.
GAP = 1e-6
SIZE, LENGTHS, ANSWER = 128, (60, 128, 301, 640), 24


@functools.cache
def prompts(length):
    """Token ids of English, from one place after another of the documents."""
    text = "\n".join(path.read_text() for path in sorted(DOCUMENTS.glob("*.md")))
    tokens = AutoTokenizer.from_pretrained(MODEL)(text).input_ids
    return [tokens[start : start + length] for start in range(0, 16 * 700, 700)]


@functools.cache
def cases(preset):
    """The settings of memory, and a prompt of each length with what the oracle says."""
    number = AutoConfig.from_pretrained(MODEL).get_text_config().num_hidden_layers
    pace = {
        "preset": preset,
        "layers": [number // 2, number - 2],
        "segment_size": SIZE,
        "bank_size": 50,
        "max_insertions": 20,
    }
    oracle, found = OracleModel(MODEL, pace), []
    for length in LENGTHS:
        for prompt in prompts(length):
            case = (prompt, *oracle.generate(prompt, ANSWER))
            if min(bank.closest_call for bank in oracle.banks.values()) > GAP:
                found.append(case)
                break
    assert len(found) == len(LENGTHS), "no prompt without a near tie"
    return pace, found


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("preset", ["gentle", "official", "paper"])
def test_the_engine_says_what_the_oracle_says(preset, compiled):
    pace, truth = cases(preset)
    settings = {"enforce_eager": not compiled, "kv_cache_memory_bytes": 512 << 20}
    with engine(MODEL, pace, max_num_batched_tokens=300, **settings) as running:
        assert_engine_agrees(running, truth, ANSWER)
        # With log-probabilities of prompts vLLM reads nothing from the prefix cache.
        said = running.tokens([case[0] for case in truth], ANSWER)
        assert said == [case[1] for case in truth]
        for memory in running.memories().values():
            assert memory.counts.commits > 0
        assert running.metric("vllm:prefix_cache_hits") > 0
        assert running.all_blocks_are_back()
