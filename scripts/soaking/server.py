"""Server: ``pacellm serve`` in processes of its own, and what can be seen of them from outside."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import requests

START_SECONDS, STOP_SECONDS = 300, 90
PAGE = os.sysconf("SC_PAGE_SIZE")


class Server:
    """One server after another on one port; ``lives`` counts them.

    ``up`` is set while requests may be sent: not before it answers, and not once it is to end.
    """

    def __init__(self, model: Path, pace: dict[str, Any], blocks: int, log: Path) -> None:
        flags = {
            **{name.replace("_", "-"): value for name, value in pace.items()},
            "layers": ",".join(map(str, pace["layers"])),
            "dtype": "float32",
            "block-size": 16,
            "max-model-len": 1024,
            "max-num-seqs": 8,
            "max-num-batched-tokens": 256,
            "num-gpu-blocks-override": blocks,
            "host": "127.0.0.1",
        }
        self._command = [sys.executable, "-m", "pacellm_vllm.cli", "serve", str(model)]
        self._command += [
            word for name, value in flags.items() for word in (f"--{name}", str(value))
        ]
        self._command += ["--enable-prefix-caching", "--served-model-name", "tiny"]
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self.blocks = blocks
        self.lives = 0
        self.up = threading.Event()
        self.url = ""

    def start(self) -> None:
        """Start and wait until it answers; ``RuntimeError`` with the log's end if it does not."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        env = {name: value for name, value in os.environ.items() if name != "VLLM_PLUGINS"}
        with self._log.open("ab") as out:
            self._process = subprocess.Popen(
                [*self._command, "--port", str(port)],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**env, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while not self.healthy():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.end(signal.SIGKILL)
                raise RuntimeError(f"the server does not start: {self._log.read_text()[-2000:]}")
            time.sleep(0.5)
        self.lives += 1
        self.up.set()

    def end(self, how: signal.Signals) -> bool:
        """Ask the server to end, or kill all of its processes; whether all were gone in time.

        Only its first process is asked, as a supervisor does: vLLM's front end waits for ever for
        answers of an engine that was asked too.
        """
        self.up.clear()
        process, self._process = self._process, None
        if process is None:
            return True
        if how is signal.SIGKILL:
            os.killpg(process.pid, how)
        else:
            process.send_signal(how)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return False
        # Its children may outlive it for a moment.
        deadline = time.monotonic() + STOP_SECONDS
        while _pids(process.pid):
            if time.monotonic() > deadline:
                os.killpg(process.pid, signal.SIGKILL)
                return False
            time.sleep(0.1)
        return True

    def healthy(self) -> bool:
        try:
            return requests.get(f"{self.url}/health", timeout=20).status_code == 200
        except requests.RequestException:
            return False

    def died(self) -> bool:
        """Whether it ended without being told to."""
        return self._process is not None and self._process.poll() is not None

    def resident_mb(self) -> float:
        """Resident memory of all its processes."""
        process = self._process
        if process is None:
            return 0.0
        return sum(_resident_pages(pid) for pid in _pids(process.pid)) * PAGE / 1e6

    def metrics(self) -> dict[str, float]:
        """Sums over labels, by name."""
        found: dict[str, float] = {}
        answer = requests.get(f"{self.url}/metrics", timeout=20)
        for line in answer.text.splitlines():
            if line.startswith("vllm:"):
                name = line.split("{")[0].split()[0]
                found[name] = found.get(name, 0.0) + float(line.rsplit(None, 1)[1])
        return found


def _pids(session: int) -> list[int]:
    """Live processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            fields = _stat(int(entry.name))
            if fields and int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def _resident_pages(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[21]) if fields else 0


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name, the state first; none once it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
