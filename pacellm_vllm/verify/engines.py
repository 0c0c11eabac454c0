"""The same requests under one schedule after another, with memory on and off."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.platforms import current_platform

from pacellm_vllm.evals.answers import offline_engine
from pacellm_vllm.memory.layer import memory_layers
from pacellm_vllm.verify.replay import recording

ANSWER = 24
# Nats by which a log-probability may move without a fault, in float32 and in half precision.
_LOOSE = {"float32": 5e-3, "float16": 5e-2, "bfloat16": 2e-1}
_ROUNDS = 5
# How many of each request there are where they are to be preempted.
_CROWD = 3
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
                worst = max(worst, abs(one - two))
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


@dataclass
class Verification:
    """All checks of one model; ``run`` fills them in and calls ``tell`` after each."""

    model: str
    memory: Mapping[str, Any]
    engine: Mapping[str, Any]
    prompts: Sequence[list[int]]
    tell: Callable[[Check], None]
    checks: list[Check] = field(default_factory=list)
    overhead: list[tuple[float, float]] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        longest = max(map(len, self.prompts)) + ANSWER + 1
        self._base = {
            "max_model_len": longest,
            "enable_prefix_caching": False,
            "disable_log_stats": False,
            **self.engine,
        }
        alone = {"max_num_seqs": 1, "max_num_batched_tokens": longest, "enforce_eager": True}
        with self._open(alone) as llm:
            self._note_about(llm)
            self._replay(llm)
            self._true = {name: self._ask_alone(llm, own) for name, own in _WAYS.items()}
        several = {"max_num_seqs": max(2, len(self.prompts)), "enforce_eager": True}
        size = self.about["segment_size"]
        chunk = max(size // 3 + 1, several["max_num_seqs"] + 1)
        with self._open({**several, "max_num_batched_tokens": chunk}) as llm:
            self._compare(
                f"chunks of {chunk} tokens, all requests in one batch",
                "an answer depends on how its prompt is cut or on who is in the batch: the "
                "schedule of segments is wrong",
                {name: _ask(llm, self.prompts, own) for name, own in _WAYS.items()},
            )
        self._preempted(several)
        self._cached(several)
        self._graphs(several)
        with self._open({**several, "max_num_batched_tokens": 8192, "enforce_eager": False}) as llm:
            self._time(llm)

    def _open(self, more: Mapping[str, Any]) -> Any:
        return offline_engine(self.model, self.memory, {**self._base, **more})

    def _note(self, check: Check) -> None:
        self.checks.append(check)
        self.tell(check)

    def _note_about(self, llm: Any) -> None:
        from pacellm_vllm.serving.report import describe_engine

        config = llm.llm_engine.vllm_config
        layer = memory_layers(config)[0]
        block = config.cache_config.block_size
        self._blocks = -(-self._base["max_model_len"] // block) + layer.spec.layout.num_pages
        self.about = {
            **describe_engine(config),
            "segment_size": layer.rules.segment_size,
            "kernels": layer.runs_kernels,
        }

    def _replay(self, llm: Any) -> None:
        """The memory's own arithmetic, in prompt and decode steps, of the longest prompt."""
        with recording(llm) as layers:
            _ask(llm, [max(self.prompts, key=len)], None)
        mistakes = [found for layer in layers if (found := layer.mistake())]
        name = "memory's arithmetic, against float64"
        if mistakes:
            ran = "kernels" if self.about["kernels"] else "plain ops"
            self._note(
                Check(
                    name,
                    "FAULT",
                    f"the {ran} give another sum than float64 does: {mistakes[0]}",
                )
            )
        else:
            compared = min(layer.compared() for layer in layers)
            self._note(Check(name, "same", f"{len(layers)} layers, {compared} tokens"))

    def _ask_alone(self, llm: Any, own: Mapping[str, Any] | None) -> Said:
        return _joined([_ask(llm, [prompt], own) for prompt in self.prompts])

    def _compare(
        self,
        name: str,
        blame: str,
        said: Mapping[str, Said],
        note: str = "",
        truth: Mapping[str, Said] | None = None,
    ) -> None:
        """Against the requests alone; what differs as much with memory off is not its doing."""
        truth = truth or self._true
        differ, worst = said["on"].distance(truth["on"])
        differ_off, worst_off = said["off"].distance(truth["off"])
        loose = _LOOSE.get(self.about["engine"]["dtype"], 0.2)
        detail = f"log-probabilities within {worst:.1e}, {worst_off:.1e} with memory off"
        if differ <= differ_off and worst <= max(loose, 4 * worst_off):
            verdict = "same" if not differ else "as without memory"
            self._note(Check(name, verdict, f"{detail}{note}"))
            return
        detail = f"{blame} ({differ} of {len(said['on'].tokens)} requests, {detail})"
        self._note(Check(name, "FAULT", detail))

    def _preempted(self, several: Mapping[str, Any]) -> None:
        name = "preemption, in a pool that holds one request"
        crowd = {**several, "max_num_seqs": _CROWD * len(self.prompts)}
        with self._open({**crowd, "num_gpu_blocks_override": self._blocks + 2}) as llm:
            prompts = [*self.prompts] * _CROWD
            said = {way: _ask(llm, prompts, own) for way, own in _WAYS.items()}
            count = sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
        if not count:
            self._note(Check(name, "not reached", "no request was preempted"))
            return
        blame = "an answer depends on whether its request was preempted"
        truth = {way: _joined([one] * _CROWD) for way, one in self._true.items()}
        self._compare(name, blame, said, f", {count:g} preemptions", truth)

    def _cached(self, several: Mapping[str, Any]) -> None:
        name = "from the prefix cache"
        with self._open({**several, "enable_prefix_caching": True}) as llm:
            said = {}
            for way, own in _WAYS.items():
                _ask(llm, self.prompts, own, prompt_logprobs=None)
                said[way] = _ask(llm, self.prompts, own, prompt_logprobs=None)
        if not said["on"].cached:
            self._note(Check(name, "not reached", "no prefix was found in the cache"))
            return
        truth = {way: _of_answers(one) for way, one in self._true.items()}
        blame = "a bank from the prefix cache is not what was put there: a stale page"
        self._compare(name, blame, said, f", {said['on'].cached} tokens from the cache", truth)

    def _graphs(self, several: Mapping[str, Any]) -> None:
        name = "CUDA graphs"
        if not current_platform.is_cuda():
            self._note(Check(name, "not reached", "there are none on this device"))
            return
        with self._open({**several, "enforce_eager": False}) as llm:
            said = {way: _ask(llm, self.prompts, own) for way, own in _WAYS.items()}
        self._compare(name, "an answer depends on whether graphs are replayed", said)

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
    own: Mapping[str, Any] | None,
    prompt_logprobs: int | None = 0,
) -> Said:
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0,
        max_tokens=ANSWER,
        ignore_eos=True,
        detokenize=False,
        logprobs=0,
        prompt_logprobs=prompt_logprobs,
        extra_args=dict(own) if own else None,
    )
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


def _joined(parts: Sequence[Said]) -> Said:
    return Said(
        [tokens for part in parts for tokens in part.tokens],
        [logprobs for part in parts for logprobs in part.logprobs],
        sum(part.cached for part in parts),
    )


def _of_answers(said: Said) -> Said:
    """Without prompts' log-probabilities."""
    return Said(said.tokens, [logprobs[-ANSWER:] for logprobs in said.logprobs], said.cached)
