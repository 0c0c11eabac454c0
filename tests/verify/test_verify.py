"""``pacellm verify``: silent about a sound installation, and says which of three faults it is."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engines import engine
from fuzz.breaks import BREAKS
from oracle import OracleModel
from test_engine_oracle import clear_cases

from pacellm_vllm.cli import main
from pacellm_vllm.memory import backend, manager
from pacellm_vllm.memory.store import PagedStore
from pacellm_vllm.request import RequestSettings
from pacellm_vllm.verify import engines
from pacellm_vllm.verify.engines import Variant
from pacellm_vllm.verify.replay import Recording, loud, recording
from pacellm_vllm.verify.truth import true_outputs

TINY = Path(__file__).parent.parent.parent / "scripts" / "tiny"
ENGINE = {"dtype": "float32", "kv_cache_memory_bytes": 32 << 20, "block_size": 16}
# With the default alpha a wrong bank hardly shows in an answer.
PACE = ["--segment-size", "64", "--bank-size", "40"]


def verify(tmp_path, capsys, *more, **engine):
    """The exit status, each check's verdict and detail by name, and what was printed."""
    found = tmp_path / "found.json"
    arguments = ["verify", str(TINY), "--device", "cpu", *PACE, "--json", str(found)]
    status = main([*arguments, "--engine", json.dumps({**ENGINE, **engine}), *more])
    checks = json.loads(found.read_text())["checks"]
    by_name = {check["name"].partition(",")[0].split()[0]: check for check in checks}
    return status, by_name, capsys.readouterr().out


def faults(checks):
    return {name for name, check in checks.items() if check["verdict"] == "FAULT"}


def test_a_sound_installation(tmp_path, capsys):
    status, checks, said = verify(tmp_path, capsys)
    assert status == 0
    assert {name: check["verdict"] for name, check in checks.items()} == {
        "memory's": "same",
        "chunks": "same",
        "preemption": "same",
        "from": "same",
        "CUDA": "not reached",
    }
    assert "not reached: CUDA graphs." in said
    for name in ("chunks", "preemption", "from"):
        assert "tokens as in float64" in checks[name]["detail"]
    assert said.count("| median |") == 1 or "| | median |" in said
    assert "For a bug report:" in said
    assert str(TINY.parent) not in said


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_sum_is_found(tmp_path, capsys, monkeypatch, dtype):
    """The products of a decode step, which are read in place, forget a row's first number."""
    products = PagedStore.products

    def short(store, a, out):
        products(store, torch.cat([a.new_zeros(200), a[200:]]), out)

    monkeypatch.setattr(PagedStore, "products", short)
    status, checks, _ = verify(tmp_path, capsys, dtype=dtype)
    assert status == 1
    assert "memory's" in faults(checks)
    assert "another sum than float64" in checks["memory's"]["detail"]
    assert "(decode step)" in checks["memory's"]["detail"]


def test_a_stale_page_is_found(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        manager, "copy_blocks_before_forward", manager.copy_blocks_before_forward
    )  # put back at the end
    BREAKS["page-not-refreshed"]()
    status, checks, _ = verify(tmp_path, capsys)
    assert status == 1
    assert faults(checks) == {"from"}
    assert "a stale page" in checks["from"]["detail"]


