"""Who answers the prompts: an engine in this process, or a server that is running already."""

import contextlib
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import ValidationError

from pacellm_vllm.compat import checkpoint_config, close, config_of
from pacellm_vllm.config import CONFIG_KEY
from pacellm_vllm.evals.arguments import trusted
from pacellm_vllm.evals.records import EvalError
from pacellm_vllm.evals.settings import Setting
from pacellm_vllm.platform import check_platform

STOP = (".", "\n")

# Token ids; chat messages only where a server renders them itself.
Prompt = list[int] | list[dict[str, str]]


@dataclass(frozen=True)
class Answer:
    """What was said, and whether ``max_tokens`` ended it: a model that thinks may not be done."""

    text: str
    cut: bool
    # With what a session has brought; 0 where a server was asked.
    prompt_tokens: int = 0

    @property
    def ended(self) -> str:
        """``cut``, ``empty`` or ``whole``."""
        return "cut" if self.cut else "whole" if self.text.strip() else "empty"


class Answerer(Protocol):
    max_model_len: int

    def answer(
        self, prompts: Sequence[Prompt], max_tokens: int, stop: Sequence[str] = STOP
    ) -> list[Answer]:
        """Greedy continuations, by default up to the end of a sentence or line."""
        ...

    def loglikelihood(self, prompts: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """For (ids, n): log-probability of the last n ids, and whether greedy would say them."""
        ...

    def describe(self) -> dict[str, Any]:
        """What answers, as JSON: an engine's settings and configuration."""
        ...


class Offline:
    """A ``vllm.LLM`` in this process."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.max_model_len = config_of(llm).model_config.max_model_len

    def answer(
        self,
        prompts: Sequence[Prompt],
        max_tokens: int,
        stop: Sequence[str] = STOP,
        extra_args: dict[str, Any] | None = None,
    ) -> list[Answer]:
        outputs = self._run(prompts, max_tokens, list(stop), extra_args=extra_args)
        return [
            Answer(
                output.outputs[0].text,
                output.outputs[0].finish_reason == "length",
                len(output.prompt_token_ids),
            )
            for output in outputs
        ]

    def loglikelihood(self, prompts: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        # Choices of one long question share its prefix, which vLLM would compute again for each:
        # where it has a prefix, there are no log-probabilities of its tokens.
        cached = self._logprobs([ids for ids, _ in prompts], skip_reading_prefix_cache=False)
        short = [
            i
            for i, ((ids, n), output) in enumerate(zip(prompts, cached, strict=True))
            if len(ids) - n <= (output.num_cached_tokens or 0)
        ]
        whole = self._logprobs([prompts[i][0] for i in short]) if short else []
        outputs = dict(enumerate(cached)) | dict(zip(short, whole, strict=True))
        scored = []
        for i, (ids, n) in enumerate(prompts):
            entries = zip(ids[-n:], outputs[i].prompt_logprobs[-n:], strict=True)
            found = [entry[token] for token, entry in entries]
            scored.append((sum(e.logprob for e in found), all(e.rank == 1 for e in found)))
        return scored

    def losses(self, prompts: Sequence[list[int]]) -> list[list[float]]:
        """Loss (nats) of every token after the first of each prompt."""
        return [
            [
                -entry[token].logprob
                for token, entry in zip(ids[1:], output.prompt_logprobs[1:], strict=True)
            ]
            for ids, output in zip(prompts, self._logprobs(prompts), strict=True)
        ]

    def describe(self) -> dict[str, Any]:
        from pacellm_vllm.models.settings import describe_engine

        return describe_engine(config_of(self.llm))

    def _logprobs(self, prompts: Sequence[list[int]], **more: Any) -> Any:
        # Entries of a cached prefix are unwritten memory: no text is made of them.
        return self._run(prompts, 1, [], prompt_logprobs=0, detokenize=False, **more)

    def _run(self, prompts: Sequence[Any], max_tokens: int, stop: list[str], **more: Any) -> Any:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=max_tokens, stop=stop, **more)
        return self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
        )


@contextlib.contextmanager
def answering(
    args: Namespace, setting: Setting, engine: Mapping[str, Any], servers: Mapping[str, str]
) -> Iterator[Answerer]:
    """Who answers for ``setting``: its server, or an engine that lives as long as the context.

    ``args`` are those of ``add_model`` and ``add_configs``. Raises ``EvalError``, also for a
    server that says it runs another configuration.
    """
    from pacellm_vllm.evals.server import Server

    if setting.name in servers:
        url, name = servers[setting.name], args.served_model_name or args.model
        server = Server(url, name, args.api_key)
        server.check(setting, expected_config(args.model, setting.memory, trusted(args)))
        yield server
        return
    with offline_engine(args.model, setting.memory, engine) as llm:
        yield Offline(llm)


@contextlib.contextmanager
def offline_engine(
    model: str, memory: Mapping[str, Any] | None, arguments: Mapping[str, Any]
) -> Iterator[Any]:
    """A ``vllm.LLM`` of ``model`` with memory as in ``{"pacellm": memory}``, or without any.

    ``arguments`` are its other arguments. It is taken down at the end, so the next can start.
    Raises ``EvalError`` for what vLLM, or this package in it, refuses.
    """
    from vllm import LLM

    given = dict(arguments)
    base, pace = architectures(model, bool(given.get("trust_remote_code", False)))
    if memory is not None:
        if pace is None:
            raise EvalError(
                f"pacellm: {model} is a {base}, which carries no memory; compare off only."
            )
        beside = given.get("additional_config") or {}
        if CONFIG_KEY in beside:
            raise EvalError(
                f"pacellm: the engine's arguments hold {CONFIG_KEY} in additional_config, which "
                "each configuration would replace; give it in --memory."
            )
        given["additional_config"] = {**beside, CONFIG_KEY: dict(memory)}
    named = base if memory is None else pace
    overrides = {**given.pop("hf_overrides", {}), "architectures": [named]}
    check_platform()
    try:
        llm = LLM(model=model, hf_overrides=overrides, **given)
    except ValidationError as error:
        # As vLLM's own configuration wraps what is wrong with it, a sentence of ours too.
        said = error.errors()[0]["msg"].removeprefix("Value error, ")
        ours = "" if said.startswith("pacellm: ") else "pacellm: the engine cannot be made: "
        raise EvalError(ours + said) from None
    try:
        yield llm
    finally:
        close(llm)


def check_settings(model: str, settings: Sequence[Setting], engine: Mapping[str, Any]) -> None:
    """Raise ``PaceConfigError`` for a setting that ``model`` cannot be served with."""
    for setting in settings:
        expected_config(model, setting.memory, bool(engine.get("trust_remote_code", False)))


def architectures(model: str, trust_remote_code: bool) -> tuple[str, str | None]:
    """A checkpoint's architecture without memory, and with it (None if it has none)."""
    from pacellm_vllm.models.table import ARCHITECTURES, pace_architecture

    [named] = checkpoint_config(model, trust_remote_code).architectures or [""]
    base = ARCHITECTURES[named].architecture if named in ARCHITECTURES else named
    return base, pace_architecture(named)


def expected_config(
    model: str, memory: Mapping[str, Any] | None, trust_remote_code: bool = False
) -> dict[str, Any] | None:
    """What an engine of ``model`` with ``{"pacellm": memory}`` says its configuration is.

    Raises ``PaceConfigError`` for one that it would refuse.
    """
    from pacellm_vllm.models.settings import as_json, config_with

    if memory is None:
        return None
    config = checkpoint_config(model, trust_remote_code)
    layers = config.get_text_config().num_hidden_layers
    return as_json(config_with(config, model, memory), layers)
