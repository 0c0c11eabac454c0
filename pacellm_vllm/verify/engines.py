"""The same requests under one schedule after another, with memory on and off."""

import importlib.util
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from vllm.platforms import current_platform

from pacellm_vllm.compat import config_of
from pacellm_vllm.evals.answers import offline_engine
from pacellm_vllm.memory.layer import memory_layers
from pacellm_vllm.verify.replay import loud, recording

T = TypeVar("T")

ANSWER = 24
# Nats by which a log-probability may move without a fault, in float32 and in half precision.
_LOOSE = {"float32": 5e-3, "float16": 5e-2, "bfloat16": 2e-1}
_ROUNDS = 3
OFF = {"pacellm_enabled": False}


@dataclass
class Said:
    """Of each request the tokens, and log-probabilities of them and of its prompt if asked for."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    cached: int

    def distance(self, other: "Said") -> tuple[int, float]:
        """Requests with other tokens, and the largest difference of two log-probabilities."""
        pairs = zip(self.tokens, other.tokens, strict=True)
        differ = sum(mine != theirs for mine, theirs in pairs)
        worst = 0.0
        for mine, theirs in zip(self.logprobs, other.logprobs, strict=True):
            # Behind another token everything differs.
            for one, two in zip(mine, theirs, strict=True):
                apart = abs(one - two)
                worst = max(worst, apart if math.isfinite(apart) else math.inf)
        return differ, worst


@dataclass
class Check:
    """One line of the table: ``verdict`` is same, FAULT, or why nothing can be said."""

    name: str
    verdict: str
    detail: str = ""

    @property
    def failed(self) -> bool:
        return self.verdict == "FAULT"


@dataclass(frozen=True)
class Replay:
    """The first ``mistake`` of a memory, empty if there was none, and how many tokens it had."""

    mistake: str
    compared: int


@dataclass(frozen=True)
class Variant:
    """Another way to run the same engine: arguments of ``LLM`` and variables of the environment."""

    name: str
    engine: Mapping[str, Any]
    env: Mapping[str, str] = field(default_factory=dict)


def device_variants() -> list[Variant]:
    """What this device can run an engine in: graphs, runners, schedulers. None on a CPU."""
    if not current_platform.is_cuda():
        return []
    graphs = {"enforce_eager": False, "async_scheduling": False}
    piecewise = {**graphs, "compilation_config": {"cudagraph_mode": "PIECEWISE"}}
    v1 = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
    v2 = {"VLLM_USE_V2_MODEL_RUNNER": "1"}
    return [
        Variant("CUDA graphs", graphs),
        Variant("piecewise CUDA graphs", piecewise),
        Variant("asynchronous scheduling", {**graphs, "async_scheduling": True}),
        Variant("model runner V1", {"enforce_eager": True}, v1),
        Variant("model runner V1 with CUDA graphs", graphs, v1),
        Variant("model runner V2", {"enforce_eager": True}, v2),
        Variant("model runner V2 with CUDA graphs", graphs, v2),
    ]


def attention_backends() -> list[str]:
    """Names of the attention backends of vLLM that this device has."""
    if not current_platform.is_cuda():
        return []
    found = ["FLASH_ATTN", "TRITON_ATTN"]
    return [*found, "FLASHINFER"] if importlib.util.find_spec("flashinfer") else found


@dataclass
class Verification:
    """All checks of one model; ``run`` fills them in and calls ``tell`` after each.

    ``prompts`` are of one or more tokens each, ``long`` are lengths in tokens of requests that only
    have to be answered.
    """

    model: str
    memory: Mapping[str, Any]
    engine: Mapping[str, Any]
    prompts: Sequence[list[int]]
    tell: Callable[[Check], None]
    long: Sequence[int] = ()
    checks: list[Check] = field(default_factory=list)
    overhead: list[tuple[float, float]] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        longest = max(self.prompts, key=len)
        room = len(longest) + ANSWER + 1
        self._base = {
            "max_model_len": room,
            "enable_prefix_caching": False,
            "disable_log_stats": False,
            **self.engine,
        }
        alone = {"max_num_seqs": 1, "max_num_batched_tokens": room, "enforce_eager": True}
        with self._open(alone) as llm:
            self._note_about(llm)
            self._arithmetic(llm)
            self._waits(llm)
            self._true = {name: self._ask_alone(llm, own) for name, own in _WAYS.items()}
            # Of whole blocks, so that each of two needs another one with its next token.
            crowded = longest[: len(longest) // self._block * self._block]
            preempted = _ask_all(llm, [crowded])
        several = {"max_num_seqs": max(2, len(self.prompts)), "enforce_eager": True}
        chunk = max(self._layout.segment_size // 3 + 1, several["max_num_seqs"] + 1)
        with self._open({**several, "max_num_batched_tokens": chunk}) as llm:
            self._compare(
                f"chunks of {chunk} tokens, all requests in one batch",
                "an answer depends on how its prompt is cut or on who is in the batch: the "
                "schedule of segments is wrong",
                _ask_all(llm, self.prompts),
                replay=self._replay(llm, self.prompts),
            )
        self._preempted(several, crowded, preempted)
        self._cached(several)
        variants = device_variants()
        if not variants:
            self._note(Check("CUDA graphs", "not reached", "there are none on this device"))
        for variant in variants:
            self._varied(several, variant)
        for name in attention_backends():
            self._backend(several, name)
        for tokens in self.long:
            self._long(tokens)
        with self._open({**several, "max_num_batched_tokens": 8192, "enforce_eager": False}) as llm:
            self._time(llm)

    def _open(self, more: Mapping[str, Any]) -> Any:
        return offline_engine(self.model, self.memory, {**self._base, **more})

    def _note(self, check: Check) -> None:
        self.checks.append(check)
        self.tell(check)

    def _note_about(self, llm: Any) -> None:
        from pacellm_vllm.models.settings import describe_engine

        config = config_of(llm)
        layer = memory_layers(config)[0]
        self._block, self._layout = config.cache_config.block_size, layer.spec.layout
        self.about = {
            **describe_engine(config),
            "segment_size": layer.rules.segment_size,
            "kernels": layer.runs_kernels,
        }

    def _replay(self, llm: Any, prompts: Sequence[list[int]], times: int = 1) -> Replay:
        """The memory's own arithmetic in this engine, which is asked ``times`` in a row."""
        with recording(llm) as layers:
            for _ in range(times):
                _ask(llm, prompts, [loud(i) for i in range(len(prompts))], prompt_logprobs=None)
        mistakes = [found for layer in layers if (found := layer.mistake())]
        return Replay(mistakes[0] if mistakes else "", min(layer.compared() for layer in layers))

    def _arithmetic(self, llm: Any) -> None:
        """Of requests alone, prompt and decode steps."""
        name = "memory's arithmetic, against float64"
        replay = self._replay(llm, self.prompts)
        if replay.mistake:
            ran = "kernels" if self.about["kernels"] else "plain ops"
            blame = f"the {ran} give another sum than float64 does: {replay.mistake}"
            self._note(Check(name, "FAULT", blame))
        elif not replay.compared:
            self._note(Check(name, "not reached", "no token of a request passed the memory"))
        else:
            layers = len(self.about["config"]["layers"])
            self._note(Check(name, "same", f"{layers} layers, {replay.compared} tokens"))

    def _ask_alone(self, llm: Any, own: Mapping[str, Any] | None) -> Said:
        return _joined([_ask(llm, [prompt], own) for prompt in self.prompts])

    def _compare(
        self,
        name: str,
        blame: str,
        said: Mapping[str, Said],
        note: str = "",
        truth: Mapping[str, Said] | None = None,
        replay: Replay | None = None,
    ) -> None:
        """Against the requests alone; what differs as much with memory off is not its doing.

        What memory did itself, in ``replay``, is held to the truth whatever was said.
        """
        truth = truth or self._true
        differ, worst = said["on"].distance(truth["on"])
        differ_off, worst_off = said["off"].distance(truth["off"])
        loose = max(_LOOSE.get(self.about["engine"]["dtype"], 0.2), 4 * worst_off)
        detail = f"log-probabilities within {worst:.1e}, {worst_off:.1e} with memory off"
        if replay and replay.mistake:
            self._note(Check(name, "FAULT", f"{blame} ({replay.mistake}; {detail})"))
            return
        if replay:
            detail = f"{replay.compared} tokens as in float64, {detail}"
        elif (moved := truth["on"].distance(truth["off"])[1]) < 2 * loose:
            detail = (
                f"{detail}; as memory moves them by {moved:.1e} only, verify --alpha 0.5 as well"
            )
        if differ <= differ_off and worst <= loose:
            verdict = "same" if not differ else "as without memory"
            if replay and not replay.compared:
                verdict = "not reached"
            self._note(Check(name, verdict, f"{detail}{note}"))
            return
        detail = f"{blame} ({differ} of {len(said['on'].tokens)} requests, {detail})"
        self._note(Check(name, "FAULT", detail))

    def _waits(self, llm: Any) -> None:
        """How often the host waits for the device in this package's own lines."""
        if not current_platform.is_cuda():
            return
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                # Over several segments, so that there is something to commit.
                _ask(llm, [max(self.prompts, key=len)], None)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits = [w for w in seen if "synchronizing" in str(w.message).lower()]
        ours = sorted({f"{w.filename}:{w.lineno}" for w in waits if "pacellm" in w.filename})
        verdict = "FAULT" if ours else "same"
        detail = f"of {len(waits)} waits, in our lines: {', '.join(ours) or 'none'}"
        self._note(Check("the host does not wait for the memory", verdict, detail))

    def _preempted(
        self, several: Mapping[str, Any], prompt: list[int], truth: Mapping[str, Said]
    ) -> None:
        name = "preemption, in a pool that two prompts fill"
        held = len(prompt) // self._block + self._layout.pages_for(len(prompt))
        # One more is vLLM's null block, and one is for the first of the two to go on with.
        with self._open({**several, "num_gpu_blocks_override": 2 * held + 2}) as llm:
            said = _ask_all(llm, [prompt] * 2)
            replay = self._replay(llm, [prompt] * 2)
            count = sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
        if not count:
            self._note(Check(name, "not reached", "no request was preempted"))
            return
        blame = "an answer depends on whether its request was preempted"
        twice = {way: _joined([one] * 2) for way, one in truth.items()}
        self._compare(name, blame, said, f", {count:g} preemptions", twice, replay)

    def _cached(self, several: Mapping[str, Any]) -> None:
        name = "from the prefix cache"
        with self._open({**several, "enable_prefix_caching": True}) as llm:
            said = {}
            for way, own in _WAYS.items():
                _ask(llm, self.prompts, own, prompt_logprobs=None)
                said[way] = _ask(llm, self.prompts, own, prompt_logprobs=None)
            replay = self._replay(llm, self.prompts, times=2)
        if not said["on"].cached:
            self._note(Check(name, "not reached", "no prefix was found in the cache"))
            return
        truth = {way: _of_answers(one) for way, one in self._true.items()}
        blame = "a bank from the prefix cache is not what was put there: a stale page"
        note = f", {said['on'].cached} tokens from the cache"
        self._compare(name, blame, said, note, truth, replay)

    def _varied(self, several: Mapping[str, Any], variant: Variant) -> None:
        with patch.dict(os.environ, variant.env):
            engine = {**several, **variant.engine}
            said = self._where_possible(variant.name, engine, self._ask_prompts)
        if said:
            self._compare(variant.name, f"an answer depends on {variant.name}", said)

    def _backend(self, several: Mapping[str, Any], name: str) -> None:
        """Graphs against no graphs: two backends round differently."""
        name, engine = f"attention backend {name}", {**several, "attention_backend": name}
        replayed = {**engine, "enforce_eager": False}
        eager = self._where_possible(name, engine, self._ask_prompts)
        graphs = eager and self._where_possible(name, replayed, self._ask_prompts)
        if graphs:
            blame = "an answer depends on whether graphs are replayed"
            self._compare(f"{name}, graphs", blame, graphs, truth=eager)

    def _ask_prompts(self, llm: Any) -> dict[str, Said]:
        return _ask_all(llm, self.prompts)

    def _where_possible(
        self, name: str, engine: Mapping[str, Any], ask: Callable[[Any], T]
    ) -> T | None:
        """What an engine says; None, and a line in the table, where it cannot be made or fails."""
        verdict = "not reached"
        try:
            with self._open(engine) as llm:
                verdict = "FAULT"
                return ask(llm)
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            self._note(Check(name, verdict, reason[-1]))
            return None

    def _long(self, tokens: int) -> None:
        words = max(self.prompts, key=len)
        prompt = (words * (tokens // len(words) + 1))[:tokens]
        name = f"a request of {tokens} tokens"
        engine = {"max_model_len": tokens + ANSWER + 1, "max_num_seqs": 1}

        def ask(llm: Any) -> float:
            begun = time.perf_counter()
            _ask(llm, [prompt], None, prompt_logprobs=None)
            return time.perf_counter() - begun

        took = self._where_possible(name, engine, ask)
        if took is not None:
            self._note(Check(name, "answered", f"in {took:.1f} s"))

    def _time(self, llm: Any) -> None:
        """Seconds of all requests with memory on and off, by turns."""
        for way in _WAYS.values():
            _ask(llm, self.prompts, way, prompt_logprobs=None)
        for _ in range(_ROUNDS):
            took = []
            for way in _WAYS.values():
                begun = time.perf_counter()
                _ask(llm, self.prompts, way, prompt_logprobs=None)
                took.append(time.perf_counter() - begun)
            self.overhead.append((took[0], took[1]))

    def overhead_table(self) -> str:
        """Markdown: one row a round, and the median ratio."""
        rows = [f"| {on:.3f} | {off:.3f} | {on / off:.3f} |" for on, off in self.overhead]
        median = statistics.median(on / off for on, off in self.overhead)
        head = "| memory on, s | off, s | ratio |\n|---|---|---|\n"
        return f"{head}{chr(10).join(rows)}\n| | median | {median:.3f} |"


_WAYS: dict[str, Mapping[str, Any] | None] = {"on": None, "off": OFF}


def _ask(
    llm: Any,
    prompts: Sequence[list[int]],
    own: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None,
    prompt_logprobs: int | None = 0,
) -> Said:
    """``own``: settings of all requests, or of each."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=0,
            max_tokens=ANSWER,
            ignore_eos=True,
            detokenize=False,
            logprobs=0,
            prompt_logprobs=prompt_logprobs,
            extra_args=dict(mine) if mine else None,
        )
        for mine in (own if isinstance(own, Sequence) else [own] * len(prompts))
    ]
    inputs: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(inputs, params, use_tqdm=False)
    logprobs = []
    for prompt, output in zip(prompts, outputs, strict=True):
        entries = list(output.outputs[0].logprobs)
        found = [e[t].logprob for t, e in zip(output.outputs[0].token_ids, entries, strict=True)]
        if prompt_logprobs is not None:
            pairs = zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
            found = [entry[token].logprob for token, entry in pairs] + found
        logprobs.append(found)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    return Said(tokens, logprobs, sum(output.num_cached_tokens or 0 for output in outputs))


def _ask_all(llm: Any, prompts: Sequence[list[int]]) -> dict[str, Said]:
    return {way: _ask(llm, prompts, own) for way, own in _WAYS.items()}


def _joined(parts: Sequence[Said]) -> Said:
    return Said(
        [tokens for part in parts for tokens in part.tokens],
        [logprobs for part in parts for logprobs in part.logprobs],
        sum(part.cached for part in parts),
    )


def _of_answers(said: Said) -> Said:
    """Without prompts' log-probabilities."""
    return Said(said.tokens, [logprobs[-ANSWER:] for logprobs in said.logprobs], said.cached)
