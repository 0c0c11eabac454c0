"""A running server that answers, and whether it runs the configuration it is asked for."""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pacellm_vllm.evals.answers import STOP, Answer, Prompt
from pacellm_vllm.evals.records import EvalError
from pacellm_vllm.evals.settings import Setting
from pacellm_vllm.serving import MEMORY_ROUTE

# Greedy, as in this process, whatever a generation_config.json says; the last is vLLM's own field.
_GREEDY: dict[str, Any] = {"temperature": 0, "presence_penalty": 0, "frequency_penalty": 0}
_GREEDY_BODY = {"repetition_penalty": 1.0}


class Server:
    """The OpenAI routes of a running server, ``url`` up to and with ``/v1``.

    Token ids go to completions, messages to chat completions.
    """

    def __init__(self, url: str, model: str, api_key: str) -> None:
        from openai import OpenAI

        self._url, self._model = url.rstrip("/"), model
        self._client = OpenAI(base_url=url, api_key=api_key, timeout=3600)
        served = {entry["id"]: entry for entry in self._get(f"{self._url}/models")["data"]}
        if model not in served:
            raise EvalError(
                f"pacellm: the server at {url} serves {', '.join(served)}, not {model}; say which "
                "with --served-model-name."
            )
        self.max_model_len = int(served[model]["max_model_len"])
        self._facts: dict[str, Any] = {
            "checked": False,
            "config": None,
            "engine": {"max_model_len": self.max_model_len},
        }

    def check(self, setting: Setting, expected: Mapping[str, Any] | None) -> None:
        """Compare ``expected`` with what the server says it runs, where it says so.

        ``EvalError`` if they differ.
        """
        base = self._url.removesuffix("/v1")
        answer = self._get(base + MEMORY_ROUTE, missing=(404, 501))
        if answer is None:
            return
        running = answer["config"]
        self._facts = {"checked": True, "config": running, "engine": answer["engine"]}
        wrong = _first_difference(expected, running)
        if wrong:
            raise EvalError(
                f"pacellm: the server at {self._url} does not run configuration {setting.name!r}: "
                f"{wrong}; start it with that configuration, or name the one it runs."
            )

    def answer(
        self, prompts: Sequence[Prompt], max_tokens: int, stop: Sequence[str] = STOP
    ) -> list[Answer]:
        def one(prompt: Prompt) -> Answer:
            sampling = {**_GREEDY, "stop": list(stop)}
            if not isinstance(prompt[0], dict):
                sampling |= {"max_tokens": max_tokens, "extra_body": _GREEDY_BODY}
                said = self._complete(prompt, **sampling)
                return Answer(said.text, said.finish_reason == "length")
            # A last message of the assistant's is the beginning of its answer.
            begun = prompt[-1]["role"] == "assistant"
            reply = self._client.chat.completions.create(
                model=self._model,
                messages=prompt,  # type: ignore[arg-type]
                max_completion_tokens=max_tokens,
                extra_body={
                    **_GREEDY_BODY,
                    "add_generation_prompt": not begun,
                    "continue_final_message": begun,
                },
                **sampling,
            )
            [choice] = reply.choices
            return Answer(choice.message.content or "", choice.finish_reason == "length")

        return self._all(one, prompts)

    def loglikelihood(self, prompts: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        def one(prompt: tuple[list[int], int]) -> tuple[float, bool]:
            ids, n = prompt
            reply = self._complete(
                ids, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": 0}
            )
            entries = zip(ids[-n:], reply.prompt_logprobs[-n:], strict=True)
            found = [entry[str(token)] for token, entry in entries]
            return sum(e["logprob"] for e in found), all(e["rank"] == 1 for e in found)

        return self._all(one, prompts)

    def describe(self) -> dict[str, Any]:
        return self._facts

    def _complete(self, prompt: Any, **sampling: Any) -> Any:
        reply = self._client.completions.create(model=self._model, prompt=prompt, **sampling)
        return reply.choices[0]

    def _all(self, one: Any, prompts: Sequence[Any]) -> list[Any]:
        from openai import OpenAIError

        try:
            with ThreadPoolExecutor(len(prompts)) as pool:
                return list(pool.map(one, prompts))
        except OpenAIError as error:
            raise EvalError(f"pacellm: the server at {self._url} did not answer: {error}") from None

    def _get(self, url: str, missing: Sequence[int] = ()) -> Any:
        """The JSON at ``url``; None for a status in ``missing``."""
        from openai import APIStatusError, OpenAIError

        try:
            client = self._client.with_options(max_retries=0, timeout=600)
            return json.loads(client.get(url, cast_to=str))
        except OpenAIError as error:
            if isinstance(error, APIStatusError) and error.status_code in missing:
                return None
            raise EvalError(f"pacellm: the server at {self._url} did not answer: {error}") from None


def _first_difference(
    expected: Mapping[str, Any] | None, running: Mapping[str, Any] | None
) -> str | None:
    if expected is None or running is None:
        if expected == running:
            return None
        return "it runs with memory or experts" if running else "it runs without"
    for name, value in expected.items():
        if running.get(name) != value:
            return f"its {name} is {running.get(name)!r}, not {value!r}"
    return None
