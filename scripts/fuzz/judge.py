"""Judge: whether an engine did what the oracle does, and gave everything back."""

import time
from collections import Counter
from collections.abc import Iterator

from fuzz.cases import make_case
from fuzz.drive import Answer, Talk, drive
from fuzz.hits import faults_of_hits
from fuzz.models import Models
from fuzz.truth import Reading, Truth
from fuzz.verdict import Verdict

NEAR = 1e-3


def judge(seed: int, models: Models, plain: bool = False) -> Verdict:
    """Run the engine of ``seed`` and hold it to the truth."""
    begun = time.perf_counter()
    case = make_case(seed)
    record = drive(case, models, plain)
    faults = list(record.faults)
    path = models.adapted if case.lora else models.checkpoint
    truth = Truth(path(case.architecture), {"layers": ()} if plain else case.pace)
    for talk in record.talks.values():
        faults += _wrong_words(truth, talk, record.counts, plain)
    if not plain:
        faults += faults_of_hits(case, record)
    return Verdict(
        seed,
        case.describe(),
        faults,
        dict(record.counts),
        sorted(case.features()),
        time.perf_counter() - begun,
    )


def _wrong_words(truth: Truth, talk: Talk, counts: Counter[str], plain: bool) -> Iterator[str]:
    """Sentences about tokens and log-probabilities that are not the oracle's."""
    if talk.refused:
        return
    for index, answer in enumerate(talk.answers):
        for turn in range(len(answer.prompts)):
            if answer.tokens[turn]:
                fault = _wrong_turn(truth, talk, answer, turn, counts, plain)
                if fault:
                    about = f"{len(answer.prompts[turn])} tokens read, {talk.cached} cached"
                    about += f", answer {index}" if talk.case.n > 1 else ""
                    about += f", turn {turn}" if talk.case.is_session else ""
                    yield f"{talk.case.name} ({about}): {fault}"
                    break


def _wrong_turn(
    truth: Truth, talk: Talk, answer: Answer, turn: int, counts: Counter[str], plain: bool
) -> str | None:
    text, said = [*_text(answer, turn)], answer.tokens[turn]
    reading = truth.read(text, **({} if plain else talk.case.turns[0].overrides))
    start = len(text) - len(said)
    if turn == 0 and talk.prompt_logprobs is not None:
        for at, logprob in enumerate(talk.prompt_logprobs, 1):
            if at < reading.sure and not abs(logprob - reading.chosen[at - 1]) <= NEAR:
                return f"prompt token {at} off by {logprob - reading.chosen[at - 1]:.3g}"
    for i, logprob in enumerate(answer.logprobs[turn]):
        at = start + i
        # Token `at` was chosen by what token at - 1 made of all before it.
        if at - 1 >= reading.sure:
            counts["tokens too near a tie"] += len(said) - i
            break
        counts["tokens compared"] += 1
        fault = _wrong_token(reading, at, logprob, greedy=talk.case.temperature == 0)
        if fault:
            return f"token {i} of {len(said)} {fault}"
    return None


def _wrong_token(reading: Reading, at: int, logprob: float, greedy: bool) -> str | None:
    chosen, best = reading.chosen[at - 1], reading.best[at - 1]
    if not abs(logprob - chosen) <= NEAR:
        return f"has log-probability {logprob:.4f} and not {chosen:.4f}"
    if greedy and best - chosen > NEAR:
        return f"is not the likeliest by {best - chosen:.4f}"
    return None


def _text(answer: Answer, turn: int) -> Iterator[int]:
    """What was read and said up to the end of a turn; a new turn forgets the last token said."""
    for i in range(turn + 1):
        yield from answer.prompts[i]
        yield from answer.tokens[i] if i == turn else answer.tokens[i][:-1]
