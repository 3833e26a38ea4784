"""HfFolder: reads a Hugging Face model folder (json files and safetensors); used by checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from flowprefill.errors import CheckpointError
from flowprefill.models.families import family_of, read_config
from flowprefill.models.hf_config import HfConfig
from flowprefill.models.hf_tokenizer import HfTokenizer
from flowprefill.models.json_file import read_json
from flowprefill.models.model_config import known_ids, named_in_errors
from flowprefill.models.quantisation import read_quantisation
from flowprefill.models.quantised_weights import E4M3, FLOATS, Stored, find_quantised
from flowprefill.models.sampling_defaults import read_sampling_defaults
from flowprefill.models.tokenizer import Tokenizer
from flowprefill.models.weight_names import hf_name

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_TABLE = "rotary_emb.inv_freq"
_HEAD, _PREFIX = hf_name("lm_head"), "model."
_ELEMENT_BYTES = {
    "BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "I32": 4, "I64": 8,
}  # fmt: skip


class HfFolder:
    """One folder; the safetensors files stay memory-mapped while it lives."""

    def __init__(self, path: Path) -> None:
        """Read the small files and the headers of the weight files.

        Raises:
            CheckpointError: a file is missing, truncated, not JSON or not supported; names it.
        """
        self._path = path
        values = read_json(path / "config.json", required=True)
        with named_in_errors(path / "config.json"):
            config = read_config(values)
            self._quantisation = read_quantisation(values)
        self._tokenizer = HfTokenizer(path)
        self.special_tokens = self._tokenizer.special_tokens
        self.chat_templates = self._tokenizer.chat_templates
        self._family = family_of(config)
        generation = HfConfig(read_json(path / "generation_config.json"))
        with named_in_errors(path / "generation_config.json"):
            self.sampling_defaults = read_sampling_defaults(generation.values)
            eos = config.eos_token_ids + generation.token_ids("eos_token_id")
            bos = generation.token_ids("bos_token_id")
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        self._stored: dict[str, Stored] = {}
        elsewhere = [stray for name in self._weight_files() for stray in self._open_weights(name)]
        self._add_strays(elsewhere)
        bare = (hf_name(name).removeprefix(_PREFIX) for name in ("embed", "final_norm"))
        self._is_bare = any(name in self._stored for name in bare)
        self._quantised = find_quantised(self._quantisation, self._stored, self._read_stored)
        self._shapes = self._weight_shapes()
        self._embed = self._stored_embedding(config.tie_embeddings)
        self.config = replace(
            config,
            bos_token_id=bos[0] if bos else config.bos_token_id,
            eos_token_ids=known_ids(eos, config.vocab_size),
            tie_embeddings=config.tie_embeddings and not self._has_own_head(),
        )

    def stored_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor in all files; a quantised weight is one, without its scales."""
        return self._shapes

    def stored_name(self, canonical: str) -> str:
        """Hugging Face's name of a canonical weight; bare decoders are stored without "model."."""
        if canonical == "embed":
            return self._embed
        return self._plain_name(canonical)

    def _plain_name(self, canonical: str) -> str:
        name = hf_name(canonical, self._family.hf_names)
        return name.removeprefix(_PREFIX) if self._is_bare else name

    def is_ignored(self, stored: str) -> bool:
        """Tied output projections are sometimes stored again; old files keep rotary tables."""
        tied_head = stored == _HEAD and self.config.tie_embeddings
        return tied_head or self._is_read_past(stored)

    def _is_read_past(self, stored: str) -> bool:
        """Whether a tensor is no weight, whatever its type."""
        return stored.endswith(_TABLE) or self._quantisation.is_read_past(stored)

    def stored_bytes(self, stored: str) -> int:
        """Bytes of a tensor in its file; of a quantised weight with all that belongs to it."""
        parts = self._quantised[stored].parts if stored in self._quantised else (stored,)
        tensors = [self._stored[part] for part in parts]
        return sum(_ELEMENT_BYTES[one.dtype] * math.prod(one.shape) for one in tensors)

    def stored_type(self, stored: str) -> str:
        """E4M3 of FP8 weights with a scale for each row; these files have no blocks of GGUF."""
        weight = self._quantised.get(stored)
        return E4M3 if weight is not None and weight.is_e4m3_by_rows else ""

    def load_blocks(self, canonical: str) -> torch.Tensor:
        """Read one FP8 weight as it is stored: uint8 [rows, columns + 4], a float32 scale last."""
        rows = self._quantised[self.stored_name(canonical)].e4m3_rows(self._read_stored)
        return self._family.arrange(self.config, canonical, rows).contiguous()

    def release(self, canonical: str) -> None:
        """Do nothing: safetensors maps its files itself."""

    def load(self, canonical: str) -> torch.Tensor:
        """Read one weight in its stored dtype; may share memory with the mapped file.

        Quantised ones become float32.
        """
        tensor = self._read(self.stored_name(canonical))
        return self._family.arrange(self.config, canonical, tensor)

    def _read(self, name: str) -> torch.Tensor:
        if name in self._quantised:
            return self._quantised[name].dequantise(self._read_stored)
        return self._read_stored(name)

    def _read_stored(self, name: str) -> torch.Tensor:
        try:
            tensor: torch.Tensor = self._files[name].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"tensor {name}: {error}", param=name) from None
        return tensor

    def read_tokenizer(self) -> Tokenizer:
        """Build the tokenizer from tokenizer.json and the files next to it."""
        return self._tokenizer.build(self.config)

    def _stored_embedding(self, tied: bool) -> str:
        """Name of the embedding; of two tied tensors some writers keep only the head."""
        name = self._plain_name("embed")
        return _HEAD if tied and name not in self._shapes and _HEAD in self._shapes else name

    def _has_own_head(self) -> bool:
        """Whether an output projection is stored that is not the embedding."""
        if _HEAD not in self._shapes or self._embed not in self._shapes:
            return _HEAD in self._shapes
        if self._embed == _HEAD:
            return False
        if _HEAD in self._quantised or self._shapes[_HEAD] != self._shapes[self._embed]:
            return True
        head, embed = self._read(_HEAD), self._read(self._embed)
        wider = torch.promote_types(head.dtype, embed.dtype)
        return not torch.equal(head.to(wider), embed.to(wider))

    def _weight_files(self) -> list[str]:
        # As in transformers, the whole file counts: an index next to it is a leftover.
        if (self._path / _SINGLE).is_file() or not (self._path / _INDEX).is_file():
            return [_SINGLE]
        weight_map = read_json(self._path / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(
                f"{self._path / _INDEX}: weight_map: expected an object of tensor: file",
                param=_INDEX,
            )
        self._file_of = {name: str(file).removeprefix("./") for name, file in weight_map.items()}
        names = sorted(set(self._file_of.values()))
        for name in names:
            if Path(name).name != name:
                raise CheckpointError(
                    f"{self._path / _INDEX}: weight_map: got {name!r}, expected a file name",
                    param=_INDEX,
                )
        return names

    def _open_weights(self, name: str) -> list[tuple[str, Stored, Any]]:
        """Open a file; returns its tensors that the index has elsewhere, and the file."""
        path = self._path / name
        if not path.is_file():
            raise CheckpointError(
                f"{path}: missing, expected the weights as safetensors", param=name
            )
        strays = []
        try:
            opened: Any = safe_open(path, framework="pt")
            for tensor in opened.keys():  # noqa: SIM118 - not a mapping
                view = opened.get_slice(tensor)
                stored = Stored(view.get_dtype(), tuple(view.get_shape()))
                if self._file_of.get(tensor, name) == name:
                    self._add_tensor(tensor, stored, opened)
                else:
                    strays.append((tensor, stored, opened))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: damaged or truncated ({error})", param=name) from None
        return strays

    def _add_strays(self, strays: list[tuple[str, Stored, Any]]) -> None:
        """Add the tensors that are not where the index has them; others are leftovers."""
        found = set(self._stored)
        for name, tensor, file in strays:
            if name not in found:
                self._add_tensor(name, tensor, file)

    def _add_tensor(self, name: str, tensor: Stored, file: Any) -> None:
        if name in self._stored:
            raise CheckpointError(f"tensor {name}: stored in two files, expected once", param=name)
        self._stored[name], self._files[name] = tensor, file

    def _weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights, quantised or not, and of what else there is."""
        parts = {part for weight in self._quantised.values() for part in weight.parts}
        shapes = {weight.name: weight.shape for weight in self._quantised.values()}
        for name, tensor in self._stored.items():
            if name in parts:
                continue
            if name in shapes:
                message = f"tensor {name}: stored packed too, expected once"
                raise CheckpointError(message, param=name)
            if ".experts." in name and len(tensor.shape) > 2:
                message = f"got shape {list(tensor.shape)}, expected a tensor for each expert"
                raise CheckpointError(f"tensor {name}: {message}", param=name)
            if tensor.dtype not in FLOATS and not self._is_read_past(name):
                message = f"got dtype {tensor.dtype}, expected one of {', '.join(FLOATS)}"
                raise CheckpointError(f"tensor {name}: {message}", param=name)
            shapes[name] = tensor.shape
        return shapes
