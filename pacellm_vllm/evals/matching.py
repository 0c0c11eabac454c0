"""Whether what was said has an answer in it."""

from collections.abc import Collection

from pacellm_vllm.sessions.words import WORD


def words(text: str) -> list[str]:
    """In lower case; each character of Chinese and Japanese is one."""
    return WORD.findall(text.lower())


def has_words(said: str, answer: str, left_out: Collection[str] = ()) -> bool:
    """Whether the words of ``answer``, if there are any, stand together in ``said``.

    Words that are ``left_out`` count in neither.
    """
    wanted, found = ([w for w in words(text) if w not in left_out] for text in (answer, said))
    n = len(wanted)
    return n > 0 and any(found[i : i + n] == wanted for i in range(len(found) - n + 1))
