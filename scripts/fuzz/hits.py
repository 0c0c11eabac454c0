"""Hits: what the prefix cache may have said of a request, and what it had to."""

from collections.abc import Iterator
from typing import Any

from fuzz.cases import WINDOWS, EngineCase
from fuzz.drive import Answer, Record, Talk


def faults_of_hits(case: EngineCase, record: Record) -> Iterator[str]:
    """Sentences about hits that are impossible, or missing."""
    for talk in record.talks.values():
        if talk.cached is not None:
            yield from _impossible(case, record, talk)
            yield from _missing(case, record, talk)


def _impossible(case: EngineCase, record: Record, talk: Talk) -> Iterator[str]:
    prompt, cached = talk.answers[0].prompts[0], talk.cached
    assert cached is not None
    name = f"{talk.case.name} ({len(prompt)} tokens)"
    unit = case.settings["block_size"]
    if has_bank(case, talk):
        unit = max(unit, case.pace["segment_size"])
    if cached > len(prompt) - 1:
        yield f"{name} hit {cached} cached tokens"
    elif cached % unit:
        yield f"{name} hit {cached} cached tokens, no multiple of {unit}"
    if not cached:
        return
    if not case.caching or talk.case.prompt_logprobs:
        yield f"{name} hit {cached} cached tokens where it may not look"
    shared = max((_common(prompt, text) for text in _texts(record, talk)), default=0)
    if cached > shared:
        yield f"{name} hit {cached} cached tokens and shares {shared} with others like it"


def _missing(case: EngineCase, record: Record, talk: Talk) -> Iterator[str]:
    """Where nothing is evicted, a prefix that a prompt before it had too has to be found.

    Up to a segment's end, less as many segments as hold the blocks of a bank's copy.
    """
    if (
        not case.caching
        or case.pool != "pool plenty"
        or case.architecture in WINDOWS
        or talk.case.prompt_logprobs
        or not has_bank(case, talk)
        or record.counts["resets"]
    ):
        return
    prompt = talk.answers[0].prompts[0]
    shared = max(
        (
            _common(prompt, other.answers[0].prompts[0])
            for other in record.talks.values()
            if other.wave < talk.wave
            and not (other.aborted or other.refused or other.case.is_session)
            and _key(other) == _key(talk)
            and has_bank(case, other)
        ),
        default=0,
    )
    size = case.pace["segment_size"]
    apart = -(-record.bank_pages * case.settings["block_size"] // size) * size
    due = min(shared, len(prompt) - 1) // size * size - apart
    assert talk.cached is not None
    if talk.cached < due:
        yield (
            f"{talk.case.name} hit {talk.cached} cached tokens and not {due}: a prompt before it "
            f"shares {shared} of its {len(prompt)}"
        )


def has_bank(case: EngineCase, talk: Talk) -> bool:
    """Whether a request may ever read its bank."""
    if "layers" in talk.case.turns[0].overrides:
        return False
    if talk.case.is_session:
        return True
    computed = len(talk.answers[0].prompts[0]) + talk.case.turns[0].max_tokens - 1
    return computed > case.pace["segment_size"]


def _key(talk: Talk) -> Any:
    """What two requests must agree in to share anything."""
    case = talk.case
    return case.salt, case.embeddings, sorted(case.turns[0].overrides.items())


def _texts(record: Record, talk: Talk) -> Iterator[list[int]]:
    """All others that could have left something in the cache for this request."""
    for other in record.talks.values():
        if other.wave > talk.wave:
            continue
        if _key(other) == _key(talk):
            for answer in other.answers:
                if other is not talk:
                    yield from _as_computed(answer)
        if other is talk and talk.case.n > 1:
            yield talk.answers[0].prompts[0]


def _as_computed(answer: Answer) -> Iterator[list[int]]:
    """A session forgets the last token of each turn but the last."""
    text: list[int] = []
    for prompt, said in zip(answer.prompts, answer.tokens, strict=True):
        text = text + prompt
        yield text + said
        text = text + said[:-1]


def _common(one: list[int], other: list[int]) -> int:
    most = min(len(one), len(other))
    return next((i for i in range(most) if one[i] != other[i]), most)
