"""Runs a module with vLLM's processes forked, where it spawns them on a CPU.

A spawned process imports vLLM again, which takes half a minute. tests/serving/test_http.py and
tests/test_engine_processes.py spawn, as users do.
"""

import ctypes
import multiprocessing
import runpy
import sys
from pathlib import Path

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


if __name__ == "__main__":
    fork()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
