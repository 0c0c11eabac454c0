"""Real API servers for tests, each in a process of its own."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import requests

PACELLM = [sys.executable, "-m", "pacellm_vllm.cli"]
VLLM = [sys.executable, "-m", "vllm.entrypoints.cli.main"]
# For ``serving``: PACELLM in processes that are forked, for tests of what servers say.
FORKED = ["forked", PACELLM[-1]]
# Whatever other tests set in this process.
ENV = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


def python_path(directory: Path) -> str:
    """PYTHONPATH for a child that also imports from ``directory``, before all else."""
    return os.pathsep.join([str(directory), *filter(None, [os.environ.get("PYTHONPATH")])])


def printed_by(*words: str | Path, **environment: str) -> list[str]:
    """The lines that a Python process prints that also imports from ``tests``; it must end well."""
    done = subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "PYTHONPATH": python_path(Path(__file__).parent), **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@contextlib.contextmanager
def serving(command: list[str], log: Path, **environment: str) -> Iterator[str]:
    """The base URL of the server that ``command`` starts; its output goes to ``log``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    env = {name: value for name, value in ENV.items() if name != "VLLM_PLUGINS"} | environment
    command = [*command, "--host", "127.0.0.1", "--port", str(port)]
    running: Any
    if command[0] == FORKED[0]:
        running = forked.start(command[1], command[2:], log, env)
        ended, wait = lambda: running.exitcode, running.join
    else:
        with log.open("w") as out:
            output = {"stdout": out, "stderr": subprocess.STDOUT}
            running = subprocess.Popen(command, **output, env=env, start_new_session=True)
        ended, wait = running.poll, running.wait
    try:
        for _ in range(600):
            assert ended() is None, log.read_text()[-3000:]
            try:
                requests.get(f"{url}/health", timeout=2).raise_for_status()
                break
            except requests.ConnectionError:
                time.sleep(0.5)
        else:
            raise AssertionError(log.read_text()[-3000:])
        yield url
    finally:
        os.killpg(running.pid, signal.SIGTERM)
        wait(timeout=60)
