"""What looking costs: a server under load, by turns with reports and a scraper and without.

    python scripts/bench_operating.py --url http://127.0.0.1:8000

Every round sends the same number of requests, none of which finds anything in the prefix cache,
from several threads. With looking on, each asks for a report and reads it, while ``/metrics`` is
read every second; with it off, nothing of it happens. Prints each pair's ratio of seconds.
"""

import argparse
import random
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import requests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=1000, help="of a prompt")
    parser.add_argument("--answer", type=int, default=50, help="tokens of an answer")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--url", required=True, help="of a running server of this model")
    args = parser.parse_args()
    name = requests.get(f"{args.url}/v1/models", timeout=60).json()["data"][0]["id"]

    def ask(seed: int, report: bool) -> None:
        rng = random.Random(seed)
        body = {
            "model": name,
            "prompt": [rng.randrange(256) for _ in range(args.tokens)],
            "max_tokens": args.answer,
            "ignore_eos": True,
            **({"vllm_xargs": {"pacellm_report": True}} if report else {}),
        }
        answer = requests.post(f"{args.url}/v1/completions", json=body, timeout=600)
        answer.raise_for_status()
        if report:
            url = f"{args.url}/plugins/pacellm/answers/{answer.json()['id']}"
            requests.get(url, timeout=600).raise_for_status()

    seeds = iter(range(1_000_000))

    def seconds(reports: bool, scrapes: bool) -> float:
        done = threading.Event()

        def scrape() -> None:
            while not done.wait(1.0):
                requests.get(f"{args.url}/metrics", timeout=60).raise_for_status()

        watcher = threading.Thread(target=scrape) if scrapes else None
        some = [next(seeds) for _ in range(args.requests)]
        begun = time.perf_counter()
        if watcher:
            watcher.start()
        with ThreadPoolExecutor(args.threads) as pool:
            list(pool.map(ask, some, [reports] * len(some)))
        took = time.perf_counter() - begun
        done.set()
        if watcher:
            watcher.join()
        return took

    seconds(True, True)
    print("| off, s | scraped, s | ratio | scraped and reported, s | ratio |")
    print("|---|---|---|---|---|")
    ratios: list[tuple[float, float]] = []
    for _ in range(args.rounds):
        off, scraped, both = seconds(False, False), seconds(False, True), seconds(True, True)
        ratios.append((scraped / off, both / off))
        print(
            f"| {off:.2f} | {scraped:.2f} | {scraped / off:.3f} | {both:.2f} | {both / off:.3f} |"
        )
    medians = [statistics.median(column) for column in zip(*ratios, strict=True)]
    print(f"| | median | {medians[0]:.3f} | | {medians[1]:.3f} |")


if __name__ == "__main__":
    main()
