"""EngineCase: one random engine and its requests, a function of a seed."""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from checkpoints import make_prompt

# Name: family in tests/checkpoints.py, and what is different about this one.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {"num_hidden_layers": 2}),
    "qwen3": ("qwen3", {"num_hidden_layers": 2}),
    "llama": ("llama", {"num_hidden_layers": 3}),
    "gemma3": ("gemma3_text", {}),
    # One full layer and five that keep a window: vLLM makes six groups of attention.
    "gemma3, six groups": (
        "gemma3_text",
        {"num_hidden_layers": 6, "layer_types": ["sliding_attention"] * 5 + ["full_attention"]},
    ),
    "granite_swa": ("granite_swa", {}),
    "exaone4": ("exaone4", {}),
}
LAYERS = {"qwen2": 2, "qwen3": 2, "llama": 3, "gemma3, six groups": 6}
WINDOWS = {"gemma3", "gemma3, six groups", "granite_swa", "exaone4"}
# Whose embeddings enter the first layer as they are, and whose FFNs take the adapter.
PLAIN = ("qwen2", "llama")

RELATIONS = ("bank above segment", "bank equals segment", "bank below segment", "bank of one")
PRESETS = ("gentle", "official", "paper")
POOLS = ("pool just enough", "pool tight", "pool of two", "pool plenty")
LONGEST_SEGMENT, LARGEST_BANK = 192, 224
# Steps that one engine's prompts may take, so that tiny chunks go with few tokens.
PROMPT_STEPS = 90


@dataclass(frozen=True)
class Turn:
    """New tokens of a request, and what it asks for them; only a session has more than one.

    ``extra`` is what the request says (``extra_args``), ``overrides`` what that means: settings
    of the memory, or ``{"layers": ()}`` for none.
    """

    tokens: tuple[int, ...]
    max_tokens: int
    extra: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RequestCase:
    """One request.

    ``arrives`` counts steps from the start of its wave, ``abort_after`` steps from there.
    ``follows`` names an earlier request, whose prompt and answer come before the tokens here.
    ``eager`` sessions send their next turn without waiting for the answer.
    """

    name: str
    turns: tuple[Turn, ...]
    arrives: int
    follows: str | None = None
    abort_after: int | None = None
    priority: int = 0
    temperature: float = 0.0
    n: int = 1
    salt: str | None = None
    embeddings: bool = False
    prompt_logprobs: bool = False
    eager: bool = False

    @property
    def is_session(self) -> bool:
        return len(self.turns) > 1


@dataclass(frozen=True)
class Wave:
    """Requests that meet; the engine is idle before and after.

    ``reset_at`` is a step at which the prefix cache is thrown away under them.
    """

    requests: tuple[RequestCase, ...]
    reset_at: int | None = None