def test_a_wrong_schedule_is_found(tmp_path, capsys, monkeypatch):
    """Segments begin where chunks do."""
    cut = backend.cut_pieces

    def wrong(starts, lengths, layout, *more):
        pieces = cut(starts, lengths, layout, *more)
        size = layout.segment_size
        return [
            replace(piece, position=piece.position // size * size)
            if piece.end - piece.begin > 1
            else piece
            for piece in pieces
        ]

    monkeypatch.setattr(backend, "cut_pieces", wrong)
    status, checks, _ = verify(tmp_path, capsys)
    assert status == 1
    assert "chunks" in faults(checks)
    assert "memory's" not in faults(checks)
    assert "the schedule of segments is wrong" in checks["chunks"]["detail"]


def test_what_a_device_can_run_is_compared_too(tmp_path, capsys, monkeypatch):
    """What graphs, runners and backends are on a GPU: here other engines, one of them broken."""
    cut = backend.cut_pieces

    def wrong(starts, lengths, layout, *more):
        pieces = cut(starts, lengths, layout, *more)
        broken = "PACELLM_TEST_BREAK" in os.environ
        return [replace(piece, position=0) if broken else piece for piece in pieces]

    monkeypatch.setattr(backend, "cut_pieces", wrong)
    variants = [
        Variant("sound", {"max_num_seqs": 1}),
        Variant("broken", {}, {"PACELLM_TEST_BREAK": "1"}),
        Variant("impossible", {"max_num_batched_tokens": 0}),
    ]
    monkeypatch.setattr(engines, "device_variants", lambda: variants)
    monkeypatch.setattr(engines, "attention_backends", lambda: ["NONE_SUCH"])
    status, checks, said = verify(tmp_path, capsys, "--long", "700,999999")
    assert status == 1
    assert checks["sound"]["verdict"] == "same"
    assert faults(checks) == {"broken"}
    assert checks["impossible"]["verdict"] == checks["attention"]["verdict"] == "not reached"
    assert "NONE_SUCH" in checks["attention"]["detail"]
    table = said.partition("For a bug report:")[0].splitlines()
    longs = [line.split()[:2] for line in table if " a request of " in line]
    assert longs == [["answered", "a"], ["not", "reached"]]
    assert "1 of 10 checks found a fault" in said
    assert "PACELLM_TEST_BREAK" not in os.environ


@pytest.mark.parametrize(("dtype", "said"), [("float32", False), ("bfloat16", True)])
def test_answers_that_memory_hardly_moves_say_so(dtype, said):
    """Where rounding may be as much, equal answers do not tell of the memory."""
    answers = {
        "on": engines.Said([[5]], [[-1.0]], 0),
        "off": engines.Said([[5]], [[-1.1]], 0),
    }
    verification = engines.Verification("m", {}, {}, [[1]], tell=lambda check: None)
    verification.about = {"engine": {"dtype": dtype}}
    verification._true = answers
    verification._compare("CUDA graphs", "an answer depends on graphs", answers)
    [check] = verification.checks
    assert check.verdict == "same"
    assert ("memory moves them by 1.0e-01 only, verify --alpha 0.5" in check.detail) is said


@pytest.mark.parametrize("preset", ["gentle", "official", "paper"])
def test_the_truth_is_the_oracles(checkpoint, preset):
    """Its arithmetic on an engine's activations, and the engine's, both near the oracle's."""
    pace = {"layers": [1, 3], "preset": preset, "bank_size": 23, "segment_size": 32}
    own = RequestSettings.of(loud(0))
    strong = {**pace, "alpha": own.alpha}
    [(prompt, tokens, _)] = clear_cases(checkpoint(), strong, [300], 16)
    given = {1: [], 3: []}
    gave = {1: [], 3: []}

    class Told(OracleModel):
        def _remember(self, index, module, args):
            found = super()._remember(index, module, args)
            if index in given:
                given[index].append(args[0].flatten(0, -2))
                gave[index].append(found[0].flatten(0, -2))
            return found

    oracle = Told(checkpoint(), strong)
    assert oracle.generate(prompt, 16)[0] == tokens
    with engine(checkpoint(), pace, max_num_seqs=1) as running:
        with recording(running.llm) as layers:
            running.generate([prompt], 16, extra_args=loud(0))
        assert [one.layer.index for one in layers] == [1, 3]
        assert all(isinstance(one, Recording) for one in layers)
        for one in layers:
            a, o = (torch.cat(parts[one.layer.index]) for parts in (given, gave))
            truth = true_outputs(a, own.applied_to(one.layer.rules), torch.float32)
            assert torch.allclose(truth.outputs, o, atol=1e-4, rtol=1e-4)
            assert one.mistake() is None
            assert one.compared() == 315
            assert not hasattr(one.layer, "run") or "run" not in vars(one.layer)


def test_what_compared_nothing_is_not_called_the_same(monkeypatch):
    nothing = engines.Replay("", 0)
    monkeypatch.setattr(engines.Verification, "_replay", lambda *args: nothing)
    done = engines.Verification("m", {}, {}, [[1]], tell=lambda check: None)
    done.about = {"engine": {"dtype": "float32"}, "config": {"layers": [1]}}
    done._arithmetic(None)
    said = {name: engines.Said([[5]], [[-1.0]], 0) for name in ("on", "off")}
    done._true = said
    done._compare("chunks", "an answer depends on chunks", said, replay=nothing)
    assert [check.verdict for check in done.checks] == ["not reached"] * 2
    # An answer that differs is a fault all the same.
    other = {**said, "on": engines.Said([[6]], [[-1.0]], 0)}
    done._compare("chunks", "an answer depends on chunks", other, replay=nothing)
    assert done.checks[-1].verdict == "FAULT"


def test_a_log_probability_that_is_no_number_is_as_far_as_can_be():
    one, two = (engines.Said([[7]], [[logprob]], 0) for logprob in (-1.0, float("nan")))
    assert one.distance(two) == (0, float("inf"))
    assert two.distance(one) == (0, float("inf"))


def test_bad_arguments_are_refused_in_a_sentence(capsys):
    assert main(["verify", "/nowhere"]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert main(["verify", str(TINY), "--engine", '{"tensor_parallel_size": 2}']) == 2
    assert "cannot have tensor_parallel_size" in capsys.readouterr().err
    assert main(["verify", str(TINY), "--layers", "99"]) == 2
    assert "layers = 99 is not allowed; it must be from 0 to" in capsys.readouterr().err
    assert main(["verify", str(TINY), "--layers", "", "--session-tokens", "9"]) == 2
    assert "no layer of this model has memory" in capsys.readouterr().err
    assert main(["verify", str(TINY), "--engine", '{"max_model_len": 300}']) == 2
    assert "give --segment-size 80 or less" in capsys.readouterr().err
    assert main(["verify", str(TINY), "--nonsense"]) == 2
