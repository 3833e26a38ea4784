"""HfFolder: reads a Hugging Face model folder (json files and safetensors); used by checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors import SafetensorError, safe_open

from flowprefill.errors import CheckpointError
from flowprefill.models.families import family_of, read_config
from flowprefill.models.hf_config import HfConfig
from flowprefill.models.model_config import bad_field
from flowprefill.models.tokenizer import Tokenizer, is_library_error
from flowprefill.models.tokenizer_file import check_tokenizer_file
from flowprefill.models.weight_names import hf_name

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_HEAD = hf_name("lm_head")
_ELEMENT_BYTES = {"BF16": 2, "F16": 2, "F32": 4}


class HfFolder:
    """One folder; the safetensors files stay memory-mapped while it lives."""

    def __init__(self, path: Path) -> None:
        """Read the small files and the headers of the weight files.

        Raises:
            CheckpointError: a file is missing, truncated, not JSON or not supported; names it.
        """
        self._path = path
        values = self._read_json("config.json")
        self._tokenizer_config = self._read_json("tokenizer_config.json", required=False)
        self.special_tokens = {
            name: text
            for name in ("bos_token", "eos_token")
            if (text := self._special_token(name)) is not None
        }
        config = read_config(values)
        self._family = family_of(config)
        generation = HfConfig(self._read_json("generation_config.json", required=False))
        eos = config.eos_token_ids + generation.token_ids("eos_token_id")
        bos = generation.token_ids("bos_token_id")
        self._files: dict[str, Any] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._bytes: dict[str, int] = {}
        for name in self._weight_files():
            self._open_weights(name)
        self.config = replace(
            config,
            bos_token_id=bos[0] if bos else config.bos_token_id,
            eos_token_ids=tuple(dict.fromkeys(eos)),
            chat_template=self._chat_template(),
            tie_embeddings=config.tie_embeddings and not self._has_own_head(),
        )

    def stored_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor in all files."""
        return self._shapes

    def stored_name(self, canonical: str) -> str:
        """Hugging Face's name of a canonical weight."""
        return hf_name(canonical, self._family.hf_names)

    def is_ignored(self, stored: str) -> bool:
        """Tied output projections are sometimes stored again; old files keep rotary tables."""
        tied_head = stored == _HEAD and self.config.tie_embeddings
        return tied_head or stored.endswith("rotary_emb.inv_freq")

    def stored_bytes(self, stored: str) -> int:
        """Bytes of a tensor in its file."""
        return self._bytes[stored]

    def load(self, canonical: str) -> torch.Tensor:
        """Read one weight in its stored dtype; may share memory with the mapped file."""
        tensor = self._read(self.stored_name(canonical))
        return self._family.arrange(self.config, canonical, tensor)

    def _read(self, name: str) -> torch.Tensor:
        try:
            tensor: torch.Tensor = self._files[name].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"tensor {name}: {error}", param=name) from None
        return tensor

    def read_tokenizer(self) -> Tokenizer:
        """Build the tokenizer from tokenizer.json and tokenizer_config.json."""
        path = self._path / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(
                f"{path}: missing, expected the tokenizer", param="tokenizer.json"
            )
        try:
            check_tokenizer_file(path)
            inner = tokenizers.Tokenizer.from_file(str(path))
        except BaseException as error:
            if not is_library_error(error):
                raise
            message = f"{path}: not a tokenizer ({error})"
            raise CheckpointError(message, param="tokenizer.json") from None
        bos, eos = (self.special_tokens.get(name) for name in ("bos_token", "eos_token"))
        bos_id = inner.token_to_id(bos) if bos is not None else self.config.bos_token_id
        eos_id = inner.token_to_id(eos) if eos is not None else None
        eos_ids = self.config.eos_token_ids + (() if eos_id is None else (eos_id,))
        add_bos = self._tokenizer_config.get("add_bos_token")
        if add_bos is not None and not isinstance(add_bos, bool):
            raise bad_field("tokenizer_config.json: add_bos_token", add_bos, "true or false")
        return Tokenizer(inner, bos_id=bos_id, eos_ids=eos_ids, add_bos=add_bos)

    def _read_json(self, name: str, required: bool = True) -> dict[str, Any]:
        path = self._path / name
        if not path.is_file():
            if required:
                raise CheckpointError(f"{path}: missing", param=name)
            return {}
        try:
            values = json.loads(path.read_bytes())
        except (ValueError, OSError, RecursionError) as error:
            raise CheckpointError(f"{path}: not JSON ({error})", param=name) from None
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: expected a JSON object", param=name)
        return values

    def _special_token(self, name: str) -> str | None:
        """Text of a special token: a string, or an object with ``content``."""
        value = self._tokenizer_config.get(name)
        if isinstance(value, Mapping):
            value = value.get("content")
        if value is not None and not _is_text(value):
            raise bad_field(f"tokenizer_config.json: {name}", value, "text")
        return value

    def _chat_template(self) -> str | None:
        path = self._path / "chat_template.jinja"
        if path.is_file():
            try:
                return path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError) as error:
                raise CheckpointError(f"{path}: {error}", param=path.name) from None
        value = self._tokenizer_config.get("chat_template")
        if isinstance(value, list):
            if not all(isinstance(entry, dict) for entry in value):
                allowed = "text, or a list of objects {name, template}"
                raise bad_field("tokenizer_config.json: chat_template", value, allowed)
            named = (entry.get("template") for entry in value if entry.get("name") == "default")
            value = next(named, None)
        if value is not None and not _is_text(value):
            raise bad_field("tokenizer_config.json: chat_template", value, "text")
        return value

    def _has_own_head(self) -> bool:
        """Whether an output projection is stored that is not the embedding."""
        embed = hf_name("embed")
        if _HEAD not in self._shapes or embed not in self._shapes:
            return _HEAD in self._shapes
        return not torch.equal(self._read(_HEAD), self._read(embed))

    def _weight_files(self) -> list[str]:
        if not (self._path / _INDEX).is_file():
            return [_SINGLE]
        weight_map = self._read_json(_INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(
                f"{self._path / _INDEX}: weight_map: expected an object of tensor: file",
                param=_INDEX,
            )
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if Path(name).name != name:
                raise CheckpointError(
                    f"{self._path / _INDEX}: weight_map: got {name!r}, expected a file name",
                    param=_INDEX,
                )
        return names

    def _open_weights(self, name: str) -> None:
        path = self._path / name
        if not path.is_file():
            raise CheckpointError(
                f"{path}: missing, expected the weights as safetensors", param=name
            )
        try:
            opened: Any = safe_open(path, framework="pt")
            for tensor in opened.keys():  # noqa: SIM118 - not a mapping
                view = opened.get_slice(tensor)
                self._add_tensor(tensor, view.get_dtype(), tuple(view.get_shape()))
                self._files[tensor] = opened
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: damaged or truncated ({error})", param=name) from None

    def _add_tensor(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        if dtype not in _ELEMENT_BYTES:
            raise CheckpointError(
                f"tensor {name}: got dtype {dtype}, expected one of {', '.join(_ELEMENT_BYTES)}",
                param=name,
            )
        if name in self._shapes:
            raise CheckpointError(f"tensor {name}: stored in two files, expected once", param=name)
        size = _ELEMENT_BYTES[dtype]
        for extent in shape:
            size *= extent
        self._shapes[name], self._bytes[name] = shape, size


def _is_text(value: Any) -> bool:
    """Whether a value is text, without lone surrogates, which UTF-8 cannot hold."""
    if not isinstance(value, str):
        return False
    return value.isascii() or value.encode(errors="ignore").decode() == value
