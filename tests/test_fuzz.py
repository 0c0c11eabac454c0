"""The fuzzer: what it makes, what it notices, and a few engines of it."""

import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import fuzz_engine
import pytest
from fuzz.breaks import BREAKS
from fuzz.cases import FEATURES, PLAIN, RequestCase, Turn, make_case
from fuzz.drive import Answer, Record, Talk
from fuzz.events import Subscriber
from fuzz.hits import faults_of_hits
from fuzz.judge import _wrong_token, judge
from fuzz.models import Models
from fuzz.own import are_vllms
from fuzz.truth import GAP, Reading, Truth
from oracle import OracleModel
from test_manager import make_manager, make_request, run
from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    make_block_hash_with_group_id,
    maybe_convert_block_hash,
)

SCRIPT = Path(__file__).parent.parent / "scripts" / "fuzz_engine.py"
PACE = {"preset": "official", "layers": [1, 3], "bank_size": 23, "segment_size": 32}


def fuzz(*arguments):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True
    )


def test_a_case_is_a_function_of_its_seed():
    assert all(make_case(seed) == make_case(seed) for seed in range(30))
    assert make_case(1) != make_case(2)


def test_200_engines_try_everything():
    counts = Counter(feature for seed in range(200) for feature in make_case(seed).features())
    assert set(counts) == FEATURES
    assert min(counts.values()) >= 8, counts


@pytest.mark.parametrize("seed", range(200))
def test_cases_are_ones_that_an_engine_takes(seed):
    case = make_case(seed)
    pace, settings = case.pace, case.settings
    longest = settings["max_model_len"]
    assert 0 <= pace["max_insertions"] <= pace["bank_size"]
    assert settings["max_num_batched_tokens"] >= settings["max_num_seqs"]
    if case.caching:
        assert pace["segment_size"] % settings["block_size"] == 0
    if case.drafts:
        assert not case.asynchronous
    requests = list(case.requests())
    assert 4 <= len(requests) <= 15
    names = [request.name for request in requests]
    assert len(set(names)) == len(names)
    for request in requests:
        assert sum(len(turn.tokens) + turn.max_tokens for turn in request.turns) <= longest
        if request.embeddings:
            assert case.architecture in PLAIN
        if request.follows:
            assert names.index(request.follows) < names.index(request.name)


def test_the_truth_reads_what_the_oracle_says(checkpoint):
    oracle, truth = OracleModel(checkpoint(), PACE), Truth(checkpoint(), PACE)
    prompt = make_case(3).waves[0].requests[0].turns[0].tokens[:60]
    tokens, logprobs = oracle.generate(list(prompt), 30)
    reading = truth.read([*prompt, *tokens])
    assert reading.chosen[: len(logprobs)] == pytest.approx(logprobs, abs=1e-4)
    said = slice(len(prompt) - 1, None)
    assert reading.chosen[said] == reading.best[said]
    closest = min(bank.closest_call for bank in oracle.banks.values())
    assert (reading.sure == 90) == (closest > GAP)


def test_nothing_is_said_of_tokens_behind_a_near_tie(checkpoint, monkeypatch):
    monkeypatch.setattr("fuzz.truth.GAP", 10.0)
    reading = Truth(checkpoint(), PACE).read(range(1, 80))
    assert reading.sure == 32


@pytest.mark.parametrize(
    ("logprob", "best", "greedy", "wrong"),
    [
        (-1.0, -1.0, True, None),
        (-1.0005, -1.0, True, None),
        (-1.1, -1.0, True, "log-probability"),
        (float("nan"), -1.0, True, "log-probability"),
        (-1.0, -0.9, True, "not the likeliest"),
        (-1.0, -0.9, False, None),
    ],
)
def test_a_token_is_held_to_its_log_probability_and_to_the_likeliest(logprob, best, greedy, wrong):
    fault = _wrong_token(Reading([-1.0], [best], 2), 1, logprob, greedy)
    assert (wrong in fault) if wrong else fault is None


def talk(name, prompt, cached, wave=0, **turn):
    request = RequestCase(name, (Turn(tuple(prompt), 5, **turn),), 0)
    return Talk(request, wave, [Answer([list(prompt)], [[7] * 5], [[0.0] * 5])], cached=cached)


def hits(*talks):
    """What is said of hits in a roomy engine with segments of 32 and blocks of 16."""
    case = SimpleNamespace(
        caching=True,
        pool="pool plenty",
        architecture="qwen2",
        settings={"block_size": 16},
        pace={"segment_size": 32},
    )
    record = Record(talks={talk.case.name: talk for talk in talks}, bank_pages=2)
    return list(faults_of_hits(case, record))


def test_hits_are_bounded_from_both_sides():
    text = list(range(200))
    assert hits(talk("a", text, 0), talk("b", text, 160, wave=1)) == []
    assert "not 160" in hits(talk("a", text, 0), talk("b", text, 64, wave=1))[0]
    assert "no multiple of 32" in hits(talk("a", text, 0), talk("b", text, 144, wave=1))[0]
    assert "shares 0" in hits(talk("a", text, 32))[0]
    other = {"extra": {"pacellm_alpha": 0.5}, "overrides": {"alpha": 0.5}}
    assert "shares 0" in hits(talk("a", text, 0), talk("b", text, 160, wave=1, **other))[0]
    off = {"overrides": {"layers": ()}}
    assert hits(talk("a", text, 0, **off), talk("b", text, 192, wave=1, **off)) == []


