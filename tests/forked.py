"""Runs a module with vLLM's processes forked, and its own from one that has imported vLLM.

A process that is started anew imports it again, which takes up to half a minute.
tests/serving/test_http.py and tests/test_engine_processes.py start theirs as users do.
"""

import ctypes
import multiprocessing
import os
import runpy
import sys
from pathlib import Path

# What a command imports before it knows what it serves.
IMPORTED = ["pacellm_vllm.cli", "vllm.entrypoints.cli.main", "vllm.entrypoints.cli.serve"]
HARD = 2  # omp_pause_resource_t, OpenMP 5.0


def context():
    """What vLLM's ``get_mp_context`` is to return.

    A child that is forked beside idle threads of libgomp's, torch's or numba's, waits for them for
    ever. They end here, as where vLLM 0.33 forks (``vllm/utils/system_utils.py``), and are made
    again when they are needed.
    """
    maps = Path("/proc/self/maps").read_text().splitlines()
    for library in {line.split()[-1] for line in maps if "libgomp" in line}:
        ctypes.CDLL(library).omp_pause_resource_all(HARD)
    return multiprocessing.get_context("fork")


def fork():
    """For all that takes ``get_mp_context`` from its module later."""
    from vllm.utils import system_utils

    system_utils.get_mp_context = context


def start(module, words, log, environment):
    """A ``multiprocessing.Process``, a session of its own, whose output goes to ``log``."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(IMPORTED)
    running = server.Process(target=run, args=(module, [*map(str, words)], str(log), environment))
    running.start()
    return running


def run(module, words, log, environment):
    os.setsid()
    with Path(log).open("w") as out:
        for standard in (1, 2):
            os.dup2(out.fileno(), standard)
    os.environ.clear()
    os.environ.update(environment)
    fork()
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
