"""From an item's prompt to token ids or messages that fit, cut in the middle (LongBench)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

from pacellm_vllm.evals.records import EvalError
from pacellm_vllm.evals.tasks import Messages
from pacellm_vllm.sentences import first_line


@dataclass(frozen=True)
class Fitted:
    """A prompt of which ``cut`` tokens were left out: all of it as ids, a chat as messages too."""

    ids: list[int]
    cut: int
    messages: Messages | None = None


class Fitter:
    """Cuts prompts of a tokenizer.

    ``max_length`` counts the text of a prompt (of its last user message in a chat) before the
    chat template, as LongBench does; None cuts only what the model has no room for.
    """

    def __init__(self, tokenizer: Any, max_length: int | None) -> None:
        self._tokenizer, self._max_length = tokenizer, max_length

    def fit(self, prompt: str | Messages, room: int) -> Fitted:
        """``prompt`` in at most ``room`` tokens, of which there must be one."""
        if room < 1:
            raise EvalError(
                f"pacellm: an answer leaves {room} tokens of the model's length for its prompt; "
                "give the engine a larger max_model_len, or leave that task out."
            )
        if isinstance(prompt, Messages):
            return self._fit_chat(prompt, room)
        ids = self._tokenizer(prompt).input_ids
        kept = middle_cut(ids, min(room, self._max_length or room))
        return Fitted(kept, len(ids) - len(kept))

    def fit_pair(self, prompt: str | Messages, continuation: str, room: int) -> tuple[Fitted, int]:
        """``prompt`` and then ``continuation``, which stays whole, and its tokens."""
        if isinstance(prompt, Messages):
            prompt, special = rendered_chat(self._tokenizer, prompt), False
        else:
            special = True
        # A space at the end belongs to the first word of what follows.
        text = prompt.rstrip()
        continuation = prompt[len(text) :] + continuation
        whole = self._ids(text + continuation, special)
        n = len(whole) - len(self._ids(text, special))
        if n < 1:
            raise EvalError(f"pacellm: {continuation!r} adds no token to its prompt.")
        if room - n < 1:
            raise EvalError(
                f"pacellm: an answer to score has {n} tokens, and with a prompt the model has room "
                f"for {room}; give the engine a larger max_model_len, or leave that task out."
            )
        before = whole[:-n] or [self._start()]
        kept = middle_cut(before, min(room - n, self._max_length or room))
        return Fitted([*kept, *whole[-n:]], len(before) - len(kept)), n

    def _fit_chat(self, messages: Messages, room: int) -> Fitted:
        at = max(i for i, message in enumerate(messages) if message["role"] == "user")
        content = self._ids(messages[at]["content"], False)
        length = min(len(content), self._max_length or len(content))
        while True:
            fitted = messages
            if length < len(content):
                text = self._tokenizer.decode(middle_cut(content, length))
                fitted = Messages([*messages[:at], {**messages[at], "content": text}])
                fitted.extend(messages[at + 1 :])
            ids = self._ids(rendered_chat(self._tokenizer, fitted), False)
            over = len(ids) - room
            if over <= 0:
                return Fitted(ids, len(content) - length, fitted)
            length -= over
            if length <= 0:
                raise EvalError(f"pacellm: a chat template alone needs more than {room} tokens.")

    def _ids(self, text: str, special: bool) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=special).input_ids)

    def _start(self) -> int:
        first = self._tokenizer.bos_token_id
        return int(self._tokenizer.eos_token_id if first is None else first)


def require_chat_template(tokenizer: Any) -> None:
    """Raise ``EvalError`` where ``tokenizer`` cannot write a question as a chat."""
    rendered_chat(tokenizer, [{"role": "user", "content": "?"}])


def rendered_chat(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    """``messages`` as the model's chat template writes them, up to where its answer goes on.

    ``EvalError`` for a tokenizer without a template, or with one that does not take them.
    """
    begun = messages[-1]["role"] == "assistant"
    how = {"continue_final_message": True} if begun else {"add_generation_prompt": True}
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, **how)
    except (ValueError, TemplateError) as error:
        raise EvalError(
            f"pacellm: the tokenizer has no chat template that fits ({first_line(error)}); "
            "ask without --chat."
        ) from None


def middle_cut(ids: list[int], length: int) -> list[int]:
    """The first and the last half of ``length`` tokens, all where there are no more."""
    if len(ids) <= length:
        return list(ids)
    head = length // 2
    return [*ids[:head], *ids[len(ids) - (length - head) :]]
