"""What a request is told of its memory: every token's kind and source are the oracle's."""

import json
import tracemalloc
from dataclasses import replace

import pytest
import torch
from engines import NATIVE, engine
from opentelemetry import trace
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.util._once import Once
from oracle import OracleModel
from test_engine_oracle import clear_cases
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from pacellm_vllm.config import PaceConfig, PaceConfigError
from pacellm_vllm.memory.batch import WithDrafts, WithKernels
from pacellm_vllm.memory.journal import KINDS, Journal, LayerAnswer
from pacellm_vllm.ops.lookup import LookUp
from pacellm_vllm.ops.update import Committed, Progress

PACE = {"layers": [1, 3], "preset": "official", "bank_size": 37, "segment_size": 32}
PACE["max_insertions"] = 5
ANSWER = 33
REPORT = {"pacellm_report": True}


class Told(OracleModel):
    """An oracle that notes each token's kind, and whose activation each slot took last.

    Slots are told by their bits: a slot that holds a token's activation was taken by that token.
    """

    def _reset(self, overrides):
        super()._reset(overrides)
        self.kinds = dict.fromkeys(self.banks, "")
        self.sources = {layer: [] for layer in self.banks}
        self.best = {layer: [] for layer in self.banks}

    def _commit(self):
        size = self.rules.segment_size
        for layer, bank in self.banks.items():
            a, o = (torch.cat(part) for part in zip(*self._segment[layer], strict=True))
            first = self._position - size
            if bank.num_valid:
                sims = bank.similarities(a)
                slots = [int(bank.top_slots(row)[0]) for row in sims]
                self.best[layer] += [(slot, self.sources[layer][slot]) for slot in slots]
            else:
                self.best[layer] += [(-1, -1)] * size
            self.kinds[layer] += "".join(kind[0] for kind in bank.update(a, o))
            self.sources[layer] += [-1] * (bank.num_valid - len(self.sources[layer]))
            for slot in range(bank.num_valid):
                same = (a == bank.keys[slot]).all(dim=1).nonzero().flatten()
                if len(same):
                    self.sources[layer][slot] = first + int(same[0])
            self._segment[layer] = []


@pytest.fixture(scope="module")
def case(checkpoint):
    """A prompt that ends, with its answer, a segment, and the oracle that read it."""
    [(prompt, tokens, _)] = clear_cases(checkpoint(), PACE, [7 * 32 - ANSWER + 1], ANSWER)
    told = Told(checkpoint(), PACE)
    assert told.generate(prompt, ANSWER)[0] == tokens
    return prompt, tokens, told


def reports(running, output, first=0):
    [found] = running.llm.collective_rpc("pacellm_answer_report", args=(output.request_id, first))
    return found


def check(report, told, known_from=0):
    for layer, bank in told.banks.items():
        mine = report[layer]
        assert mine["kinds"][known_from:] == told.kinds[layer][known_from:]
        assert mine["kinds"][:known_from] == "c" * known_from
        assert sum(mine["tokens"].values()) == 7 * 32
        assert mine["tokens"]["cached"] == known_from
        assert [one["usage"] for one in mine["slots"]] == bank.usage[: bank.num_valid].tolist()
        sims = bank.similarities(bank.keys[: bank.num_valid]).fill_diagonal_(-2)
        for slot, one in enumerate(mine["slots"]):
            assert one["likeness"] == pytest.approx(float(sims[slot].max()), abs=2e-3)
            assert float(sims[slot, one["nearest"]]) == pytest.approx(one["likeness"], abs=2e-3)
        if not known_from:
            assert [one["source"] for one in mine["slots"]] == told.sources[layer]
            pairs = list(zip(mine["slot"], mine["source"], strict=True))
            assert pairs == told.best[layer]
            for name in ("merged", "replaced", "filled", "dropped"):
                assert sum(one[name] for one in mine["commits"]) == bank.counts["slots"][name]
        assert [one["position"] for one in mine["commits"]] == list(
            range(known_from + 32, 7 * 32 + 1, 32)
        )


