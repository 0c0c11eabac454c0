"""Ask a running server about a text, with memory on and off, and print what the memory did.

    python scripts/quickstart_client.py http://127.0.0.1:8000 license|numbers

``license`` is this repository's, with two numbers hidden in it, for models that answer questions;
``numbers`` are sentences of what ``scripts/tiny`` was trained on.
"""

import random
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import requests
from openai import OpenAI

from pacellm_vllm.evals.text import NEEDLE, QUESTION, sentences

COLUMNS = ("high", "mid", "low", "commits", "slots_last", "bank_size")
OFF = {"pacellm_enabled": False}
RECALLS = 5


def hide(parts: list[str], hidden: dict[str, str], seed: int = 0) -> list[str]:
    """``parts`` of a text with a sentence for each number between them."""
    rng = random.Random(seed)
    for key, value in hidden.items():
        parts.insert(rng.randrange(len(parts)), NEEDLE.format(key=key, value=value))
    return parts


def licence() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Questions, prompts, and settings of sampling."""
    parts = (Path(__file__).parent.parent / "LICENSE").read_text().split("\n\n")
    text = "\n\n".join(hide(parts, {"Oslo": "18", "Lima": "93"}))
    for question in (
        "What is the name of this license?",
        "Is there any warranty?",
        "What is the magic number of Oslo?",
        "What is the magic number of Lima?",
    ):
        prompt = f"{text}\n\nQuestion: {question}\nAnswer:"
        yield question, prompt, {"max_tokens": 16, "stop": ["\n"]}


def numbers() -> Iterator[tuple[str, str, dict[str, Any]]]:
    parts = hide(list(islice(sentences(random.Random(0)), 36)), {"Rome": "47", "Oslo": "18"})
    for key in ("Rome", "Oslo"):
        question = QUESTION.format(key=key)
        yield question, " ".join([*parts, question]), {"max_tokens": 1}


def main(url: str, about: str) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600)
    model = client.models.list().data[0].id

    def ask(prompt: str, own: dict[str, bool], **sampling: Any) -> tuple[str, str, int]:
        reply = client.completions.create(
            model=model,
            prompt=prompt,
            temperature=0,
            extra_body={"vllm_xargs": own},
            **sampling,
        )
        return reply.choices[0].text, reply.id, reply.usage.prompt_tokens

    first = None
    print()
    for question, prompt, sampling in {"license": licence, "numbers": numbers}[about]():
        said, answer_id, tokens = ask(prompt, {"pacellm_report": True}, **sampling)
        # The next ones find most of the text, and its bank, in the prefix cache.
        first = first or (prompt + said, answer_id, tokens)
        without, *_ = ask(prompt, OFF, **sampling)
        print(f"    {question}  ({tokens} tokens read)")
        print(f"        memory on:  {said.strip()}\n        memory off: {without.strip()}")
    show_counts(get(f"{url}/plugins/pacellm/memory"))
    assert first is not None
    read, answer_id, tokens = first
    written = requests.post(
        f"{url}/tokenize",
        json={"prompt": read, "return_token_strs": True},
        timeout=60,
    ).json()["token_strs"]
    show_recalls(get(f"{url}/plugins/pacellm/answers/{answer_id}?first={tokens - 1}"), written)


def get(url: str) -> dict[str, Any]:
    answer = requests.get(url, timeout=60)
    answer.raise_for_status()
    return answer.json()


def show_counts(report: dict[str, Any]) -> None:
    print("\nWhat the memory did, in tokens by what their look-up asked for:\n")
    names = ("layer", "preset", *COLUMNS[:4], "slots", "of")
    print("    " + "".join(f"{name:>10}" for name in names))
    for layer, counts in report["layers"].items():
        cells = (layer, counts["preset"], *(counts[name] for name in COLUMNS))
        print("    " + "".join(f"{cell:>10}" for cell in cells))
    if not report["active"]:
        sys.exit("no memory is active on this server")


def show_recalls(answer: dict[str, Any], written: list[str]) -> None:
    """The strongest ones behind an answer's tokens; the first of these ends the prompt."""
    layer, report = max(answer["layers"].items(), key=lambda pair: int(pair[0]))
    # What ended the answer is not in its text.
    known = (r for r in report["strongest"] if r["source"] >= 0 and r["position"] < len(written))
    recalls = list(islice(known, RECALLS))
    if recalls:
        print(f"\nWhat the first answer's tokens were most like, in layer {layer}:\n")
    for recall in recalls:
        now, then = (written[recall[name]].replace("Ġ", " ") for name in ("position", "source"))
        print(
            f"    {now!r} at {recall['position']} recalled {then!r} at {recall['source']} "
            f"(similarity {recall['similarity']:.2f})"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