@dataclass(frozen=True)
class EngineCase:
    """An engine and what it is asked: ``settings`` are arguments of vLLM's ``LLM``."""

    seed: int
    architecture: str
    pace: dict[str, Any]
    settings: dict[str, Any]
    pool: str
    waves: tuple[Wave, ...]
    asynchronous: bool = False
    lora: bool = False
    drafts: int = 0
    events: bool = False
    poisoned: bool = False

    @property
    def caching(self) -> bool:
        return bool(self.settings["enable_prefix_caching"])

    def requests(self) -> Iterator[RequestCase]:
        for wave in self.waves:
            yield from wave.requests

    def features(self) -> set[str]:
        """What this case tries, by the names of FEATURES."""
        size, bank = self.pace["segment_size"], self.pace["bank_size"]
        insertions, chunk = self.pace["max_insertions"], self.settings["max_num_batched_tokens"]
        longest = max(len(turn.tokens) for request in self.requests() for turn in request.turns)
        found = {
            self.architecture,
            self.pace["preset"],
            _relation(bank, size),
            self.pool,
            f"blocks of {self.settings['block_size']}",
            "caching" if self.caching else "no caching",
        }
        flags = {
            "windows": self.architecture in WINDOWS,
            "no insertions": insertions == 0,
            "insertions of a whole bank": insertions == bank,
            "top-k above the bank": self.pace["top_k"] > bank,
            "no negative slots": self.pace["negative_k"] == 0,
            "chunk below a segment": chunk < size,
            "chunk above every prompt": chunk > longest,
            "tiny chunk": chunk <= 24,
            "one at a time": self.settings["max_num_seqs"] == 1,
            "asynchronous": self.asynchronous,
            "priorities": self.settings.get("scheduling_policy") == "priority",
            "adapter": self.lora,
            "drafts": self.drafts > 0,
            "events": self.events,
            "poisoned": self.poisoned,
            "bank above segment, caching": self.caching and bank > size,
            "reset": any(wave.reset_at is not None for wave in self.waves),
        }
        for request in self.requests():
            first = request.turns[0]
            flags |= {
                name: True
                for name, holds in {
                    "session": request.is_session,
                    "eager session": request.eager,
                    "session, asynchronous": request.is_session and self.asynchronous,
                    "aborted": request.abort_after is not None,
                    "several answers": request.n > 1,
                    "sampled": request.temperature > 0,
                    "embeddings": request.embeddings,
                    "salt": request.salt is not None,
                    "prompt logprobs": request.prompt_logprobs,
                    "conversation": request.follows is not None,
                    "own alpha": "alpha" in first.overrides,
                    "own noise": "noise" in first.overrides,
                    "own thresholds": "theta_low" in first.overrides,
                    "memory off": "layers" in first.overrides,
                    "full reports": "kv_cache_report_mode" in first.extra,
                    "longest possible": len(first.tokens) + first.max_tokens
                    >= self.settings["max_model_len"],
                }.items()
                if holds
            }
        prompts = Counter(request.turns[0].tokens for request in self.requests())
        flags["repeated prompt"] = max(prompts.values()) > 1
        return found | {name for name, holds in flags.items() if holds}

    def describe(self) -> str:
        """One line about this engine."""
        kinds = {
            "asynchronous": self.asynchronous,
            "adapter": self.lora,
            f"{self.drafts} drafts": self.drafts > 0,
            "events": self.events,
            "priorities": "scheduling_policy" in self.settings,
        }
        extras = "".join(f", {name}" for name, holds in kinds.items() if holds)
        pace, settings = self.pace, self.settings
        return (
            f"{self.architecture}, {pace['preset']}, segment {pace['segment_size']}, bank "
            f"{pace['bank_size']}, blocks of {settings['block_size']}, chunks of "
            f"{settings['max_num_batched_tokens']}, {self.pool}, "
            f"{'caching' if self.caching else 'no caching'}{extras}"
        )


FEATURES = frozenset(
    {
        *ARCHITECTURES,
        *PRESETS,
        *RELATIONS,
        *POOLS,
        *(f"blocks of {size}" for size in (16, 32, 48, 64)),
        "caching",
        "no caching",
        "windows",
        "no insertions",
        "insertions of a whole bank",
        "top-k above the bank",
        "no negative slots",
        "chunk below a segment",
        "chunk above every prompt",
        "tiny chunk",
        "one at a time",
        "asynchronous",
        "priorities",
        "adapter",
        "drafts",
        "events",
        "poisoned",
        "bank above segment, caching",
        "reset",
        "session",
        "eager session",
        "session, asynchronous",
        "aborted",
        "several answers",
        "sampled",
        "embeddings",
        "salt",
        "prompt logprobs",
        "conversation",
        "own alpha",
        "own noise",
        "own thresholds",
        "memory off",
        "full reports",
        "longest possible",
        "repeated prompt",
    }
)


def make_case(seed: int) -> EngineCase:
    """The engine of ``seed``."""
    rng = random.Random(seed)
    architecture = rng.choice(list(ARCHITECTURES))
    caching = rng.random() < 0.8
    block = rng.choice([16, 16, 16, 32, 48, 64])
    pace = _pace(rng, architecture, block if caching else None)
    longest = max(rng.choice([128, 192, 256, 384, 512]), min(2 * pace["segment_size"] + 64, 512))
    seqs = rng.choice([1, 2, 3, 4, 8])
    chunk = rng.choice(
        [
            rng.randint(max(seqs, 6), 24),
            rng.randint(24, 100),
            pace["segment_size"] + rng.randint(-1, 1),
            80,
            128,
            longest,
            2048,
        ]
    )
    settings: dict[str, Any] = {
        "enable_prefix_caching": caching,
        "block_size": block,
        "max_model_len": longest,
        "max_num_seqs": seqs,
        "max_num_batched_tokens": max(chunk, seqs, 6),
    }
    if rng.random() < 0.2:
        settings["scheduling_policy"] = "priority"
    asynchronous = rng.random() < 0.35
    lora = architecture in PLAIN and rng.random() < 0.25
    embeddings = architecture in PLAIN and not lora and rng.random() < 0.4
    drafts = rng.choice([1, 3, 5]) if rng.random() < 0.25 and not embeddings else 0
    case = EngineCase(
        seed=seed,
        architecture=architecture,
        pace=pace,
        settings=settings,
        pool=rng.choice(POOLS),
        waves=(),
        # A bank must know how many drafts were accepted: refused together.
        asynchronous=asynchronous and not drafts,
        lora=lora,
        drafts=drafts,
        events=caching and rng.random() < 0.25,
        poisoned=rng.random() < 0.6,
    )
    return _Requests(case, rng, embeddings).added()


