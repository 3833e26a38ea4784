"""HfTokenizer: tokenizer and chat templates of a Hugging Face folder; used by hf_folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from flowprefill.errors import CheckpointError
from flowprefill.models.json_file import is_text, read_json
from flowprefill.models.model_config import ModelConfig, bad_field, named_in_errors
from flowprefill.models.special_tokens import SpecialTokens, read_special_tokens
from flowprefill.models.tokenizer import Tokenizer, is_library_error
from flowprefill.models.tokenizer_file import read_tokenizer_json

_TEMPLATE = "chat_template.jinja"
_MORE_TEMPLATES = "additional_chat_templates"


class HfTokenizer:
    """The tokenizer's files of one folder; tokenizer.json is read by `build` only."""

    def __init__(self, folder: Path) -> None:
        """Read the small files.

        Raises:
            CheckpointError: one is damaged; names file and field.
        """
        self._folder = folder
        self._config = read_json(folder / "tokenizer_config.json")
        self._special_map = read_json(folder / "special_tokens_map.json")
        self._added = read_json(folder / "added_tokens.json")
        with named_in_errors(folder):
            tokens = self._special_tokens([])
            self.chat_templates = self._chat_templates()
        self.special_tokens = {name: str(token.content) for name, token in tokens.named.items()}

    def _special_tokens(
        self, stored: list[Mapping[str, Any]], padding: Mapping[str, Any] | None = None
    ) -> SpecialTokens:
        pad = {} if padding is None else {"pad_token": padding["pad_token"]}
        return read_special_tokens(pad | self._config, self._special_map, self._added, stored)

    def build(self, config: ModelConfig) -> Tokenizer:
        """Build the tokenizer; raises CheckpointError.

        What stands around a plain prompt (BOS) is up to the post-processor in tokenizer.json; as in
        transformers 5, ``add_bos_token`` in tokenizer_config.json then has no effect.
        """
        path = self._folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, expected the tokenizer", param=path.name)
        try:
            stored = read_tokenizer_json(path).get("added_tokens") or []
            inner = tokenizers.Tokenizer.from_file(str(path))
            inner.encode_special_tokens = self._config.get("split_special_tokens") is True
            tokens = self._special_tokens(stored, inner.padding)
            tokens.add_to(inner)
        except BaseException as error:
            if not is_library_error(error):
                raise
            message = f"{path}: not a tokenizer ({error})"
            raise CheckpointError(message, param=path.name) from None
        bos, eos = (_id_of(inner, tokens.text(name)) for name in ("bos_token", "eos_token"))
        return Tokenizer(
            inner,
            bos_id=config.bos_token_id if bos is None else bos,
            eos_ids=config.eos_token_ids + (() if eos is None else (eos,)),
        )

    def _chat_templates(self) -> dict[str, str]:
        """Read the templates by name: those in files of their own, else the configuration's."""
        files = {"default": self._folder / _TEMPLATE}
        more = sorted((self._folder / _MORE_TEMPLATES).glob("*.jinja"))
        files |= {path.name.removesuffix(".jinja"): path for path in more}
        found = {name: _read_text(path) for name, path in files.items() if path.is_file()}
        if found:
            return found
        value = self._config.get("chat_template")
        if value is None:
            return {}
        if is_text(value):
            return {"default": value}
        if isinstance(value, dict) and all(is_text(text) for text in (*value, *value.values())):
            return value
        if not isinstance(value, list) or not all(map(_is_named_template, value)):
            allowed = "text, a list of objects {name, template}, or an object name: template"
            raise bad_field("tokenizer_config.json: chat_template", value, allowed)
        return {entry["name"]: entry["template"] for entry in value}


def _is_named_template(entry: Any) -> bool:
    return isinstance(entry, dict) and all(is_text(entry.get(key)) for key in ("name", "template"))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise CheckpointError(f"{path}: {error}", param=path.name) from None


def _id_of(inner: tokenizers.Tokenizer, text: str | None) -> int | None:
    token_id: int | None = None if text is None else inner.token_to_id(text)
    return token_id
