"""What looking costs: a server under load, by turns with reports and a scraper and without.

    python scripts/bench_operating.py --url http://127.0.0.1:8000 --pid PID

Every round sends the same number of requests, none of which finds anything in the prefix cache,
from several threads. With looking on, each asks for a report, which others read, while ``/metrics``
is read every second; with it off, nothing of it happens. Prints ratios to off, of seconds and of
the processor time that the process PID and its children took: medians and quartiles over rounds.
"""

import argparse
import random
import statistics
import threading
import time
from concurrent.futures import Executor, ThreadPoolExecutor

import psutil
import requests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=1000, help="of a prompt")
    parser.add_argument("--answer", type=int, default=50, help="tokens of an answer")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--url", required=True, help="of a running server of this model")
    parser.add_argument("--pid", type=int, required=True, help="of that server")
    args = parser.parse_args()
    name = requests.get(f"{args.url}/v1/models", timeout=60).json()["data"][0]["id"]

    def ask(seed: int, reading: Executor | None) -> None:
        rng = random.Random(seed)
        body = {
            "model": name,
            "prompt": [rng.randrange(256) for _ in range(args.tokens)],
            "max_tokens": args.answer,
            "ignore_eos": True,
            **({"vllm_xargs": {"pacellm_report": True}} if reading else {}),
        }
        answer = requests.post(f"{args.url}/v1/completions", json=body, timeout=600)
        answer.raise_for_status()
        if reading:
            reading.submit(read, answer.json()["id"])

    def read(name: str) -> None:
        url = f"{args.url}/plugins/pacellm/answers/{name}"
        requests.get(url, timeout=600).raise_for_status()

    seeds = iter(range(1_000_000))
    server = psutil.Process(args.pid)

    def processor() -> float:
        times = [one.cpu_times() for one in (server, *server.children(recursive=True))]
        return sum(each.user + each.system for each in times)

    def measure(reports: bool, scrapes: bool) -> tuple[float, float]:
        done = threading.Event()

        def scrape() -> None:
            while not done.wait(1.0):
                requests.get(f"{args.url}/metrics", timeout=60).raise_for_status()

        watcher = threading.Thread(target=scrape) if scrapes else None
        some = [next(seeds) for _ in range(args.requests)]
        begun, before = time.perf_counter(), processor()
        if watcher:
            watcher.start()
        with ThreadPoolExecutor(args.threads) as reading, ThreadPoolExecutor(args.threads) as pool:
            list(pool.map(ask, some, [reading if reports else None] * len(some)))
        took = time.perf_counter() - begun, processor() - before
        done.set()
        if watcher:
            watcher.join()
        return took

    arms = {"off": (False, False), "scraped": (False, True), "and reported": (True, True)}
    measure(True, True)
    print(f"| {' | '.join(f'{arm}, s | processor, s' for arm in arms)} |")
    print("|---" * 2 * len(arms) + "|")
    ratios: list[list[float]] = []
    for _ in range(args.rounds):
        # Begun by another one each time: what drifts within a round is not always the same arm's.
        turn = random.sample(list(arms), len(arms))
        took = {arm: measure(*arms[arm]) for arm in turn}
        row = " | ".join(f"{took[arm][0]:.2f} | {took[arm][1]:.2f}" for arm in arms)
        print(f"| {row} |", flush=True)
        ratios.append([took[arm][i] / took["off"][i] for arm in arms for i in (0, 1)])
    quartiles = [statistics.quantiles(column, n=4) for column in zip(*ratios, strict=True)]
    last = " | ".join(f"x{mid:.3f} ({low:.3f} to {high:.3f})" for low, mid, high in quartiles)
    print(f"| {last} |")


if __name__ == "__main__":
    main()