def block_hash(number):
    return BlockHash(bytes([number]) * 32)


def stored(*numbers, tokens=16, group=0):
    hashes = [maybe_convert_block_hash(block_hash(number)) for number in numbers]
    return BlockStored(hashes, None, [7] * tokens, 16, None, None, None, group_idx=group)


def removed(number):
    return BlockRemoved([maybe_convert_block_hash(block_hash(number))], None, group_idx=0)


@pytest.mark.parametrize(
    ("events", "cached", "fault"),
    [
        ([stored(1)], [1], None),
        ([stored(1, 2, tokens=32)], [1, 2], None),
        ([stored(1), removed(1)], [], None),
        ([stored(1), removed(1), stored(1)], [1], None),
        # A group that is kept out of events.
        ([], [1], None),
        ([stored(1)], [], "1 stored blocks that are not there"),
        ([stored(1)], [1, 2], "1 cached blocks that were never told of"),
        ([stored(1), removed(1), removed(1)], [], "removed that was never stored"),
        ([stored(1, tokens=48)], [1], "48 tokens in 1 blocks of 16, Window"),
    ],
)
def test_a_subscriber_says_what_it_heard_and_is_not_so(events, cached, fault):
    keys = [make_block_hash_with_group_id(block_hash(number), 0) for number in cached]
    pool = SimpleNamespace(
        take_events=lambda: events,
        cached_block_hash_to_block=SimpleNamespace(_cache=dict.fromkeys(keys)),
    )
    found = Subscriber(pool, ["Window"]).compare()
    assert (len(found) == 1 and fault in found[0]) if fault else not found


def test_a_subscriber_follows_a_pool_that_stores_and_evicts():
    manager = make_manager(blocks=60, caching=True, events=True)
    subscriber = Subscriber(manager.block_pool, ["Attention", "Bank"])
    for number in range(4):
        tokens = list(range(1000 * number, 1000 * number + 200))
        assert run(manager, make_request(f"r{number}", tokens, caching=True), chunk=64) == 0
        assert not subscriber.compare()
    # Behind its back.
    manager.block_pool.enable_kv_cache_events = False
    manager.block_pool.evict_blocks({block.block_id for block in manager.block_pool.blocks})
    assert "stored blocks that are not there" in subscriber.compare()[0]


NEVER = "never scheduled although 18 of 28 blocks are free: r3 (181 tokens)"
EVENTS = "KV events: 192 tokens in 1 blocks of 64, SlidingWindowSpec after wave 0"
GONE = "KV events: 3 stored blocks that are not there, SlidingWindowSpec after wave 2"
UNTOLD = "KV events: 3 cached blocks that were never told of, SlidingWindowSpec after wave 2"
DIED = "the engine died: IndexError: out of range (gpu_input_batch.py:12)"


@pytest.mark.parametrize(
    ("faults", "plain", "vllms"),
    [
        ([NEVER], ["never scheduled although 9 of 16 blocks are free: r3 (181 tokens)"], True),
        ([NEVER], ["never scheduled although 9 of 16 blocks are free: r4 (181 tokens)"], False),
        ([EVENTS, EVENTS], [EVENTS.replace("192", "64")], True),
        ([EVENTS], [EVENTS.replace("SlidingWindow", "FullAttention")], False),
        ([GONE], [EVENTS], True),
        ([GONE.replace("there", "there, FullAttentionSpec")], [EVENTS], False),
        ([UNTOLD], [UNTOLD], False),
        ([DIED], [DIED.replace("out of", "beyond")], True),
        ([DIED], [DIED.replace("12", "13")], False),
        ([NEVER], [EVENTS], False),
        ([NEVER], [], False),
        ([EVENTS, "3 of 28 blocks are not back"], [EVENTS, "3 of 28 blocks are not back"], False),
        (["r3 (9 tokens read): token 1 of 5 is wrong"] * 2, ["r3: token 1 of 5 is wrong"], False),
    ],
)
def test_a_fault_is_vllms_only_if_it_is_the_same_without_memory(faults, plain, vllms):
    assert are_vllms(faults, plain) == vllms


def test_breaks_are_those_the_command_knows(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fuzz_engine.py", "--help"])
    with pytest.raises(SystemExit):
        fuzz_engine.main()
    said = capsys.readouterr().out
    assert all(name in said for name in BREAKS)


def test_a_few_engines_answer_as_the_oracle_does(tmp_path):
    verdicts = [judge(seed, Models(tmp_path), plain=False) for seed in range(40, 44)]
    assert [verdict.faults for verdict in verdicts] == [[]] * 4
    assert all(verdict.counts["requests"] for verdict in verdicts)


def test_a_fault_is_found_and_said_how_to_see_again(tmp_path):
    done = fuzz("--engines", 1, "--seed", 0, "--break", "commit-early", "--models", tmp_path)
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    assert "--seed 0 --engines 1 --break commit-early" in done.stdout
