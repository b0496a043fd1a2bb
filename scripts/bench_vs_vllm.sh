#!/usr/bin/env bash
# Both engines one after the other on one GPU, then the table with ratios and shares of the floors.
#
#   scripts/bench_vs_vllm.sh MODEL TOKENIZER PEER OUT.jsonl [figures...]
#
# MODEL      folder with config.json (weights are random); TOKENIZER: folder with a tokenizer
# PEER       folder with bench_vllm.py, which prints the same lines of vLLM; if there are an install.sh that makes vLLM
#            importable and a serve_vllm.sh that serves (MODEL PORT), they are used
# OUT.jsonl  gets the lines of both
# figures    of offline long serving startup [all]; SERVING and OFFLINE in the environment are further flags
#
# Nothing handicaps the peer: its own defaults, its own client, the same requests. Ours runs first and leaves the GPU.
set -uo pipefail
(($# >= 4)) || { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0"; exit 2; }
model=$(realpath "$1") tokenizer=$(realpath "$2") peer=$(realpath "$3") out=$(realpath -m "$4")
shift 4
what=" ${*:-offline long serving startup} "
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
python=${PYTHON:-python3}
common=(--model "$model" --tokenizer "$tokenizer" --out "$out")
read -ra offline <<<"${OFFLINE:-}"
read -ra serving <<<"${SERVING:-}"
has() { [[ $what == *" $1 "* ]]; }
failed=0
run() { echo "== $*" >&2; "$@" || { echo "== FAILED: $*" >&2; failed=1; }; }
peer_run() { # in vLLM's environment, which must not reach ours
    (
        if [[ -e $peer/install.sh ]]; then . "$peer/install.sh" "$peer" >&2; fi
        TOKENIZER=$tokenizer run "$@"
        exit $failed
    ) || failed=1
}

has offline && run "$python" scripts/bench_offline.py "${common[@]}" "${offline[@]}"
has long && run "$python" scripts/bench_offline.py "${common[@]}" --what none --long 8x32768
has startup && run "$python" scripts/bench_startup.py "${common[@]}"
if has serving; then # ours, asked by the client that asks vLLM
    read -r port < <("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    weights=dummy
    compgen -G "$model/*.safetensors" >/dev/null && weights=auto
    setsid "$python" -P -m qjax serve "$model" --tokenizer "$tokenizer" --load-format "$weights" --generation-config vllm \
        --no-enable-prefix-caching --host 127.0.0.1 --port "$port" >"$out.server.log" 2>&1 &
    server=$!
    for ((i = 0; i < 600; i++)); do
        curl -sf "http://127.0.0.1:$port/health" >/dev/null && break
        kill -0 $server 2>/dev/null || break
        sleep 1
    done
    peer_run "$python" scripts/bench_serving.py "${common[@]}" --base-url "http://127.0.0.1:$port" "${serving[@]}"
    kill -TERM -- -$server 2>/dev/null
    wait $server 2>/dev/null
fi

has offline && peer_run "$python" "$peer/bench_vllm.py" --model "$model" --out "$out"
has long && peer_run "$python" "$peer/bench_vllm.py" --model "$model" --what none --long 8x32768 --out "$out"
serve="bash $peer/serve_vllm.sh $model {port}"
if [[ -e $peer/serve_vllm.sh ]]; then
    has startup && peer_run "$python" scripts/bench_startup.py "${common[@]}" --engine vllm \
        --start "env VLLM_CACHE_ROOT={cache} $serve"
    has serving && peer_run "$python" scripts/bench_serving.py "${common[@]}" --engine vllm --start "$serve" "${serving[@]}"
fi
"$python" scripts/bench_table.py "$out"
exit $failed
