"""What happens to a request that names a session, on the front end: when it comes and when it ends.

A request reads what earlier ones of its session have left, and leaves its prompt and answer when it
has been answered. Who has got an answer is sure that the next request sees it.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.input_processor import InputProcessor

from pacellm_vllm.compat import api_processes, plugin_logger
from pacellm_vllm.config import PaceConfig, PaceConfigError
from pacellm_vllm.request import RequestSettings, ids_of, keep_reading, reading_of
from pacellm_vllm.sentences import first_refusal

if TYPE_CHECKING:
    from pacellm_vllm.sessions.reading import SessionReader

logger = plugin_logger()

# Requests are prepared in several threads.
_MAKING = Lock()
# Where a request ends nothing is known of the engine but what the request carries.
_READERS: WeakValueDictionary[str, "SessionReader"] = WeakValueDictionary()


def session_key(name: str, salt: str | None) -> bytes:
    """Of the session ``name`` of those who send this ``cache_salt``."""
    parts = (name.encode(), b"" if salt is None else b"salt" + salt.encode())
    lengths = b"".join(len(part).to_bytes(8, "big") for part in parts)
    return hashlib.sha256(lengths + b"".join(parts)).digest()


def check_sessions(vllm_config: VllmConfig) -> None:
    """Raise ``PaceConfigError`` where an engine cannot keep sessions."""
    parallel = vllm_config.parallel_config
    refusals = {
        "several API servers": (
            api_processes(vllm_config) > 1,
            "each would know its own requests only; pass --api-server-count 1",
        ),
        "a load balancer in front of several servers": (
            parallel.data_parallel_size > 1
            and (parallel.data_parallel_external_lb or parallel.data_parallel_hybrid_lb),
            "each would know its own requests only; let one server start all ranks",
        ),
        "no tokenizer": (
            vllm_config.model_config.skip_tokenizer_init,
            "words are looked up, and tokens are none; drop --skip-tokenizer-init",
        ),
    }
    if refusal := first_refusal("session_tokens does", refusals):
        raise PaceConfigError(refusal)


def check_request(settings: RequestSettings, config: PaceConfig, answers: int) -> None:
    """Raise ``PaceConfigError`` where a request with so many ``answers`` can have no session."""
    if settings.session is None:
        return
    if not config.session_tokens:
        raise PaceConfigError(
            "pacellm: this server keeps no sessions; serve with session_tokens (how many tokens of "
            "text they keep), or drop pacellm_session."
        )
    if answers > 1:
        raise PaceConfigError(
            f"pacellm: a session goes on with one answer, not n = {answers}; drop pacellm_session "
            "or n."
        )


def admit(
    processor: InputProcessor,
    request: EngineCoreRequest,
    read_config: Callable[[VllmConfig], PaceConfig],
) -> None:
    """Put what ``request`` reads of its session into its prompt, where it names one.

    Raises ``PaceConfigError`` where it cannot have one.
    """
    params = request.sampling_params
    if params is None or not params.extra_args:
        return
    settings = RequestSettings.of(params.extra_args)
    reading = None
    if settings.session is not None:
        check_request(settings, config := read_config(processor.vllm_config), params.n)
        _check_prompt(request)
        reader = _reader(processor, config)
        assert request.prompt_token_ids is not None
        prompt = list(request.prompt_token_ids)
        longest = processor.model_config.max_model_len
        room, fills = _room(longest - len(prompt), params)
        key = session_key(settings.session, request.cache_salt)
        with reader.store.lock:
            read = reader.read(key, prompt, room, settings.session_read)
            reader.note(request.request_id, read)
        request.prompt_token_ids = [*prompt[: read.place], *read.tokens, *prompt[read.place :]]
        if fills:
            params.max_tokens = longest - len(request.prompt_token_ids)
        reading = [reader.id, read.place, len(read.tokens)]
    params.extra_args = keep_reading(params.extra_args, reading)


def ended(request: EngineCoreRequest) -> Callable[[Sequence[int]], None] | None:
    """What to do with the answer to an admitted ``request``; None if nothing is."""
    params = request.sampling_params
    reading = reading_of(params) if params else None
    if params is None or reading is None:
        return None
    settings = RequestSettings.of(params.extra_args)
    reader = _READERS.get(reading[0])
    if reader is None or settings.session is None or not settings.session_write:
        return None
    key = session_key(settings.session, request.cache_salt)
    tokens, place, count = request.prompt_token_ids or [], reading[1], reading[2]
    prompt = tokens[:place] + tokens[place + count :]

    def leave(answer: Sequence[int]) -> None:
        try:
            with reader.store.lock:
                reader.store.add(key, prompt, answer)
        except Exception:
            # vLLM's loop of answers, in which this runs, would end the server.
            logger.exception("pacellm: an answer could not be left to its session.")

    return leave


def session_counts(processor: InputProcessor) -> dict[str, int]:
    """``StoreCounts`` of a front end; empty before a request has named a session."""
    reader = getattr(processor, "_pacellm_sessions", None)
    return reader.store.as_dict() if reader else {}


def reading_for(processor: InputProcessor, answer_id: str) -> dict[str, Any] | None:
    """What a request has read, by the id that a client was told; None where it named no session."""
    reader = getattr(processor, "_pacellm_sessions", None)
    notes = reader.notes if reader else {}
    return next(filter(None, map(notes.get, ids_of(answer_id))), None)


def _reader(processor: InputProcessor, config: PaceConfig) -> "SessionReader":
    with _MAKING:
        found = getattr(processor, "_pacellm_sessions", None)
        return found or _make_reader(processor, config)


def _make_reader(processor: InputProcessor, config: PaceConfig) -> "SessionReader":
    # They stand on scikit-learn, which engines without sessions do without.
    from pacellm_vllm.sessions.reading import SessionReader
    from pacellm_vllm.sessions.store import PAGE_TOKENS, SessionStore

    tokenizer = processor.get_tokenizer()
    store = SessionStore(
        math.ceil(config.session_tokens / PAGE_TOKENS),
        lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True),
    )
    made = SessionReader(store, tokenizer)
    processor._pacellm_sessions = made  # type: ignore[attr-defined]
    _READERS[made.id] = made
    return made


def _room(rest: int, params: SamplingParams) -> tuple[int, bool]:
    """Of ``rest`` tokens what may be read, and whether the answer is to fill what is left.

    Who asks for as many tokens as there is room for, or for no number, gets fewer where more is
    read, and a quarter of the room at least.
    """
    if params.max_tokens is not None and params.max_tokens < rest:
        return rest - params.max_tokens, False
    return rest - max(1, math.ceil(rest / 4), params.min_tokens), True


def _check_prompt(request: EngineCoreRequest) -> None:
    refusals = {
        "a prompt of embeddings": request.prompt_embeds is not None,
        "pictures": bool(request.mm_features),
        "streamed input": request.resumable,
    }
    for what, found in refusals.items():
        if found:
            raise PaceConfigError(
                f"pacellm: a session keeps text, and {what} is none; drop pacellm_session or send "
                "text only."
            )
    # vLLM 0.33 only; it has compared their number with the prompt's before.
    if getattr(request.sampling_params, "prompt_logprob_token_ids", None) is not None:
        raise PaceConfigError(
            "pacellm: prompt_logprob_token_ids has a row for each token of the prompt, and a "
            "session may add some; drop one of the two."
        )
