"""Children: engines in processes of their own, a few in each, up to one that fails."""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fuzz.cases import make_case
from fuzz.verdict import Verdict

MARK = "FUZZ "


def verdicts(
    seeds: range, models: Path, options: list[str], each: int, patience: float
) -> Iterator[Verdict]:
    """A verdict for each seed; ``options`` go to the children, ``each`` engines to one of them.

    A child that says nothing for ``patience`` seconds is killed.
    """
    rest = list(seeds)
    while rest:
        now = rest[:each]
        for verdict in _one_child(now, models, options, patience):
            rest.remove(verdict.seed)
            yield verdict


def _one_child(
    seeds: list[int], models: Path, options: list[str], patience: float
) -> Iterator[Verdict]:
    """Verdicts until the child ends; at least one."""
    command = [sys.executable, sys.argv[0], "--child", "--seed", str(seeds[0])]
    command += ["--engines", str(len(seeds)), "--models", str(models), *options]
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(child.stdout, lines), daemon=True).start()
        left = list(seeds)
        try:
            while left:
                line = lines.get(timeout=patience)
                if line is None:
                    break
                if line.startswith(MARK):
                    verdict = Verdict(**json.loads(line.removeprefix(MARK)))
                    left.remove(verdict.seed)
                    yield verdict
                    if verdict.faults:
                        return
            if left:
                errors.seek(0)
                last = errors.read().strip().splitlines()[-1:] or ["no message"]
                what = f"the process ended with {child.wait()}: {last[0][:300]}"
                yield _died(left[0], what)
        except queue.Empty:
            yield _died(left[0], f"nothing was heard for {patience:.0f} s")
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _died(seed: int, what: str) -> Verdict:
    case = make_case(seed)
    return Verdict(seed, case.describe(), [what], features=sorted(case.features()))


def _read(stream: Any, lines: "queue.Queue[str | None]") -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def work(seeds: range, models: Path, broken: str | None, plain: bool) -> None:
    """The child: a line for each engine; it ends early when one has failed."""
    from vllm.platforms import current_platform

    from fuzz.breaks import BREAKS
    from fuzz.judge import judge
    from fuzz.models import Models

    # Before anything loads numba, which vLLM's search for kernels to replace stops at.
    current_platform.register_triton_kernel_overrides()

    if broken:
        BREAKS[broken]()
    for seed in seeds:
        verdict = judge(seed, Models(models), plain)
        print(MARK + json.dumps(verdict.as_dict()), flush=True)
        if verdict.faults:
            return
