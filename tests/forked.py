"""Runs a module with vLLM's processes forked, where it spawns them on a CPU.

A spawned process imports vLLM again, which takes half a minute; ``OMP_NUM_THREADS=1`` makes forks
safe. tests/serving/test_http.py and tests/test_engine_processes.py spawn, as users do.
"""

import multiprocessing
import runpy
import sys

from vllm.utils import system_utils

system_utils.get_mp_context = lambda: multiprocessing.get_context("fork")

if __name__ == "__main__":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
