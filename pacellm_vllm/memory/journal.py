"""Journal: what memory did for each request that asked to be told, in the worker that did it."""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pacellm_vllm.ops.rules import MemoryRules
from pacellm_vllm.ops.update import Committed, Progress
from pacellm_vllm.request import effect_of

# By letter: what became of a token, and what its look-up asked for. A token that met an empty bank
# asks for a slot as a low one does, and is counted as one elsewhere.
KINDS = {
    "h": "high",
    "m": "mid",
    "l": "low",
    "e": "empty",
    "u": "unsound",
    "c": "cached",
    "n": "none",
}
# About 16 bytes each; the oldest answers go first.
MOST_TOKENS = 1 << 21
MOST_ANSWERS = 1024
STRONGEST = 20
_UNKNOWN = -1


class Journal:
    """Answers by key, an id that its request knows and behind a newline what makes it unique.

    At most ``most_tokens`` tokens, counted once a layer and two more for each slot of a commit,
    and ``most_answers`` answers are kept.
    """

    def __init__(self, most_tokens: int = MOST_TOKENS, most_answers: int = MOST_ANSWERS) -> None:
        self._answers: OrderedDict[str, Answer] = OrderedDict()
        self._forgotten: OrderedDict[str, None] = OrderedDict()
        self._most_tokens = most_tokens
        self._most_answers = most_answers
        self._tokens = 0
        self._begun = 0

    def note(
        self,
        key: str,
        layer: int,
        position: int,
        rules: MemoryRules,
        progress: Progress,
        nearest: Sequence[tuple[int, float]],
    ) -> None:
        """Tokens from ``position`` on, in one segment, and the commit if they ended it, with each
        slot's ``nearest_slots`` after it.
        """
        if answer := self._answer(key):
            mine = answer.memory.setdefault(layer, LayerAnswer())
            self._make_room(mine.read(position, rules, progress, nearest))

    def note_idle(self, key: str, layer: int, position: int, count: int) -> None:
        """Tokens of a request that holds no bank."""
        if answer := self._answer(key):
            self._make_room(answer.memory.setdefault(layer, LayerAnswer()).pass_by(position, count))

    def note_experts(self, key: str, layer: int, position: int, chosen: torch.Tensor) -> None:
        """Which experts [n, K] bool tokens from ``position`` on computed."""
        if answer := self._answer(key):
            mine = answer.experts.setdefault(layer, LayerExperts(chosen.shape[1]))
            self._make_room(mine.read(position, chosen))

    def report(self, request_id: str, first: int = 0) -> dict[int, dict[str, Any]] | None:
        """By layer, see :meth:`LayerAnswer.report`; None of what is not, or no longer, known.

        Of several requests with one id the one that began last.
        """
        found = self._find(request_id)
        return {at: one.report(first) for at, one in found.memory.items()} if found else None

    def experts(self, request_id: str, layer: int) -> dict[str, Any] | None:
        """The ``layers`` whose experts were noted, and :meth:`LayerExperts.report` of ``layer`` if
        it is one of them; None as :meth:`report`.
        """
        found = self._find(request_id)
        if found is None:
            return None
        mine = found.experts.get(layer)
        return {"layers": sorted(found.experts), **(mine.report() if mine else {})}

    def summary(self, request_id: str) -> dict[int, dict[str, Any]] | None:
        """By layer, see :meth:`LayerAnswer.summary`; None as :meth:`report`."""
        found = self._find(request_id)
        return {at: one.summary() for at, one in found.memory.items()} if found else None

    def _find(self, request_id: str) -> "Answer | None":
        begin = f"{request_id}\n"
        found = (answer for key, answer in self._answers.items() if key.startswith(begin))
        return max(found, key=lambda answer: answer.number, default=None)

    def _answer(self, key: str) -> "Answer | None":
        if key in self._forgotten:
            self._forgotten.move_to_end(key)
            return None
        if key not in self._answers:
            self._begun += 1
            self._answers[key] = Answer(self._begun)
        # Those that are still running are the last to be forgotten.
        self._answers.move_to_end(key)
        return self._answers[key]

    def _make_room(self, tokens: int) -> None:
        self._tokens += tokens
        while self._tokens > self._most_tokens or len(self._answers) > self._most_answers:
            key, answer = self._answers.popitem(last=False)
            self._tokens -= answer.size()
            # What is still running must not begin again in the middle.
            self._forgotten[key] = None
            if len(self._forgotten) > self._most_answers:
                self._forgotten.popitem(last=False)


