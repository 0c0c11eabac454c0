"""Drive: one engine, its requests as they come and go, and what it answered."""

import contextlib
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import torch
from engines import Engine, engine, poisoned_pages
from vllm import SamplingParams
from vllm.config import KVEventsConfig
from vllm.exceptions import VLLMClientError
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind
from vllm.utils.math_utils import cdiv
from vllm.v1.engine import core as engine_core

from fuzz.cases import EngineCase, RequestCase, Turn, Wave
from fuzz.events import Subscriber
from fuzz.models import Models

ASYNCHRONOUS = "PACELLM_CPU_ASYNC_SCHEDULING"
# Steps without any change after which nothing will change any more.
IDLE_STEPS = 30
PLENTY_BLOCKS = 3000
REFUSALS = (ValueError, VLLMClientError)


@dataclass
class Answer:
    """One sequence of a request: what it read and wrote, one entry a turn."""

    prompts: list[list[int]] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)

    def text(self) -> list[int]:
        """All that the memory may have seen."""
        return [
            token
            for prompt, said in zip(self.prompts, self.tokens, strict=True)
            for token in (*prompt, *said)
        ]


@dataclass
class Talk:
    """A request on its way: an answer for each of its ``n`` sequences."""

    case: RequestCase
    wave: int
    answers: list[Answer]
    cached: int | None = None
    prompt_logprobs: list[float] | None = None
    refused: str | None = None
    aborted: bool = False
    done: bool = False
    turns_sent: int = 0
    session: Any = None


@dataclass
class Record:
    """What became of an engine: ``faults`` are sentences."""

    talks: dict[str, Talk] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    bank_pages: int = 0


def drive(case: EngineCase, models: Models, plain: bool = False) -> Record:
    """Run the engine of ``case``; ``plain`` leaves the memory out."""
    record = Record()
    pace = None if plain else case.pace
    # It is read when an engine is configured.
    switch = {ASYNCHRONOUS: "1"} if case.asynchronous else {}
    try:
        with (
            mock.patch.dict("os.environ", switch),
            _sized_pool(case),
            _drafting(record) if case.drafts else contextlib.nullcontext(),
            engine(models.checkpoint(case.architecture), pace, **_settings(case)) as running,
            poisoned_pages(running) if case.poisoned else contextlib.nullcontext(),
        ):
            _Driver(case, models, running, record).run()
    except Exception as error:
        record.faults.append(f"the engine died: {_one_line(error)}")
    return record


def _settings(case: EngineCase) -> dict[str, Any]:
    settings = {**case.settings, "async_scheduling": case.asynchronous, "seed": 0}
    if case.lora:
        settings |= {"enable_lora": True, "max_lora_rank": 8}
    if case.drafts:
        settings["speculative_config"] = {
            "method": "ngram",
            "num_speculative_tokens": case.drafts,
            "prompt_lookup_min": 1,
            "prompt_lookup_max": 3,
        }
    if case.events:
        settings["kv_events_config"] = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    if any(request.embeddings for request in case.requests()):
        settings["enable_prompt_embeds"] = True
    return settings


@contextlib.contextmanager
def _sized_pool(case: EngineCase) -> Iterator[None]:
    """As many blocks as ``case.pool`` says, of what vLLM wants for one longest request."""
    plan = engine_core.get_kv_cache_configs

    def sized(vllm_config: Any, *args: Any) -> Any:
        [config] = plan(vllm_config, *args)
        need = sum(
            cdiv(
                group.kv_cache_spec.max_memory_usage_bytes(vllm_config),
                group.kv_cache_spec.page_size_bytes,
            )
            for group in config.kv_cache_groups
        )
        requests = sum(1 for _ in case.requests())
        blocks = {
            "pool just enough": need,
            "pool tight": need + need // 4,
            "pool of two": 2 * need,
            "pool plenty": min((requests + 2) * 2 * need, max(PLENTY_BLOCKS, 2 * need)),
        }[case.pool]
        # One is the null block.
        vllm_config.cache_config.num_gpu_blocks_override = blocks + 1
        return plan(vllm_config, *args)

    with mock.patch.object(engine_core, "get_kv_cache_configs", sized):
        yield