@pytest.mark.parametrize("chunk", [512, 40, 7])
def test_a_report_is_what_the_oracle_did_however_the_prompt_is_cut(case, checkpoint, chunk):
    prompt, tokens, told = case
    settings = {"max_num_batched_tokens": chunk, "enable_prefix_caching": False}
    with engine(checkpoint(), PACE, max_num_seqs=4, **settings) as running:
        others = [prompt[::-1], prompt[5:]]
        asked = running.generate([prompt], ANSWER, extra_args=REPORT)
        assert list(asked[0].outputs[0].token_ids) == tokens
        check(reports(running, asked[0]), told)
        # Of requests that did not ask, nothing is kept.
        [not_asked] = running.generate(others[:1], ANSWER)
        assert reports(running, not_asked) is None
        assert reports(running, asked[0])[1]["kinds"] == told.kinds[1]
        strongest = reports(running, asked[0], first=len(prompt))[1]["strongest"]
        assert strongest
        assert min(one["position"] for one in strongest) >= len(prompt)
        assert strongest[0]["similarity"] == max(one["similarity"] for one in strongest)


@pytest.mark.skipif(NATIVE, reason="with blocks of 32 tokens none of these is preempted")
def test_reports_of_a_batch_with_preemption_are_apart(case, checkpoint):
    prompt, tokens, told = case
    blocks = {"num_gpu_blocks_override": 66, "max_model_len": 256}
    with engine(
        checkpoint(), PACE, max_num_seqs=4, enable_prefix_caching=False, **blocks
    ) as running:
        outputs = running.generate([prompt] * 4, ANSWER, extra_args=REPORT)
        assert running.metric("vllm:num_preemptions") > 0
        for output in outputs:
            assert list(output.outputs[0].token_ids) == tokens
            check(reports(running, output), told)


def test_what_the_prefix_cache_had_is_told(case, checkpoint):
    prompt, tokens, told = case
    with engine(checkpoint(), PACE, max_num_batched_tokens=64) as running:
        running.generate([prompt], 1)
        [output] = running.generate([prompt], ANSWER, extra_args=REPORT)
        assert output.num_cached_tokens >= 64
        assert list(output.outputs[0].token_ids) == tokens
        check(reports(running, output), told, output.num_cached_tokens)


def test_a_request_without_a_bank_is_told_so(case, checkpoint):
    prompt, _, _ = case
    with engine(checkpoint(), PACE, enable_prefix_caching=False) as running:
        [off] = running.generate([prompt], 2, extra_args={**REPORT, "pacellm_enabled": False})
        assert reports(running, off)[1]["kinds"] == "n" * (len(prompt) + 1)
        with pytest.raises(VLLMValidationError, match="a report is about one answer, not n = 2"):
            running.generate([prompt], 2, extra_args=REPORT, n=2, temperature=1)


@pytest.mark.parametrize("settings", [WithDrafts, WithKernels])
def test_engines_that_cannot_tell_say_so(settings):
    with pytest.raises(PaceConfigError, match=r"report.*; drop pacellm_report"):
        settings.validate_params(SamplingParams(extra_args=REPORT))
    settings.validate_params(SamplingParams(extra_args={"pacellm_alpha": 0.5}))


@pytest.fixture
def spans(monkeypatch):
    """What vLLM's tracing has written of requests, in this process."""
    written = InMemorySpanExporter()
    monkeypatch.setattr("vllm.tracing.otel.get_span_exporter", lambda endpoint: written)
    # A process has one provider, which an earlier test may have set.
    monkeypatch.setattr("opentelemetry.trace._TRACER_PROVIDER", None)
    monkeypatch.setattr("opentelemetry.trace._TRACER_PROVIDER_SET_ONCE", Once())
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", raising=False)

    def read():
        assert trace.get_tracer_provider().force_flush()
        found = [span for span in written.get_finished_spans() if span.name == "llm_request"]
        written.clear()
        return [dict(span.attributes) for span in found]

    return read


