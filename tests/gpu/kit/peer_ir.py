"""A model that OpenVINO has exported, without its weights: for pack_peers.sh and cpu_peers.sh.

peer_ir.py pack EXPORTED PACKED   all but the matrices
peer_ir.py make PACKED FOLDER     the same model with random matrices
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np

XML, BIN, REST = "openvino_model.xml", "openvino_model.bin", "rest.bin"
LEAST_BYTES = 1 << 16  # of what counts as a matrix
SPREAD = 0.06  # make_stub_model.py's


def matrices(xml: Path) -> list[tuple[int, int]]:
    """Return where the file of weights holds matrices, all of f16: (begin, end) in order.

    Raises:
        ValueError: a large constant of another type.
    """
    found: list[tuple[int, int]] = []
    for layer in ET.parse(xml).iter("layer"):
        data = layer.find("data")
        if layer.get("type") != "Const" or data is None:
            continue
        offset, size = (int(data.get(name, "")) for name in ("offset", "size"))
        if size < LEAST_BYTES:
            continue
        if data.get("element_type") != "f16":
            raise ValueError(f"{layer.get('name')}: {data.get('element_type')}, expected f16")
        found.append((offset, offset + size))
    return sorted(set(found))


def pack(exported: Path, packed: Path) -> None:
    """Copy the folder, of the file of weights only what lies between the matrices."""
    shutil.copytree(exported, packed, ignore=shutil.ignore_patterns(BIN, "tokenizer.json"))
    weights = np.fromfile(exported / BIN, np.uint8)
    begin = 0
    with (packed / REST).open("wb") as rest:
        for first, last in matrices(exported / XML):
            rest.write(weights[begin:first])
            begin = last
        rest.write(weights[begin:])


def make(packed: Path, folder: Path) -> None:
    """Write the model; no two matrices are alike."""
    shutil.copytree(packed, folder, ignore=shutil.ignore_patterns(REST))
    noise = np.random.default_rng(1).standard_normal(1 << 21, np.float32) * SPREAD
    noise = noise.astype(np.float16)
    with (packed / REST).open("rb") as rest, (folder / BIN).open("wb") as weights:
        for index, (first, last) in enumerate(matrices(packed / XML)):
            weights.write(rest.read(first - weights.tell()))
            weights.write(np.resize(np.roll(noise, 7919 * index), (last - first) // 2))
        weights.write(rest.read())


if __name__ == "__main__":
    {"pack": pack, "make": make}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
