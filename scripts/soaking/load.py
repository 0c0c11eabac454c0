"""Load: clients that ask, stream, hang up, lie, and are killed."""

import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import requests

from soaking.hostile import CHAT, COMPLETIONS, HOSTILE
from soaking.samples import Sample
from soaking.server import Server
from soaking.tally import Tally

PATIENCE = 180
# A client on its own that reads a stream until it is killed.
VICTIM = """
import sys, requests
with requests.post(sys.argv[1], data=sys.argv[2], stream=True, timeout=180) as stream:
    for line in stream.iter_lines():
        print(line, flush=True)
"""


class Load:
    """``clients`` threads, each asking one thing after another while ``running``.

    ``paused`` makes them end what they are at and wait.
    """

    def __init__(
        self,
        server: Server,
        tally: Tally,
        samples: list[Sample],
        texts: list[list[int]],
        clients: int,
        seed: int,
    ) -> None:
        self._server, self._tally = server, tally
        self._samples, self._texts = samples, texts
        self._running, self._open = threading.Event(), threading.Event()
        self._busy, self._idle = 0, threading.Condition()
        self._threads = [
            threading.Thread(target=self._client, args=(random.Random(seed * 1000 + i),))
            for i in range(clients)
        ]
        self._kinds: list[tuple[float, str, Callable[[random.Random], None]]] = [
            (4, "sampled", self._sampled),
            (4, "completions", self._completion),
            (3, "chat", self._chat),
            (3, "streams", self._stream),
            (3, "streams hung up", self._hang_up),
            (2, "hostile", self._hostile),
            (0.3, "clients killed", self._killed),
        ]

    def start(self) -> None:
        self._running.set()
        self._open.set()
        for thread in self._threads:
            thread.start()

    def pause(self) -> bool:
        """Let no more requests out; whether all came back in time."""
        self._open.clear()
        with self._idle:
            return self._idle.wait_for(lambda: not self._busy, PATIENCE + 30)

    def resume(self) -> None:
        self._open.set()

    def stop(self) -> None:
        self._running.clear()
        self._open.set()
        self._server.up.set()
        for thread in self._threads:
            thread.join(PATIENCE + 30)

    def _client(self, rng: random.Random) -> None:
        while True:
            self._open.wait()
            self._server.up.wait()
            if not self._running.is_set():
                return
            with self._idle:
                if not self._open.is_set():
                    continue
                self._busy += 1
            try:
                self._one(rng)
            finally:
                with self._idle:
                    self._busy -= 1
                    self._idle.notify_all()

    def _one(self, rng: random.Random) -> None:
        weights = [weight for weight, _, _ in self._kinds]
        _, name, ask = rng.choices(self._kinds, weights)[0]
        life = self._server.lives
        self._tally.request(name)
        try:
            ask(rng)
        except requests.RequestException as error:
            if self._server.lives != life or not self._server.up.is_set():
                self._tally.count("requests cut by a restart")
                return
            time.sleep(1)
            if self._server.up.is_set() and self._server.lives == life:
                self._tally.fail(f"{type(error).__name__} in {name}", str(error)[:200])
            else:
                self._tally.count("requests cut by a restart")
        except Exception as error:
            self._tally.fail(f"{type(error).__name__} in {name}", str(error)[:200])

    def _post(self, path: str, body: dict[str, Any], **more: Any) -> requests.Response:
        data = json.dumps({"model": "tiny", **body})
        return self._send(path, data.encode(), **more)

    def _send(self, path: str, data: bytes, **more: Any) -> requests.Response:
        headers = {"Content-Type": "application/json"}
        return requests.post(
            self._server.url + path, data=data, headers=headers, timeout=PATIENCE, **more
        )

    def _answered(self, answer: requests.Response) -> bool:
        if answer.status_code == 200:
            return True
        if self._server.up.is_set():
            self._tally.fail(f"status {answer.status_code}", answer.text[:200])
        else:
            self._tally.count("requests cut by a restart")
        return False

    def _sampled(self, rng: random.Random) -> None:
        sample = rng.choice(self._samples)
        answer = self._post(
            COMPLETIONS,
            {
                "prompt": sample.prompt,
                "max_tokens": len(sample.tokens),
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
                "vllm_xargs": sample.settings or None,
            },
        )
        if not self._answered(answer):
            return
        [choice] = answer.json()["choices"]
        said = choice["token_ids"]
        if choice["finish_reason"] == "abort" and not self._server.up.is_set():
            self._tally.count("requests cut by a restart")
        elif said != sample.tokens:
            self._tally.fail(
                "answers that are not the oracle's",
                f"{len(sample.prompt)} tokens, {sample.settings}: {said} and not {sample.tokens}",
            )

    def _body(self, rng: random.Random) -> dict[str, Any]:
        settings: dict[str, Any] = rng.choice(
            [{}, {}, {"pacellm_alpha": 0.6}, {"pacellm_enabled": False}, {"pacellm_noise": 0.3}]
        )
        sampled = rng.random() < 0.5
        return {
            "prompt": rng.choice(self._texts),
            "max_tokens": rng.randint(1, 120),
            "temperature": float(sampled),
            # vLLM refuses several greedy answers.
            "n": rng.choice([1, 2]) if sampled else 1,
            "ignore_eos": rng.random() < 0.5,
            "vllm_xargs": settings or None,
        }

    def _completion(self, rng: random.Random) -> None:
        self._answered(self._post(COMPLETIONS, self._body(rng)))

    def _chat(self, rng: random.Random) -> None:
        words = "The magic number of Rome is 47. " * rng.randint(1, 30)
        message = {"role": "user", "content": words + f"Number {rng.randint(1, 5)}?"}
        stream = rng.random() < 0.5
        body = {"messages": [message], "max_tokens": rng.randint(1, 60), "stream": stream}
        with self._post(CHAT, body, stream=stream) as answer:
            if self._answered(answer) and stream and not _ended(answer):
                self._cut_short("chat")

    def _stream(self, rng: random.Random) -> None:
        with self._post(COMPLETIONS, {**self._body(rng), "stream": True}, stream=True) as answer:
            if self._answered(answer) and not _ended(answer):
                self._cut_short("streams")

    def _cut_short(self, kind: str) -> None:
        if self._server.up.is_set():
            self._tally.fail(f"{kind} that end early")
        else:
            self._tally.count("requests cut by a restart")

    def _hang_up(self, rng: random.Random) -> None:
        body = {**self._body(rng), "stream": True, "max_tokens": 200, "ignore_eos": True}
        with self._post(COMPLETIONS, body, stream=True) as answer:
            if not self._answered(answer):
                return
            lines = answer.iter_lines()
            for _ in range(rng.randint(0, 30)):
                next(lines, None)

    def _hostile(self, rng: random.Random) -> None:
        hostile = rng.choice(HOSTILE)
        answer = self._send(hostile.path, hostile.body)
        wrong = hostile.wrong(answer.status_code, answer.content)
        if wrong and self._server.up.is_set():
            self._tally.fail(f"hostile: {wrong}", answer.text[:200])

    def _killed(self, rng: random.Random) -> None:
        """``kill -9`` of a client in the middle of its stream."""
        body = {**self._body(rng), "model": "tiny", "stream": True, "max_tokens": 200}
        client = subprocess.Popen(
            [sys.executable, "-c", VICTIM, self._server.url + COMPLETIONS, json.dumps(body)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert client.stdout is not None
        try:
            for _ in range(rng.randint(1, 10)):
                client.stdout.readline()
        finally:
            client.send_signal(signal.SIGKILL)
            client.wait()


def _ended(answer: requests.Response) -> bool:
    return [line for line in answer.iter_lines() if line][-1:] == [b"data: [DONE]"]