def test_a_span_tells_what_memory_did(case, checkpoint, spans):
    prompt, tokens, told = case
    settings = {"otlp_traces_endpoint": "http://nowhere.invalid", "max_num_batched_tokens": 64}
    with engine(checkpoint(), PACE, **settings) as running:
        # Nobody asks for a report.
        [cold] = running.generate([prompt], ANSWER)
        assert list(cold.outputs[0].token_ids) == tokens
        [span] = spans()
        assert span["gen_ai.request.id"] == cold.request_id
        assert span["gen_ai.usage.prompt_tokens"] == len(prompt)
        assert span["pacellm.cached_tokens"] == 0
        assert span["pacellm.layers"] == (1, 3)
        for i, (layer, bank) in enumerate(told.banks.items()):
            for kind in ("high", "mid", "low", "empty"):
                assert span[f"pacellm.tokens.{kind}"][i] == told.kinds[layer].count(kind[0])
            assert span["pacellm.tokens.none"][i] == span["pacellm.tokens.unsound"][i] == 0
            assert span["pacellm.slots"][i] == bank.num_valid
        assert span["pacellm.commits"] == (7, 7)
        # What preset official says.
        official = {"alpha": 0.2, "noise": 0.1, "theta_high": 0.75, "theta_low": 0.25}
        assert json.loads(span["pacellm.settings"]) == official

        [warm] = running.generate([prompt], 40)
        [span] = spans()
        assert span["pacellm.cached_tokens"] == warm.num_cached_tokens > 0
        read = len(prompt) + 40 - 1 - warm.num_cached_tokens
        assert sum(v[0] for k, v in span.items() if k.startswith("pacellm.tokens.")) == read
        own = {"pacellm_alpha": 0.4, "journal_of_pacellm": "another's"}
        running.generate([prompt[::-1], prompt[5:]], 2, extra_args=own)
        found = [json.loads(span["pacellm.settings"]) for span in spans()]
        assert found == [{**official, "alpha": 0.4}] * 2
        running.generate([prompt], 2, extra_args={"pacellm_enabled": False})
        [span] = spans()
        assert span["pacellm.tokens.none"] == (len(prompt) + 1 - span["pacellm.cached_tokens"],) * 2
        assert span["pacellm.settings"] == "{}"
        # Of several answers to one prompt only what vLLM says itself.
        running.generate([prompt], 2, n=2, temperature=1)
        for span in spans():
            assert [name for name in span if "pacellm" in name] == ["pacellm.cached_tokens"]


def test_memory_of_reports_is_bounded():
    rules = PaceConfig.from_sources(
        {"segment_size": 4, "theta_high": 0.7, "theta_low": 0.3}
    ).rules()
    journal = Journal(most_tokens=100, most_answers=5)
    done = Committed(valid=4, filled=4, merged=[], replaced=[], dropped=0, usage=[1] * 4)
    for i in range(50):
        piece = Progress(0, 0, 4, done, [float("-inf")] * 4, [[]] * 4)
        journal.note(f"{i}\nx", 1, 0, rules, piece, [(1, 0.5)] * 4)
    kept = [i for i in range(50) if journal.report(str(i))]
    assert kept == [45, 46, 47, 48, 49]
    # One that was dropped while it ran does not begin again in the middle.
    journal.note("44\nx", 1, 4, rules, Progress(0, 0, 4, done, [0.1] * 4, [[0]] * 4), [])
    assert journal.report("44") is None
    journal.note("long\nx", 1, 0, rules, Progress(0, 0, 0, None, [0.1] * 101, [[0]] * 101), [])
    assert not any(journal.report(str(i)) for i in range(50))
    # One that is still read is kept, and of two with one id the later one is told of.
    for i in range(10):
        journal.note("running\na", 1, i, rules, Progress(0, 0, 0, None, [i], [[0]]), [])
        journal.note(f"{i}\nx", 1, 0, rules, Progress(0, 0, 0, None, [9], [[0]]), [])
    assert len(journal.report("running")[1]["kinds"]) == 10
    journal.note("running\nb", 1, 0, rules, Progress(0, 0, 0, None, [9], [[0]]), [])
    journal.note("running\na", 1, 10, rules, Progress(0, 0, 0, None, [9], [[0]]), [])
    assert len(journal.report("running")[1]["kinds"]) == 1
    # Of 64 experts each token takes 8 bytes, half of what a layer's memory takes.
    journal.note_experts("few\nx", 1, 0, torch.ones(150, 64, dtype=torch.bool))
    assert journal.experts("few", 1)["tokens"] == [150] * 64
    journal.note_experts("many\nx", 1, 0, torch.ones(100, 64, dtype=torch.bool))
    assert journal.experts("few", 1) is None
    assert journal.experts("many", 2) == {"layers": [1]}
    assert set(KINDS.values()) == set(LayerAnswer().report()["tokens"])


