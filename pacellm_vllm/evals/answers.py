"""Who answers the prompts: an engine in this process, or a server that is running already."""

import contextlib
import gc
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from pacellm_vllm.config import CONFIG_KEY
from pacellm_vllm.evals.records import EvalError

STOP = (".", "\n")


class Answerer(Protocol):
    def answer(self, prompts: Sequence[list[int]], max_tokens: int) -> list[str]:
        """Greedy continuations of token ids, up to the end of a sentence or line."""
        ...


class Offline:
    """A ``vllm.LLM`` in this process."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def answer(self, prompts: Sequence[list[int]], max_tokens: int) -> list[str]:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=max_tokens, stop=list(STOP))
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
        )
        return [output.outputs[0].text for output in outputs]


class Server:
    """The OpenAI completions route of a running server, ``url`` up to and with ``/v1``."""

    def __init__(self, url: str, model: str, api_key: str) -> None:
        from openai import OpenAI

        self._url, self._model = url, model
        self._client = OpenAI(base_url=url, api_key=api_key, timeout=3600)

    def answer(self, prompts: Sequence[list[int]], max_tokens: int) -> list[str]:
        from openai import OpenAIError

        def one(prompt: list[int]) -> str:
            reply = self._client.completions.create(
                model=self._model,
                prompt=prompt,
                max_tokens=max_tokens,
                temperature=0,
                stop=list(STOP),
            )
            return reply.choices[0].text

        try:
            with ThreadPoolExecutor(len(prompts)) as pool:
                return list(pool.map(one, prompts))
        except OpenAIError as error:
            raise EvalError(f"pacellm: the server at {self._url} did not answer: {error}") from None


@contextlib.contextmanager
def offline_engine(
    model: str, memory: Mapping[str, Any] | None, arguments: Mapping[str, Any]
) -> Iterator[Any]:
    """A ``vllm.LLM`` of ``model`` with memory as in ``{"pacellm": memory}``, or without any.

    ``arguments`` are its other arguments. It is taken down at the end, so the next can start.
    """
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    given = dict(arguments)
    base, pace = architectures(model, bool(given.get("trust_remote_code", False)))
    if memory is not None:
        if pace is None:
            raise EvalError(
                f"pacellm: {model} is a {base}, which carries no memory; compare off only."
            )
        given["additional_config"] = {CONFIG_KEY: dict(memory)}
    named = base if memory is None else pace
    overrides = {**given.pop("hf_overrides", {}), "architectures": [named]}
    llm = LLM(model=model, hf_overrides=overrides, **given)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def architectures(model: str, trust_remote_code: bool = False) -> tuple[str, str | None]:
    """A checkpoint's architecture without memory, and with it (None if it has none)."""
    from vllm.transformers_utils.config import get_config

    from pacellm_vllm.models.table import ARCHITECTURES, pace_architecture

    [named] = get_config(model, trust_remote_code).architectures or [""]
    base = ARCHITECTURES[named].architecture if named in ARCHITECTURES else named
    return base, pace_architecture(named)