@dataclass
class Answer:
    """One request's, by layer; a later one's ``number`` is larger."""

    number: int
    memory: "dict[int, LayerAnswer]" = field(default_factory=dict)
    experts: "dict[int, LayerExperts]" = field(default_factory=dict)

    def size(self) -> int:
        """In tokens, by how much memory it takes."""
        memory = sum(layer.size() for layer in self.memory.values())
        return memory + sum(layer.size() for layer in self.experts.values())


class LayerAnswer:
    """One request in one layer, by position: ``kinds``, and what each token found.

    ``similarity`` is the mean cosine with the most similar slots, which decides the kind,
    ``slot`` the most similar one and ``source`` the position of the token whose activation it
    held then, -1 where that was read by another request.
    """

    def __init__(self) -> None:
        self._kinds = bytearray()
        self._similarity = array("f")
        self._slot = array("h")
        self._source = array("i")
        # After each commit: where it was, what it did, and each slot's source and merges.
        self._commits: list[tuple[int, Committed, array[int], array[int]]] = []
        self._slots_kept = 0
        # After the last one: each slot's nearest other one.
        self._nearest: Sequence[tuple[int, float]] = ()
        self._rules: MemoryRules | None = None

    def __len__(self) -> int:
        return len(self._kinds)

    def size(self) -> int:
        """In tokens, by how much memory it takes: a slot of a commit is two of them."""
        return len(self) + 2 * self._slots_kept

    def read(
        self,
        position: int,
        rules: MemoryRules,
        progress: Progress,
        nearest: Sequence[tuple[int, float]],
    ) -> int:
        """Returns how much :meth:`size` has grown."""
        before = self.size()
        self._rules = rules
        self._go_to(position, "c")
        sources, _ = self._slots()
        found, top = progress.mean_top, progress.top
        means = found if isinstance(found, list) else found.tolist()
        slots = top if isinstance(top, list) else top.tolist()
        for mean, ranked in zip(means, slots, strict=True):
            kind = _kind(mean, rules)
            near = ranked[0] if ranked and kind != "u" else _UNKNOWN
            self._kinds.append(ord(kind))
            self._similarity.append(mean if near != _UNKNOWN else 0.0)
            self._slot.append(near)
            known = 0 <= near < len(sources)
            self._source.append(sources[near] if known else _UNKNOWN)
        if progress.committed is not None:
            self._commit(progress.committed, rules)
            self._nearest = nearest
        return self.size() - before

    def pass_by(self, position: int, count: int) -> int:
        """Tokens without a bank; returns as :meth:`read`."""
        before = self.size()
        self._go_to(position, "c")
        self._go_to(position + count, "n")
        return self.size() - before

    def summary(self) -> dict[str, Any]:
        """``tokens`` by kind, number of ``commits``, of ``slots`` in use, and the ``settings`` that
        the request's tokens were read with, as far as it may set them.
        """
        return {
            "tokens": self._tokens(),
            "commits": len(self._commits),
            "slots": len(self._slots()[0]),
            "settings": effect_of(self._rules) if self._rules else {},
        }

    def _tokens(self) -> dict[str, int]:
        return {name: self._kinds.count(letter.encode()) for letter, name in KINDS.items()}

    def report(self, first: int = 0) -> dict[str, Any]:
        """Plain numbers and lists.

        ``tokens`` counts by kind; ``kinds`` a letter of ``KINDS`` a token; ``similarity``,
        ``slot`` and ``source`` a number a token; ``commits`` and ``slots`` dictionaries;
        ``strongest`` the recalls of tokens from position ``first`` on with the most similarity.
        """
        letters = self._kinds.decode()
        similarity = [round(value, 3) for value in self._similarity]
        sources, merges = self._slots()
        usage = self._commits[-1][1].usage if self._commits else []
        recalls = [at for at in range(first, len(self)) if letters[at] in "hm"]
        recalls.sort(key=lambda at: (-self._similarity[at], at))
        return {
            "tokens": self._tokens(),
            "kinds": letters,
            "similarity": similarity,
            "slot": self._slot.tolist(),
            "source": self._source.tolist(),
            "commits": [
                {
                    "position": at,
                    "valid": done.valid,
                    "filled": done.filled,
                    "merged": len(done.merged),
                    "replaced": len(done.replaced),
                    "dropped": done.dropped,
                }
                for at, done, _, _ in self._commits
            ],
            "slots": [
                {
                    "source": source,
                    "merges": merged,
                    "usage": used,
                    "nearest": near,
                    "likeness": round(likeness, 3),
                }
                for source, merged, used, (near, likeness) in zip(
                    sources, merges, usage, self._nearest if usage else (), strict=True
                )
            ],
            "strongest": [
                {
                    "position": at,
                    "similarity": similarity[at],
                    "slot": self._slot[at],
                    "source": self._source[at],
                }
                for at in recalls[:STRONGEST]
            ],
        }

    def _slots(self) -> "tuple[array[int], array[int]]":
        return self._commits[-1][2:] if self._commits else (array("i"), array("i"))

    def _go_to(self, position: int, letter: str) -> None:
        """Forget what was read from ``position`` on (a request preempted begins anew), or say of
        what is missing before it that it was not read here.
        """
        missing = position - len(self)
        if missing < 0:
            for column in (self._kinds, self._similarity, self._slot, self._source):
                del column[position:]
            while self._commits and self._commits[-1][0] > position:
                self._slots_kept -= self._commits.pop()[1].valid
                self._nearest = [(_UNKNOWN, 0.0)] * len(self._slots()[0])
        elif missing:
            self._kinds.extend(letter.encode() * missing)
            self._similarity.extend([0.0] * missing)
            self._slot.extend([_UNKNOWN] * missing)
            self._source.extend([_UNKNOWN] * missing)

    def _commit(self, done: Committed, rules: MemoryRules) -> None:
        end = len(self)
        asked = (at for at in range(end - rules.segment_size, end) if chr(self._kinds[at]) in "le")
        sources, merges = (column[:] for column in self._slots())
        # Of a bank from the prefix cache it is not known here whose tokens it holds.
        unknown = done.valid - len(sources)
        sources.extend([_UNKNOWN] * unknown)
        merges.extend([0] * unknown)
        for slot in done.merged:
            merges[slot] += 1
        for slot in _in_order(done):
            sources[slot], merges[slot] = next(asked, _UNKNOWN), 0
        self._commits.append((end, done, sources, merges))
        self._slots_kept += done.valid