class _Driver:
    def __init__(self, case: EngineCase, models: Models, running: Engine, record: Record) -> None:
        self._case, self._running, self._record = case, running, record
        self._engine = running.llm.llm_engine
        self._scheduler = running.core.scheduler
        self._subscriber = None
        if case.events:
            groups = self._scheduler.kv_cache_config.kv_cache_groups
            kinds = [type(group.kv_cache_spec).__name__ for group in groups]
            self._subscriber = Subscriber(running.pool, kinds)
        self._embeddings = self._adapter = None
        if any(request.embeddings for request in case.requests()):
            self._embeddings = models.embeddings(case.architecture)
        if case.lora:
            path: Path = models.adapter(case.architecture)
            self._adapter = LoRARequest("adapter", 1, str(path))

    def run(self) -> None:
        for index, wave in enumerate(self._case.waves):
            hung = self._run_wave(index, wave)
            self._check_idle(f"after wave {index}")
            if hung:
                break
        self._count()

    def _run_wave(self, index: int, wave: Wave) -> bool:
        """Whether requests were left that are never scheduled."""
        waiting = sorted(wave.requests, key=lambda request: request.arrives)
        talks: list[Talk] = []
        seen, still, step = None, 0, 0
        limit = self._step_limit(wave)
        while waiting or not all(talk.done for talk in talks):
            while waiting and waiting[0].arrives <= step:
                talks.append(self._start(waiting.pop(0), index))
            if wave.reset_at == step:
                self._reset()
            for talk in talks:
                after = talk.case.abort_after
                if after is not None and not talk.done and step - talk.case.arrives >= after:
                    self._abort(talk)
            for output in self._engine.step():
                self._take(output)
            step += 1
            now = self._state()
            still = still + 1 if now == seen and now else 0
            seen = now
            if still >= IDLE_STEPS or step > limit:
                self._give_up(talks, still >= IDLE_STEPS, step)
                return True
        return False

    def _step_limit(self, wave: Wave) -> int:
        tokens = sum(
            request.n * sum(len(turn.tokens) + turn.max_tokens for turn in request.turns)
            + (self._case.settings["max_model_len"] if request.follows else 0)
            for request in wave.requests
        )
        return 300 + 10 * tokens

    def _state(self) -> tuple[Any, ...]:
        return tuple(
            (request.request_id, request.num_computed_tokens, request.num_tokens, request.status)
            for request in self._scheduler.requests.values()
        )

    def _give_up(self, talks: list[Talk], idle: bool, step: int) -> None:
        left = [talk for talk in talks if not talk.done]
        pool = self._running.pool
        free, blocks = pool.get_num_free_blocks(), self._running.free_at_start
        names = ", ".join(
            f"{talk.case.name} ({len(talk.answers[0].text())} tokens)" for talk in left
        )
        self._record.faults.append(
            f"never scheduled although {free} of {blocks} blocks are free: {names}"
            if idle
            else f"not done after {step} steps, {free} of {blocks} blocks free: {names}"
        )
        for talk in left:
            self._abort(talk)

    def _start(self, request: RequestCase, wave: int) -> Talk:
        first = list(request.turns[0].tokens)
        if request.follows:
            most = self._case.settings["max_model_len"] - request.turns[0].max_tokens
            earlier = self._record.talks[request.follows].answers[0].text()
            first = (earlier + first)[-most:] if len(earlier) < most else earlier[:most]
        answers = [Answer([first], [[]], [[]]) for _ in range(request.n)]
        talk = self._record.talks[request.name] = Talk(request, wave, answers)
        self._record.counts["requests"] += 1
        try:
            if request.is_session:
                self._open(talk)
            else:
                self._engine.add_request(
                    request.name,
                    self._prompt(request, first),
                    self._params(request, request.turns[0]),
                    lora_request=self._adapter,
                    priority=request.priority,
                )
        except REFUSALS as error:
            self._refuse(talk, error)
        return talk

    def _refuse(self, talk: Talk, error: Exception) -> None:
        """A sentence of ours is an answer, where there is a reason for one."""
        talk.refused = str(error)
        session = talk.case.is_session
        may = session and self._case.asynchronous
        self._record.counts["refused"] += 1
        if not may or not talk.refused.startswith("pacellm: "):
            self._record.faults.append(f"{talk.case.name} was refused: {_one_line(error)}")
        if not talk.done:
            self._abort(talk)

    def _prompt(self, request: RequestCase, tokens: list[int]) -> Any:
        prompt: dict[str, Any] = {"prompt_token_ids": tokens}
        if request.embeddings:
            assert self._embeddings is not None
            prompt = {"prompt_embeds": self._embeddings[torch.tensor(tokens)]}
        if request.salt:
            prompt["cache_salt"] = request.salt
        return prompt

    def _params(self, request: RequestCase, turn: Turn) -> SamplingParams:
        return SamplingParams(
            temperature=request.temperature,
            n=request.n,
            max_tokens=turn.max_tokens,
            ignore_eos=True,
            detokenize=False,
            logprobs=0,
            prompt_logprobs=0 if request.prompt_logprobs else None,
            extra_args=dict(turn.extra) or None,
            output_kind=RequestOutputKind.DELTA,
        )

    # Sessions, as vLLM's AsyncLLM drives them.

    def _open(self, talk: Talk) -> None:
        last = self._session_input(talk, talk.case.name, [0], talk.case.turns[-1], False)
        self._engine.input_processor.assign_request_id(last)
        talk.session = last
        self._send_turn(talk)
        while talk.case.eager and talk.turns_sent < len(talk.case.turns) and not talk.refused:
            self._send_turn(talk)
        if talk.case.eager:
            self._close(talk)

    def _session_input(
        self, talk: Talk, name: str, tokens: list[int], turn: Turn, more: bool
    ) -> Any:
        return self._engine.input_processor.process_inputs(
            name,
            self._prompt(talk.case, tokens),
            self._params(talk.case, turn),
            supported_tasks=self._engine.get_supported_tasks(),
            lora_request=self._adapter,
            priority=talk.case.priority,
            resumable=more,
        )

    def _send_turn(self, talk: Talk) -> None:
        turn = talk.case.turns[talk.turns_sent]
        tokens = talk.answers[0].prompts[0] if talk.turns_sent == 0 else list(turn.tokens)
        sent = self._session_input(talk, talk.session.request_id, tokens, turn, True)
        sent.external_req_id = talk.case.name
        # Both sides lengthen the list that they get; in a server it is one of their own.
        front, core = (
            msgspec.structs.replace(sent, prompt_token_ids=list(tokens)) for _ in range(2)
        )
        self._engine.output_processor.add_request(front, None)
        self._engine.engine_core.add_request(core)
        talk.turns_sent += 1

    def _close(self, talk: Talk) -> None:
        self._engine.output_processor.add_request(talk.session, None)
        self._engine.engine_core.add_request(talk.session)

    def _turn_ended(self, talk: Talk) -> None:
        answer, number = talk.answers[0], len(talk.case.turns)
        if len(answer.prompts) < number:
            answer.prompts.append(list(talk.case.turns[len(answer.prompts)].tokens))
            answer.tokens.append([])
            answer.logprobs.append([])
            if not talk.case.eager:
                try:
                    self._send_turn(talk)
                except REFUSALS as error:
                    self._refuse(talk, error)
        else:
            if not talk.case.eager:
                self._close(talk)
            talk.done = True

    def _take(self, output: Any) -> None:
        talk = self._record.talks[output.request_id]
        if output.num_cached_tokens is not None and talk.cached is None:
            talk.cached = output.num_cached_tokens
        # Told once, and then empty.
        if output.prompt_logprobs:
            ids = output.prompt_token_ids[1:]
            rows = output.prompt_logprobs[1:]
            talk.prompt_logprobs = [
                row[token].logprob for row, token in zip(rows, ids, strict=True)
            ]
        for part in output.outputs:
            answer = talk.answers[part.index]
            ids = list(part.token_ids)
            answer.tokens[-1] += ids
            if ids:
                rows = part.logprobs[-len(ids) :]
                answer.logprobs[-1] += [
                    row[token].logprob for row, token in zip(rows, ids, strict=True)
                ]
            if talk.case.is_session and part.finish_reason is not None and not talk.done:
                self._turn_ended(talk)
        if output.finished:
            talk.done = True

    def _abort(self, talk: Talk) -> None:
        self._engine.abort_request([talk.case.name], internal=False)
        talk.aborted = talk.done = True
        self._record.counts["aborted"] += 1

    def _reset(self) -> None:
        self._engine.reset_prefix_cache(reset_running_requests=True)
        self._record.counts["resets"] += 1

    def _check_idle(self, when: str) -> None:
        faults = self._record.faults
        pool, start = self._running.pool, self._running.free_at_start
        for _ in range(4):
            if pool.get_num_free_blocks() == start and not self._scheduler.requests:
                break
            for output in self._engine.step():
                self._take(output)
        missing = start - pool.get_num_free_blocks()
        if missing:
            faults.append(f"{missing} of {start} blocks are not back {when}")
        held = [b.block_id for b in pool.blocks if b.ref_cnt and not b.is_null]
        if held:
            faults.append(f"blocks {held[:5]} are still held {when}")
        if self._scheduler.requests:
            faults.append(f"the scheduler still knows {len(self._scheduler.requests)} {when}")
        if self._subscriber:
            faults += [f"{fault} {when}" for fault in self._subscriber.compare()]

    def _count(self) -> None:
        counts, running = self._record.counts, self._running
        counts["hit tokens"] = int(running.metric("vllm:prefix_cache_hits"))
        counts["preemptions"] = int(running.metric("vllm:num_preemptions"))
        counts["drafts"] = int(running.metric("vllm:spec_decode_num_draft_tokens"))
        counts["accepted"] = int(running.metric("vllm:spec_decode_num_accepted_tokens"))
        for index, memory in running.memories().items():
            found = memory.counts.as_dict()
            self._record.bank_pages = memory.spec.layout.num_pages
            wrong = any(isinstance(count, int) and count < 0 for count in found.values())
            if wrong or found["slots_peak"] > self._case.pace["bank_size"]:
                self._record.faults.append(f"layer {index} counts {found}")
            counts["commits"] += found["commits"]


def _drafting(record: Record) -> Any:
    """Draft what earlier requests went on with, some of it, and then something else.

    In the proposer's place from its start, which would compile it for seconds.
    """
    from vllm.v1.spec_decode.ngram_proposer import NgramProposer

    def propose(
        proposer: Any, most: int, sampled: Any, num_tokens: Any, token_ids: Any, **unused: Any
    ) -> list[list[int]]:
        texts = [answer.text() for talk in record.talks.values() for answer in talk.answers]
        drafts = []
        for row, new in enumerate(sampled):
            if not new:
                drafts.append([])
                continue
            text = token_ids[row, : num_tokens[row]].tolist()
            size = len(text)
            known = [t[size:] for t in texts if len(t) > size and t[:size] == text]
            rng = random.Random(size)
            right = known[0][: rng.randint(0, most)] if known else []
            wrong = [rng.randrange(256) for _ in range(rng.randint(0, most - len(right)))]
            drafts.append(right + wrong)
        return drafts

    return mock.patch.object(NgramProposer, "propose", propose)


def _one_line(error: BaseException) -> str:
    """The error, and the last line of code that it went through."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = ""
    if trace is not None:
        where = f" ({Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno})"
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300] if text else ''}{where}"
