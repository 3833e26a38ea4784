#!/usr/bin/env bash
# Writes .peer-kit/: OpenVINO GenAI for a machine without network, and its export of smollm2-135m without the weights. run.sh's stage
# "peers" compares with it there (cpu_peers.sh). 30 MB, which travel next to .gpu-kit/.
#   bash tests/gpu/kit/pack_peers.sh EXPORTED
#
# EXPORTED: the openvino-fp16/ that `flowprefill bench prefill --peers openvino-genai` has made in the user's cache folder. Downloads
# 68 MB by PYTHON's pip (.venv/bin/python).
#   PEER_PYTHON=3.12   the machine's Python
set -euo pipefail
exported=$1
source=$(cd "$(dirname "$0")" && pwd)
repo=$(cd "$source/../../.." && pwd)
python=${PYTHON:-$repo/.venv/bin/python}
work=$repo/build/peer-kit
rm -rf "$repo/.peer-kit" "$work/site" "$work/ir"
mkdir -p "$repo/.peer-kit" "$work/site"

"$python" -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: -d "$work/wheels" \
  --python-version "${PEER_PYTHON:-3.12}" --platform manylinux_2_28_x86_64 \
  openvino==2026.4.1 openvino-genai==2026.4.1.0 openvino-tokenizers==2026.4.1.0
for wheel in "$work"/wheels/*.whl; do
  # Without what is for other devices, other formats of models and compilers.
  unzip -q -o "$wheel" -d "$work/site" -x 'openvino/include/*' 'openvino/frontend/*.so' 'openvino/libs/cache.json' \
    openvino/libs/libopenvino_{intel_gpu,intel_npu,auto,auto_batch,hetero}_plugin.so \
    openvino/libs/libopenvino_{onnx,tensorflow,tensorflow_lite,pytorch,paddle,jax,gguf}_frontend.so.\* 2>/dev/null || [ $? -eq 11 ]
done
"$python" "$source/peer_ir.py" pack "$exported" "$work/ir"
XZ_OPT=-9 tar -C "$work" -cJf "$repo/.peer-kit/peers.tar.xz" site ir
du -h "$repo/.peer-kit/peers.tar.xz"
