"""Hostile: requests that a server has to refuse in a short sentence, or to answer, and survive."""

import json
from dataclasses import dataclass
from typing import Any

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LONGEST_ANSWER = 4096


@dataclass(frozen=True)
class Hostile:
    """``refused``: only a 4xx is right. Otherwise any answer that is no server error is."""

    name: str
    path: str
    body: bytes
    refused: bool = True

    def wrong(self, status: int, answer: bytes) -> str | None:
        """What is wrong with an answer, in a few words."""
        if status >= 500:
            return f"{status} for {self.name}"
        if self.refused and not 400 <= status < 500:
            return f"{status} for {self.name}"
        if status >= 400 and len(answer) > LONGEST_ANSWER:
            return f"{len(answer)} bytes of refusal for {self.name}"
        return None


def _completion(**fields: Any) -> bytes:
    body = {"model": "tiny", "prompt": "The old farmer", "max_tokens": 4, **fields}
    return json.dumps(body).encode()


def _settings(name: str, settings: dict[str, Any]) -> Hostile:
    return Hostile(name, COMPLETIONS, _completion(vllm_xargs=settings))


HOSTILE = (
    _settings("alpha = 3", {"pacellm_alpha": 3}),
    _settings("alpha = true", {"pacellm_alpha": True}),
    _settings("alpha = NaN", {"pacellm_alpha": "nan"}),
    _settings("pacellm-alpha", {"pacellm-alpha": 0.5}),
    _settings("pacellm.alpha", {"pacellm.alpha": 0.5}),
    _settings("PACELLM_alpha", {"PACELLM_alpha": 0.5}),
    _settings("a field of the engine's", {"pacellm_bank_size": 5}),
    _settings("one threshold", {"pacellm_theta_low": 0.2}),
    _settings("thresholds the wrong way", {"pacellm_theta_low": 0.5, "pacellm_theta_high": 0.1}),
    _settings("text that is no object", {"pacellm": "alpha"}),
    _settings("deep brackets", {"pacellm": "[" * 100_000}),
    _settings("deep braces", {"pacellm": '{"alpha":' * 20_000}),
    _settings("a megabyte", {"pacellm_alpha": "9" * (1 << 20)}),
    _settings("a name of a megabyte", {"pacellm_" + "a" * (1 << 20): 1}),
    Hostile("malformed JSON", COMPLETIONS, b'{"model": "tiny", "prompt": '),
    Hostile("no JSON", CHAT, b"\x00\xff\xfe"),
    Hostile("an empty body", COMPLETIONS, b""),
    Hostile("a list", COMPLETIONS, b"[]"),
    Hostile("no messages", CHAT, b'{"model": "tiny"}'),
    Hostile("tokens out of the vocabulary", COMPLETIONS, _completion(prompt=[10**6])),
    Hostile("a prompt too long", COMPLETIONS, _completion(prompt=[7] * 5000)),
    Hostile("negative max_tokens", COMPLETIONS, _completion(max_tokens=-1)),
    Hostile("n = 0", COMPLETIONS, _completion(n=0)),
    Hostile("bias out of the vocabulary", COMPLETIONS, _completion(logit_bias={"99999": 1})),
    Hostile("an empty prompt", COMPLETIONS, _completion(prompt=""), refused=False),
    Hostile("no prompts", COMPLETIONS, _completion(prompt=[]), refused=False),
    Hostile("an empty list of tokens", COMPLETIONS, _completion(prompt=[[]]), refused=False),
    Hostile("echo alone", COMPLETIONS, _completion(echo=True, max_tokens=0), refused=False),
    Hostile("a seed", COMPLETIONS, _completion(seed=1, temperature=1.0), refused=False),
)
