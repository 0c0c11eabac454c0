"""The built-in haystack and needles: plain English sentences from a small seeded grammar.

Words have tastes: a noun takes few of the adjectives, verbs and objects, always the same ones, so
a language model has something to learn. Nothing is downloaded; the same seed gives the same text.
"""

import random
from collections.abc import Iterator


def _words(text: str) -> list[str]:
    return text.split()


KEYS = _words(
    "Paris Rome Oslo Cairo Lima Tokyo Delhi Quito Dublin Vienna Prague Warsaw Lisbon Madrid "
    "Athens Berlin London Moscow Boston Denver Dallas Miami Austin Seattle Havana Bogota Nairobi "
    "Lagos Accra Tunis Dakar Kabul Hanoi Manila Seoul Osaka Perth Sydney Zurich Geneva Milan "
    "Venice Turin Naples Krakow Riga Sofia Tbilisi"
)

ADJECTIVES = _words(
    "old young quiet tall brave clever gentle lazy proud honest curious careful tired happy lonely "
    "hungry famous patient nervous polite silent strange wealthy cheerful"
)

NOUNS = _words(
    "farmer doctor teacher sailor painter baker hunter singer lawyer miner pilot tailor gardener "
    "writer soldier merchant carpenter fisherman shepherd captain nurse student judge poet"
)

VERBS = _words(
    "carries paints repairs buys sells finds hides cleans watches builds breaks borrows steals "
    "keeps wants loses brings draws opens closes"
)

OBJECTS = _words(
    "basket ladder window lantern kettle bottle mirror hammer blanket candle wagon violin barrel "
    "bucket carpet chair clock drum flute letter map needle pillow ribbon"
)

PLACES = _words(
    "river market forest garden harbor village castle bridge station kitchen library mountain "
    "valley island meadow church tower mill farm road"
)

PREPOSITIONS = _words("near behind beside inside beyond")
TIMES = _words("morning evening winter summer autumn spring")

NEEDLE = "The magic number of {key} is {value}."
QUESTION = "The magic number of {key} is"

# How many words of the next list a word goes with.
_TASTE = 4


def _tastes() -> dict[tuple[str, str], tuple[str, ...]]:
    rng = random.Random(0)
    chains = (
        ("adjective", ADJECTIVES, NOUNS),
        ("noun", NOUNS, VERBS),
        ("verb", VERBS, OBJECTS),
        ("object", OBJECTS, PLACES),
    )
    return {
        (kind, word): tuple(rng.sample(following, _TASTE))
        for kind, words, following in chains
        for word in words
    }


_NEXT = _tastes()


def sentences(rng: random.Random) -> Iterator[str]:
    """Endless sentences of nine to thirteen words; ``rng`` decides which."""
    while True:
        adjective = rng.choice(ADJECTIVES)
        noun = rng.choice(_NEXT["adjective", adjective])
        verb = rng.choice(_NEXT["noun", noun])
        thing = rng.choice(_NEXT["verb", verb])
        place = rng.choice(_NEXT["object", thing])
        sentence = f"The {adjective} {noun} {verb} the {thing}"
        if rng.random() < 0.7:
            sentence += f" {rng.choice(PREPOSITIONS)} the {place}"
        if rng.random() < 0.3:
            sentence += f" in the {rng.choice(TIMES)}"
        yield sentence + "."


def vocabulary() -> list[str]:
    """Every word of the haystack and the built-in needles, without their numbers."""
    words = {"The", "the", "in", "is", "of", "magic", "number"}
    for group in (KEYS, ADJECTIVES, NOUNS, VERBS, OBJECTS, PLACES, PREPOSITIONS, TIMES):
        words.update(group)
    return sorted(words)
