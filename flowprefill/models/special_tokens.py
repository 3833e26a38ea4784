"""SpecialTokens: the tokens a model folder declares outside tokenizer.json; by hf_tokenizer.

They lie in up to four places, of which older checkpoints use one and newer ones another:
tokenizer_config.json (``bos_token`` and its like, ``additional_special_tokens`` or
``extra_special_tokens``, ``added_tokens_decoder``), special_tokens_map.json and added_tokens.json.
Which of them count together is as in transformers 5: with an ``added_tokens_decoder``
the two older files are not looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import tokenizers
from tokenizers import AddedToken

from flowprefill.models.json_file import is_text
from flowprefill.models.model_config import bad_field

NAMES = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"
)  # fmt: skip
_CONFIG, _MAP, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_EXTRA, _OLD_EXTRA = "extra_special_tokens", "additional_special_tokens"
_OWN = "model_specific_special_tokens"
_TYPE, _ADDED_TOKEN = "__type", "AddedToken"
_FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Tokens by what they are for; all of them are to be known to the tokenizer.

    Attributes:
        named: ``bos_token`` and so on, in the order in which they are added; templates see them.
        extra: further special tokens.
        listed: tokens listed with their ids, in the order of these.
    """

    named: Mapping[str, AddedToken] = field(default_factory=dict)
    extra: tuple[AddedToken, ...] = ()
    listed: tuple[AddedToken, ...] = ()

    def text(self, name: str) -> str | None:
        """Text of a named token, or None."""
        token = self.named.get(name)
        return None if token is None else str(token.content)

    def add_to(self, inner: tokenizers.Tokenizer) -> None:
        """Make a tokenizer know them; those that it has keep what it says of them."""
        known = list(inner.get_added_tokens_decoder().values())
        described = {repr(token) for token in known}
        names = {token.content for token in self.named.values()}
        new = [
            token
            for token in self.listed
            if repr(token) not in described or (token.content in names and not token.special)
        ]
        texts = {token.content for token in [*known, *new]}
        declared = [*self.named.values(), *self.extra]  # of one declared twice the last counts
        new += [token for token in declared if token.content not in texts]
        # Once special, always special: that is how the library skips them.
        special = {token.content for token in known if token.special}
        special |= names
        for token in new:
            token.special = token.special or token.content in special
        if new:
            inner.add_tokens(new)


def read_special_tokens(
    config: Mapping[str, Any],
    special_map: Mapping[str, Any],
    added: Mapping[str, Any],
    stored: Iterable[Mapping[str, Any]] = (),
) -> SpecialTokens:
    """Read the declarations.

    Args:
        config: tokenizer_config.json.
        special_map: special_tokens_map.json.
        added: added_tokens.json, token -> id.
        stored: ``added_tokens`` of tokenizer.json; only how a token is matched comes from there.

    Raises:
        CheckpointError: an entry of the wrong kind; names file and field.
    """
    decoder = config.get("added_tokens_decoder")
    merged, own = _merged(config, special_map if decoder is None else {})
    named, extra = _named(merged, own), _extra(merged)
    if decoder is not None:
        listed = _of_decoder(decoder)
    else:
        special = {token.content for token in [*named.values(), *extra]}
        listed = _of_added(added, special) | _of_stored(stored)
    by_text = {token.content: token for token in listed.values()}
    return SpecialTokens(
        named={
            name: by_text.get(token.content, token) if name in NAMES else token
            for name, token in named.items()
        },
        extra=tuple(extra),
        listed=tuple(listed[token_id] for token_id in sorted(listed)),
    )


