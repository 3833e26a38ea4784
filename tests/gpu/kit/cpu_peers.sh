#!/usr/bin/env bash
# Prefill and decode of smollm2-135m's shape in bf16 next to OpenVINO GenAI and transformers: run.sh's stage "peers", which sets the
# variables. All engines in turn, each with a thread for every core that this process may use (taskset); then the same with two. The
# weights are random.
#   cpu_peers.sh SECONDS         PEERS_TOKENS="128 512": prompts of these lengths
# The report is written as it goes: a run that takes too long ends with what it has.
set -eu
end=$(($(date +%s) + $1))
left() { echo $((end - $(date +%s))); }
peers=$WORK/peers
folder=$XDG_CACHE_HOME/flowprefill/peers/smollm2-135m
mkdir -p "$peers"
[ -e "$folder" ] || "$PY" -m flowprefill.bench.peer_models smollm2-135m "$folder" &
[ -e "$peers/ir" ] || tar -C "$peers" -xJf "$REPO/.peer-kit/peers.tar.xz" 2>/dev/null \
  || "$PY" -m tarfile -e "$REPO/.peer-kit/peers.tar.xz" "$peers"
wait $!
[ -e "$folder/openvino-fp16" ] || "$PY" "$KIT/src/peer_ir.py" make "$peers/ir" "$folder/openvino-fp16"
printf '#!/bin/sh\nPYTHONPATH=%s exec %s "$@"\n' "$peers/site" "$PY" >"$peers/python"
chmod +x "$peers/python"
echo "made the model, $(left) s left"

# One processor of each core that this process may use.
processors=$(lscpu -p=CPU,CORE | awk -F, -v mine=" $("$PY" -c 'import os; print(*os.sched_getaffinity(0))') " \
  '!/^#/ && index(mine, " " $1 " ") && !seen[$2]++ { print $1 }')

# compare NAME THREADS ROUNDS
compare() {
  local cores
  cores=$(head -n "$2" <<<"$processors" | paste -sd,)
  echo "--- $2 threads, on processors $cores"
  timeout "$(left)" taskset -c "$cores" "$PY" -X faulthandler -m flowprefill bench prefill --device cpu --peers openvino-genai transformers \
    --peer-python "openvino-genai=$peers/python" --threads "$2" --rounds "$3" --tokens ${PEERS_TOKENS:-128 512 2048 7500} \
    --json "$LOGS/$1.json"
}
compare cpu_peers "$(wc -l <<<"$processors")" 4 || true
[ "$(left)" -lt 15 ] || compare cpu_peers_two 2 1
