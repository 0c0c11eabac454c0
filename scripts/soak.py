"""Keeps a real server under mixed load and says what went wrong: answers, blocks, memory.

    python scripts/soak.py --minutes 60 --json soak.json

A server on the tiny model, with a small segment, prefix caching and so few blocks that it
preempts, gets completions, chat and streams from several clients, some of which hang up, send
nonsense, or are killed. Sampled requests must be answered as the oracle does. In the first third of
the time the server is ended and started again every ``--restart-minutes``, by turns asked to
(SIGTERM) and killed under load; the rest is one life, whose resident memory may not grow after its
first ten minutes. Whenever nothing is asked of it, no block may be in use.

Ends in a table; the exit code is 1 when anything is wrong. Ctrl-C ends it early, with the table.
"""

import argparse
import contextlib
import json
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from soaking.load import Load
from soaking.samples import make_samples, make_texts
from soaking.server import STOP_SECONDS, Server
from soaking.tally import Tally

PACE: dict[str, Any] = {
    "layers": [1, 3],
    "preset": "official",
    "bank_size": 100,
    "segment_size": 64,
    "max_insertions": 16,
}
MEMORY_SECONDS, QUIET_SECONDS = 10.0, 60.0
COUNTERS = {
    "vllm:num_preemptions_total": "preemptions",
    "vllm:prefix_cache_hits_total": "tokens hit in the prefix cache",
    "vllm:prompt_tokens_total": "prompt tokens",
    "vllm:generation_tokens_total": "generated tokens",
}


class Soak:
    """The run: watches memory, restarts the server, looks for lost blocks."""

    def __init__(self, args: argparse.Namespace, server: Server, load: Load, tally: Tally) -> None:
        self._args, self._server, self._load, self._tally = args, server, load, tally
        self._seen: dict[str, float] = {}
        self._noting = threading.Lock()
        self._ended = threading.Event()

    def run(self) -> None:
        begun = time.monotonic()
        end = begun + 60 * self._args.minutes
        every = 60 * self._args.restart_minutes
        restarts = _times(begun, every, (end - begun) / 3)
        quiet = begun + every
        watch = threading.Thread(target=self._watch, args=(begun,), daemon=True)
        watch.start()
        self._load.start()
        asked = True
        try:
            while time.monotonic() < end:
                time.sleep(0.5)
                if self._server.died():
                    self._tally.fail("servers that died")
                    self._restart(signal.SIGKILL)
                elif restarts and time.monotonic() > restarts[0]:
                    restarts.pop(0)
                    self._restart(signal.SIGTERM if asked else signal.SIGKILL)
                    asked = not asked
                elif time.monotonic() > quiet:
                    quiet = time.monotonic() + every
                    self._look_for_blocks()
                    self._load.resume()
            self._look_for_blocks()
        finally:
            self._ended.set()
            self._load.stop()

    def _restart(self, how: signal.Signals) -> None:
        self._note_counters()
        _end(self._server, how, self._tally)
        with self._noting:
            self._seen = {}
        self._tally.count(f"restarts after {how.name}")
        self._server.start()

    def _look_for_blocks(self) -> None:
        """With nothing asked of it any more, the server gives all blocks back."""
        if not self._load.pause():
            self._tally.fail("requests that never came back")
        deadline = time.monotonic() + QUIET_SECONDS
        used = 1.0
        while used and time.monotonic() < deadline:
            time.sleep(0.5)
            used = self._server.metrics().get("vllm:kv_cache_usage_perc", 0.0)
        self._tally.count("looks for lost blocks")
        self._tally.count("blocks lost", round(used * self._server.blocks))
        self._note_counters()
        if not self._server.healthy():
            self._tally.fail("no answer from /health")

    def _note_counters(self) -> None:
        with self._noting, contextlib.suppress(OSError):
            found = self._server.metrics()
            for metric, name in COUNTERS.items():
                self._tally.count(name, int(found.get(metric, 0) - self._seen.get(metric, 0)))
            self._seen = found

    def _watch(self, begun: float) -> None:
        while not self._ended.wait(MEMORY_SECONDS):
            if not self._server.up.is_set():
                continue
            now, size = time.monotonic() - begun, self._server.resident_mb()
            self._tally.resident(self._server.lives, now, size)
            self._note_counters()
            asked, failed = self._tally.requests.total(), self._tally.failures.total()
            print(
                f"{now / 60:6.1f} min  {asked} requests, {failed} failures, "
                f"server {self._server.lives}, {size:.0f} MB",
                flush=True,
            )


def _end(server: Server, how: signal.Signals, tally: Tally) -> None:
    if not server.end(how):
        # vLLM 0.32, without memory too: a front end that has ended its engine may go on waiting for
        # the connections of requests that were in it.
        tally.count(f"servers killed {STOP_SECONDS} s after {how.name}")


def _times(begun: float, every: float, length: float) -> list[float]:
    return [begun + every * i for i in range(1, int(length / every) + 1)]


def main() -> None:
    args = _arguments()
    tally, begun = Tally(), time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as made:
        log = args.log or Path(made) / "server.log"
        print("the oracle answers the sampled requests", flush=True)
        samples = make_samples(args.model, PACE, args.samples, args.seed)
        texts = make_texts(args.model, 40, args.seed + 1)
        server = Server(args.model, PACE, args.blocks, log)
        load = Load(server, tally, samples, texts, args.clients, args.seed)
        try:
            server.start()
            begun = time.monotonic()
            Soak(args, server, load, tally).run()
        except KeyboardInterrupt:
            print("ended early")
        finally:
            _end(server, signal.SIGTERM, tally)
    wrong = tally.verdict(args.growth_mb)
    print("\n" + tally.table((time.monotonic() - begun) / 60))
    if args.json:
        args.json.write_text(json.dumps(tally.as_dict(), indent=1))
    for sentence in wrong:
        print(f"wrong: {sentence}")
    sys.exit(1 if wrong or not tally.requests else 0)


def _arguments() -> argparse.Namespace:
    tiny = Path(__file__).parent / "tiny"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--model", type=Path, default=tiny, help="a checkpoint with a tokenizer")
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--samples", type=int, default=24, help="requests with a known answer")
    parser.add_argument("--blocks", type=int, default=160, help="of the KV cache")
    parser.add_argument("--restart-minutes", type=float, default=5)
    parser.add_argument("--growth-mb", type=float, default=16, help="growth that is a failure")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--log", type=Path, help="where the server's output is kept")
    return parser.parse_args()


if __name__ == "__main__":
    main()