def _merged(
    config: Mapping[str, Any], special_map: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Join both files; apart from it the tokens that a model names for itself in an object."""
    merged: dict[str, Any] = dict(config)
    own: dict[str, Any] = {}
    has_names = any(_is_own(name) and is_text(value) for name, value in merged.items())
    if isinstance(merged.get(_OWN), Mapping) and not has_names:  # those in their own keys win
        own = dict(merged[_OWN])
    if merged.get(_OLD_EXTRA) is not None and not merged.get(_EXTRA):
        merged[_EXTRA] = merged.pop(_OLD_EXTRA)
    if isinstance(merged.get(_EXTRA), Mapping):
        own = dict(merged.pop(_EXTRA))
    before = merged.get(_EXTRA)
    for name, value in special_map.items():
        is_token = isinstance(value, Mapping) and name != _EXTRA
        merged[name] = {**value, _TYPE: _ADDED_TOKEN} if is_token else value
    if isinstance(merged.get(_EXTRA), Mapping):
        own |= merged.pop(_EXTRA)
    elif isinstance(before, list) and isinstance(special_map.get(_EXTRA), list):
        merged[_EXTRA] = [*before, *special_map[_EXTRA]]
    if _EXTRA not in merged and _OLD_EXTRA in merged:
        merged[_EXTRA] = merged[_OLD_EXTRA]
    return merged, own


def _is_own(name: str) -> bool:
    """Whether a key names a token that only this model has, such as image_token."""
    return name.endswith("_token") and name not in NAMES


def _named(values: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, AddedToken]:
    found = {name: _token(name, values[name]) for name in NAMES if values.get(name) is not None}
    for name, value in values.items():  # a model's own, such as image_token
        is_object = isinstance(value, Mapping) and value.get(_TYPE) == _ADDED_TOKEN
        if _is_own(name) and (is_text(value) or (is_object and "content" in value)):
            found[name] = _token(name, value)
    return found | {name: _token(f"{_EXTRA}.{name}", value) for name, value in own.items()}


def _extra(values: Mapping[str, Any]) -> list[AddedToken]:
    extra = values.get(_EXTRA)
    if extra is None:
        return []
    if not isinstance(extra, list):
        raise bad_field(f"{_CONFIG}: {_EXTRA}", extra, "a list or an object of tokens")
    return [_token(f"{_EXTRA}[{index}]", token) for index, token in enumerate(extra)]


def _of_decoder(decoder: Any) -> dict[int, AddedToken]:
    name = "added_tokens_decoder"
    if not isinstance(decoder, Mapping):
        raise bad_field(f"{_CONFIG}: {name}", decoder, "an object of id: token")
    found = {}
    for token_id, value in decoder.items():
        if not token_id.isdecimal() or len(token_id) > 9:
            raise bad_field(f"{_CONFIG}: {name}", token_id, "token ids")
        found[int(token_id)] = _token(f"{name}.{token_id}", value, special=False)
    return found


def _of_added(added: Mapping[str, Any], special: set[str]) -> dict[int, AddedToken]:
    found = {}
    for text, token_id in added.items():
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not is_text(text):
            raise bad_field(f"{_ADDED}: {text[:40]!r}", token_id, "a token id")
        is_special = text in special
        found[token_id] = AddedToken(text, normalized=not is_special, special=is_special)
    return found


def _of_stored(stored: Iterable[Mapping[str, Any]]) -> dict[int, AddedToken]:
    """Read tokens that the tokenizers library has accepted."""
    return {
        token["id"]: AddedToken(token["content"], **{flag: token[flag] for flag in _FLAGS})
        for token in stored
    }


def _token(name: str, value: Any, *, special: bool = True) -> AddedToken:
    """Read one token: text, or an object of its text and how it is matched."""
    if is_text(value):
        return AddedToken(value, special=special)
    where = f"{_CONFIG} or {_MAP}: {name}"
    if not isinstance(value, Mapping) or not is_text(value.get("content")):
        raise bad_field(where, value, "text, or an object with the text as content")
    flags = {flag: value[flag] for flag in _FLAGS if value.get(flag) is not None}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise bad_field(where, value, "flags that are true or false")
    if special:
        flags["special"] = True
    return AddedToken(value["content"], **flags)
