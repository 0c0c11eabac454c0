#!/usr/bin/env bash
# Sets up .venv, serves a tiny trained model with memory on, hides numbers in a text and asks for
# them over HTTP, prints the answers and what the memory did, and stops the server.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
bin=${PACELLM_VENV:-.venv}/bin
work=.quickstart
log=$work/server.log
mkdir -p "$work"
# Where there is no GPU: the PyTorch CPU platform serves who asks for it.
export PACELLM_CPU_PLATFORM=${PACELLM_CPU_PLATFORM:-1}

port=$("$bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
url=http://127.0.0.1:$port

echo "pacellm: starting the server (log in $log)"
"$bin/pacellm" serve scripts/tiny --segment-size 64 --block-size 32 --dtype float32 --enforce-eager \
    --kv-cache-memory-bytes 536870912 --host 127.0.0.1 --port "$port" > "$log" 2>&1 &
server=$!
trap 'kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true' EXIT

for _ in $(seq 240); do
    if "$bin/python" -c "import urllib.request as u; u.urlopen('$url/health', timeout=2)" 2>/dev/null; then
        grep -o "pacellm: memory in .*" "$log" || true
        "$bin/python" scripts/quickstart_client.py "$url"
        exit 0
    fi
    kill -0 "$server" 2>/dev/null || break
    sleep 1
done
echo "pacellm: the server did not start; the end of its log:" >&2
tail -n 40 "$log" >&2
exit 1