class LayerExperts:
    """Which of K experts each token of one request computed in one layer, by position."""

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts
        # Whole bytes for each token; no bit where it was not read here.
        self._bits = bytearray()
        self._width = -(-num_experts // 8)

    def size(self) -> int:
        """In tokens of a :class:`LayerAnswer`, by how much memory it takes."""
        return -(-len(self._bits) // 16)

    def read(self, position: int, chosen: torch.Tensor) -> int:
        """As :meth:`LayerAnswer.read`, ``chosen`` [n, K] bool."""
        before = self.size()
        begin = position * self._width
        del self._bits[begin:]
        self._bits.extend(bytes(begin - len(self._bits)))
        self._bits.extend(np.packbits(chosen.numpy(), axis=1).tobytes())
        return self.size() - before

    def report(self) -> dict[str, Any]:
        """``num_experts``; ``tokens`` that computed each; ``chosen``, hexadecimal digits, as many
        for each token as hold K bits, the first expert's the highest, and 0 where it was not read.
        """
        rows = np.frombuffer(self._bits, dtype=np.uint8).reshape(-1, self._width)
        tokens = np.unpackbits(rows, axis=1, count=self._num_experts).sum(axis=0)
        return {
            "num_experts": self._num_experts,
            "tokens": tokens.tolist(),
            "chosen": self._bits.hex(),
        }


def _in_order(done: Committed) -> Iterable[int]:
    """The slots that the segment's low tokens went into, the first token's first."""
    return [*range(done.valid - done.filled, done.valid), *done.replaced]


def _kind(mean_top: float, rules: MemoryRules) -> str:
    if mean_top == float("-inf"):
        return "e"
    return (rules.kind(mean_top) or "unsound")[0]