def _pace(rng: random.Random, architecture: str, block: int | None) -> dict[str, Any]:
    """What one writes in ``{"pacellm": ...}``; segments are multiples of ``block`` if it is one."""
    if block:
        most = LONGEST_SEGMENT // block
        size = block * min(rng.choice([1, 1, 2, 2, 3, 4, 6]), most)
    else:
        size = rng.choice([1, 2, 5, 16, 32, 33, 50, 64, 100, 150])
    relation = rng.choice(RELATIONS)
    if relation == "bank above segment":
        bank = rng.randint(size + 1, min(3 * size + 8, LARGEST_BANK))
    elif relation == "bank equals segment":
        bank = size
    elif relation == "bank below segment":
        bank = rng.randint(min(2, size), max(size - 1, 1))
    else:
        bank = 1
    layers = rng.sample(range(LAYERS.get(architecture, 4)), rng.choice([1, 2, 2]))
    pace: dict[str, Any] = {
        "layers": sorted(layers),
        "preset": rng.choice(PRESETS),
        "segment_size": size,
        "bank_size": bank,
        "max_insertions": rng.choice([0, rng.randint(0, bank), min(5, bank), bank]),
        "top_k": rng.choice([1, 3, 5, 5, 9]),
        "negative_k": rng.choice([0, 2, 2, 4]),
    }
    if rng.random() < 0.3:
        pace["alpha"] = round(rng.uniform(0.1, 1), 2)
    elif pace["preset"] == "gentle":
        # With its own a wrong bank may not show.
        pace["alpha"] = 0.1
    return pace


def _relation(bank: int, size: int) -> str:
    above, equal, below, one = RELATIONS
    if bank == 1:
        return one
    return above if bank > size else equal if bank == size else below


