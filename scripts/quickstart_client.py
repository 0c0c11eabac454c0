"""Ask a running server about a long text, and print the answer and what the memory did.

python scripts/quickstart_client.py http://127.0.0.1:8000 DOCUMENT
"""

import sys
from pathlib import Path

import requests
from openai import OpenAI

QUESTION = "Who may use this software, and under which conditions?"
COLUMNS = ("high", "mid", "low", "commits", "slots_last", "bank_size")


def main(url: str, document: str) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=300)
    model = client.models.list().data[0].id
    content = f"{Path(document).read_text()}\n\n{QUESTION}"
    reply = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": content}],
        max_tokens=48,
        temperature=0,
    )
    usage = reply.usage
    print(f"\nAsked about {document}: {usage.prompt_tokens} tokens. The model is random, so its")
    print(f"answer is noise ({usage.completion_tokens} tokens):\n")
    print(f"    {reply.choices[0].message.content!r}\n")

    answer = requests.get(f"{url}/plugins/pacellm/memory", timeout=60)
    answer.raise_for_status()
    report = answer.json()
    print("What the memory did (tokens by what their look-up asked for, commits, slots in use):\n")
    names = ("layer", "preset", *COLUMNS[:4], "slots", "of")
    print("    " + "".join(f"{name:>10}" for name in names))
    for layer, counts in report["layers"].items():
        cells = (layer, counts["preset"], *(counts[name] for name in COLUMNS))
        print("    " + "".join(f"{cell:>10}" for cell in cells))
    if not report["active"]:
        sys.exit("no memory is active on this server")


if __name__ == "__main__":
    main(*sys.argv[1:])
