"""What a session costs a request: by how much it waits longer, against the plain request.

    python scripts/bench_sessions.py MODEL --text FILE [--tokens 1000,10000,100000] [--rounds 9]

Each round asks one question after another in the same engine: plain, in a session of which nothing
is read, in one of which something always is, and plain with the prompt that the latter had. Prints
medians and ratios; what is read again costs its own prefill, the rest is looking it up.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from pacellm_vllm.evals.answers import offline_engine
from pacellm_vllm.evals.arguments import add_engine, given, list_of
from pacellm_vllm.sessions.admission import session_key

QUESTION = "What was said about it? Nothing was said of"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True, help="what sessions hold")
    parser.add_argument("--tokens", type=list_of(int, 1), default=(1000, 10_000, 100_000))
    parser.add_argument("--rounds", type=int, default=9)
    add_engine(parser, '{"dtype": "bfloat16"}')
    args = parser.parse_args()
    engine = {"enable_prefix_caching": False, "disable_log_stats": True, **given(args, "engine")}
    memory = {"layers": [], "session_tokens": 2 * sum(args.tokens)}
    with offline_engine(args.model, memory, engine) as llm:
        text = llm.get_tokenizer().encode(args.text.read_text())
        for tokens in args.tokens:
            measure(llm, (text * (tokens // len(text) + 1))[:tokens], args.rounds)


def measure(llm: Any, text: list[int], rounds: int) -> None:
    from vllm import SamplingParams

    name, tokenizer = f"bench {len(text)}", llm.get_tokenizer()
    asked = tokenizer.encode(f"{QUESTION} {tokenizer.decode(text[500:512])}")

    def ask(prompt: list[int], **settings: Any) -> tuple[float, list[int]]:
        own = {f"pacellm_session{key}": value for key, value in settings.items()}
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, extra_args=own)
        begun = time.perf_counter()
        [output] = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        return time.perf_counter() - begun, output.prompt_token_ids

    session: dict[str, Any] = {"": name, "_write": False}
    ask(asked, **{**session, "_write": True})
    reader = llm.llm_engine.input_processor._pacellm_sessions
    begun = time.perf_counter()
    with reader.store.lock:
        reader.store.add(session_key(name, None), text, [])
    kept = time.perf_counter() - begun
    looked, again = [], ask(asked, **session, _read="always")[1]
    times: dict[str, list[float]] = {arm: [] for arm in ("plain", "never", "always", "plain, read")}
    for _ in range(rounds):
        times["plain"].append(ask(asked)[0])
        times["never"].append(ask(asked, **session, _read="never")[0])
        times["always"].append(ask(asked, **session, _read="always")[0])
        times["plain, read"].append(ask(again)[0])
        begun = time.perf_counter()
        with reader.store.lock:
            reader.read(session_key(name, None), asked, 1000, "always")
        looked.append(time.perf_counter() - begun)
    middle = {arm: statistics.median(of) for arm, of in times.items()}
    print(
        f"{len(text)} tokens: kept in {1e3 * kept:.0f} ms, looked up in "
        f"{1e3 * statistics.median(looked):.1f} ms; a request of {len(asked)} tokens and 8 said: "
        + ", ".join(f"{arm} {1e3 * of:.0f} ms" for arm, of in middle.items())
        + f"; never / plain x{middle['never'] / middle['plain']:.3f}, always / plain with the same "
        f"{len(again)} tokens x{middle['always'] / middle['plain, read']:.3f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