class _Requests:
    """Puts requests into an engine."""

    def __init__(self, case: EngineCase, rng: random.Random, embeddings: bool) -> None:
        self._case, self._rng, self._embeddings = case, rng, embeddings
        self._longest: int = case.settings["max_model_len"]
        self._segment: int = case.pace["segment_size"]
        self._roots = [make_prompt(rng.randrange(1 << 30), self._longest) for _ in range(2)]
        self._settings = [self._some_settings() for _ in range(2)]
        self._before: list[RequestCase] = []
        steps = case.settings["max_num_batched_tokens"] * PROMPT_STEPS
        # Every segment costs a commit.
        self._budget = min(steps, 2000, 200 + 40 * self._segment)
        # Sessions hold their blocks while they wait for a turn, so vLLM lets two of them wait for
        # each other for ever where both do not fit.
        at_once = 4 if case.pool == "pool plenty" else 1
        self._sessions_at_once = at_once if rng.random() < 0.3 else 0
        self._sessions_left = 0
        self._count = 0

    def added(self) -> EngineCase:
        rng = self._rng
        total, waves = rng.randint(6, 15), []
        number = rng.choice([2, 3, 3, 4])
        for index in range(number):
            share = max(total // number, 1)
            self._sessions_left = self._sessions_at_once
            requests = [self._request(index) for _ in range(share)]
            reset = rng.randint(0, 25) if rng.random() < 0.1 else None
            if any(request.is_session for request in requests):
                # vLLM cannot preempt a session that waits for its next turn.
                reset = None
            waves.append(Wave(tuple(requests), reset))
            self._before += requests
        return EngineCase(**{**vars(self._case), "waves": tuple(waves)})

    def _request(self, wave: int) -> RequestCase:
        rng = self._rng
        name = f"r{self._count}"
        self._count += 1
        plain = dict(rng.choice(self._settings)) if rng.random() < 0.5 else {}
        settings = _spelled(plain, rng)
        if self._case.events and rng.random() < 0.5:
            settings["extra"]["kv_cache_report_mode"] = "full"
        common: dict[str, Any] = {
            "arrives": 0 if rng.random() < 0.4 else rng.randint(0, 20),
            "abort_after": rng.randint(0, 25) if rng.random() < 0.1 else None,
            "priority": rng.randint(-2, 2) if "scheduling_policy" in self._case.settings else 0,
            "salt": "salt" if rng.random() < 0.08 else None,
        }
        if self._sessions_left and rng.random() < 0.35:
            self._sessions_left -= 1
            return self._session(name, settings, common)
        max_tokens = rng.choice([1, 2, rng.randint(3, 12), rng.randint(10, 40)])
        follows, tokens = None, self._prompt(wave, max_tokens)
        old = [request for request in self._before if not request.is_session and request.n == 1]
        if wave and old and rng.random() < 0.2:
            follows, tokens = rng.choice(old).name, tokens[: rng.randint(1, 40)]
        elif wave and old and rng.random() < 0.4:
            # The same again, mostly with the same settings too.
            again = rng.choice(old).turns[0]
            tokens = again.tokens
            max_tokens = max(1, min(max_tokens, self._longest - len(tokens)))
            if rng.random() < 0.7:
                settings = {"extra": again.extra, "overrides": again.overrides}
        sampled = not self._case.drafts and rng.random() < 0.15
        embeddings = self._embeddings and follows is None and rng.random() < 0.4
        return RequestCase(
            name=name,
            turns=(Turn(tokens, max_tokens, **settings),),
            follows=follows,
            temperature=1.0 if sampled else 0.0,
            n=rng.choice([1, 2, 3]) if sampled else 1,
            embeddings=embeddings,
            # vLLM's own CPU engines do not survive these together with an adapter.
            prompt_logprobs=not (embeddings or self._case.lora) and rng.random() < 0.12,
            **common,
        )

    def _prompt(self, wave: int, max_tokens: int) -> tuple[int, ...]:
        rng, most = self._rng, self._longest - max_tokens
        kind = rng.random()
        if kind < 0.15:
            length = most
        elif kind < 0.45:
            ends = range(self._segment, most + 1, self._segment)
            length = (rng.choice(ends) if ends else most) + rng.randint(-1, 1)
        else:
            length = rng.randint(2, min(most, max(self._segment * 5, 60)))
        if length > self._budget:
            length = rng.randint(2, max(self._segment + 2, 12))
        length = max(2, min(length, most))
        self._budget -= length
        root, cut = rng.choice(self._roots), length
        if rng.random() < 0.5:
            cut = rng.randint(0, length)
        tail = make_prompt(rng.randrange(1 << 30), self._longest)
        return tuple(root[:cut] + tail[: length - cut])

    def _session(self, name: str, settings: dict[str, Any], common: dict[str, Any]) -> RequestCase:
        rng = self._rng
        number = rng.randint(2, 4)
        room = self._longest // number
        turns = []
        for index in range(number):
            answer = rng.randint(1, max(min(20, room // 3), 1))
            length = rng.randint(2, max(min(room - answer - 1, 3 * self._segment), 2))
            tokens = make_prompt(rng.randrange(1 << 30), length)
            if index == 0 and rng.random() < 0.6:
                tokens = rng.choice(self._roots)[:length]
            self._budget -= length
            turns.append(Turn(tuple(tokens), answer, **settings))
        return RequestCase(name, tuple(turns), eager=rng.random() < 0.4, **common)

    def _some_settings(self) -> dict[str, Any]:
        rng = self._rng
        return rng.choice(
            [
                {"alpha": round(rng.uniform(0, 1), 2)},
                {"noise": round(rng.uniform(0, 1), 2), "alpha": 0.7},
                {"theta_high": 0.9, "theta_low": round(rng.uniform(-0.5, 0.6), 2)},
                {"enabled": False},
            ]
        )


def _spelled(plain: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """``extra`` and ``overrides`` of settings, in one of the two ways to say them."""
    flat = {f"pacellm_{name}": value for name, value in plain.items()}
    extra = flat if rng.random() < 0.5 or not plain else {"pacellm": dict(plain)}
    overrides = {"layers": ()} if plain.get("enabled") is False else plain
    return {"extra": dict(extra), "overrides": dict(overrides)}