def test_a_similarity_that_is_the_threshold_is_told_as_what_it_was_taken_for():
    """Tensors are compared with a threshold in float32, which may be above or below the number."""
    rules = PaceConfig.from_sources({"theta_low": 0.3, "theta_high": 0.7, "segment_size": 2})
    means = torch.tensor([0.3, 0.7])
    found = LookUp(torch.zeros(2, 4), means, torch.zeros(2, 1, dtype=torch.int64))
    kinds = [found.low(rules.rules()).sum(), found.mid(rules.rules()).sum()]
    assert kinds == [1, 1]
    done = Committed(valid=1, filled=0, merged=[], replaced=[0], dropped=0, usage=[1])
    journal = Journal()
    journal.note("r\nx", 1, 0, rules.rules(), Progress(0, 1, 1, done, means, found.top), [(0, 1.0)])
    report = journal.report("r")[1]
    assert report["kinds"] == "lm"
    assert [slot["source"] for slot in report["slots"]] == [0]


def test_an_unsound_token_is_told_to_have_found_nothing():
    """Read in a piece, where its row of slots is none that it found."""
    rules = PaceConfig.from_sources({"theta_low": 0.3, "theta_high": 0.7, "segment_size": 2})
    means, top = torch.tensor([float("nan"), 0.5]), torch.tensor([[1], [1]])
    done = Committed(valid=2, filled=2, merged=[], replaced=[], dropped=0, usage=[1, 1])
    journal = Journal()
    empty = Progress(0, 0, 2, done, [float("-inf")] * 2, [[]] * 2)
    journal.note("r\nx", 1, 0, rules.rules(), empty, [(1, 0.0), (0, 0.0)])
    journal.note("r\nx", 1, 2, rules.rules(), Progress(0, 1, 0, None, means, top), [])
    report = journal.report("r")[1]
    assert report["kinds"] == "eeum"
    assert report["similarity"][2:] == [0.0, 0.5]
    assert report["slot"][2:] == [-1, 1]
    assert report["source"][2:] == [-1, 1]


def test_of_two_requests_with_one_id_the_later_one_is_told():
    rules = PaceConfig.from_sources({"segment_size": 4}).rules()
    journal = Journal()
    for tokens, key in ((3, "r\ny"), (2, "r\nx")):
        piece = Progress(0, 0, 0, None, [0.1] * tokens, [[0]] * tokens)
        journal.note(key, 1, 0, rules, piece, [])
    assert len(journal.report("r")[1]["kinds"]) == 2


def test_a_request_that_goes_on_at_a_segments_end_keeps_its_commit_and_begins_nothing_anew():
    """Preempted after 40 tokens, and found in the prefix cache up to the end of its segment."""
    rules = PaceConfig.from_sources({"segment_size": 32}).rules()
    journal = Journal()
    done = Committed(valid=1, filled=1, merged=[], replaced=[], dropped=0, usage=[1])
    first = Progress(0, 0, 32, done, [float("-inf")] * 32, [[]] * 32)
    journal.note("r\nx", 1, 0, rules, first, [(0, 1.0)])
    for _ in range(2):
        rest = Progress(0, 0, 8, None, [0.1] * 8, [[0]] * 8)
        journal.note("r\nx", 1, 32, rules, rest, [])
    report = journal.report("r")[1]
    assert [one["position"] for one in report["commits"]] == [32]
    assert report["source"][32:] == [0] * 8
    for position, tokens in ((0, 40), (32, 8)):
        journal.note_experts("r\nx", 1, position, torch.ones(tokens, 3, dtype=torch.bool))
    assert journal.experts("r", 1)["tokens"] == [40] * 3


def test_reports_of_many_commits_take_no_more_than_those_of_many_tokens():
    """Each keeps what every slot holds: with short segments that is most of it."""
    rules = PaceConfig.from_sources({"bank_size": 64, "segment_size": 8}).rules()
    most = 20_000
    journal = Journal(most_tokens=most)
    done = Committed(valid=64, filled=0, merged=[3], replaced=[], dropped=8, usage=[1000] * 64)
    tracemalloc.start()
    for i in range(4000):
        again = replace(done, usage=[1000 + i] * 64)
        piece = Progress(0, 0, 8, again, [0.1] * 8, [[0]] * 8)
        journal.note(f"{i // 10}\nx", 1, i % 10 * 8, rules, piece, [(1, 0.5)] * 64)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert journal.report("399")[1]["tokens"]["low"] == 80
    assert taken < 3 * 16 * most
