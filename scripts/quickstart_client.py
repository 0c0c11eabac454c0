"""Hide numbers in a text, ask a running server for them, and print what the memory did.

python scripts/quickstart_client.py http://127.0.0.1:8000
"""

import random
import sys
from itertools import islice

import requests
from openai import OpenAI

from pacellm_vllm.evals.text import NEEDLE, QUESTION, sentences

HIDDEN = {"Rome": "47", "Oslo": "18", "Lima": "93"}
SENTENCES = 36
COLUMNS = ("high", "mid", "low", "commits", "slots_last", "bank_size")


def main(url: str) -> None:
    rng = random.Random(0)
    text = list(islice(sentences(rng), SENTENCES))
    for key, value in HIDDEN.items():
        text.insert(rng.randrange(SENTENCES), NEEDLE.format(key=key, value=value))

    client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=300)
    model = client.models.list().data[0].id
    print(f"\n{len(text)} sentences, three with a number in them:\n")
    for key, value in HIDDEN.items():
        prompt = " ".join([*text, QUESTION.format(key=key)])
        reply = client.completions.create(model=model, prompt=prompt, max_tokens=1, temperature=0)
        said, tokens = reply.choices[0].text.strip(), reply.usage.prompt_tokens
        print(f"    {QUESTION.format(key=key)} {said:<10} (hidden: {value}; {tokens} tokens read)")

    answer = requests.get(f"{url}/plugins/pacellm/memory", timeout=60)
    answer.raise_for_status()
    report = answer.json()
    print(
        "\nWhat the memory did (tokens by what their look-up asked for, commits, slots in use):\n"
    )
    names = ("layer", "preset", *COLUMNS[:4], "slots", "of")
    print("    " + "".join(f"{name:>10}" for name in names))
    for layer, counts in report["layers"].items():
        cells = (layer, counts["preset"], *(counts[name] for name in COLUMNS))
        print("    " + "".join(f"{cell:>10}" for cell in cells))
    if not report["active"]:
        sys.exit("no memory is active on this server")


if __name__ == "__main__":
    main(*sys.argv[1:])
