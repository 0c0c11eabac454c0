"""ROUGE-L recall (Lin 2004, Sec. 3): the share of the answer's words found, in order."""

import re
from itertools import pairwise

_WORD = re.compile(r"[a-z0-9]+")


def rouge_l_recall(answer: str, output: str) -> float:
    """Longest common subsequence of words over the answer's words, 0 to 1.

    Words are runs of ASCII letters and digits in lower case, as in the ``rouge-score`` package
    without stemming; 0 when the answer has none.
    """
    wanted, found = (_WORD.findall(text.lower()) for text in (answer, output))
    if not wanted:
        return 0.0
    row = [0] * (len(found) + 1)
    for word in wanted:
        new = [0]
        for other, (diagonal, above) in zip(found, pairwise(row), strict=True):
            new.append(diagonal + 1 if word == other else max(new[-1], above))
        row = new
    return row[-1] / len(wanted)
