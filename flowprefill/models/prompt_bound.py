"""PromptBound: the fewest tokens a text can have, from its size alone; used by the tokenizer.

A prompt that cannot fit is refused by it before the tokenizer has spent a second on the prompt:

    fewest tokens = counted bytes / (bytes of the longest token's text x shrinkage)

Counted are the prompt's UTF-8 bytes without those that the vocabulary does not know (they are
dropped, or any number of them becomes one unknown token). Shrinkage is how many times shorter the
normaliser can make a text. The bound holds only where no step swallows text without limit; where
one may, there is none:

- normaliser: the Unicode forms make text at most 4 times shorter in UTF-8 (NFC at most 3.5 times:
  U+1FBE U+0308 U+0341 becomes U+0390), lower case at most 3 times (U+212A becomes k). Replacing a
  literal by a longer one and putting something in front do not shorten it. Others delete text.
- pre-tokeniser: splits that keep what they match. Others delete white space.
- model: byte-level BPE, or BPE and Unigram with a token for each byte. In others a character may
  be unknown, and which bytes then count cannot be told before normalising.
- added tokens: those with lstrip or rstrip take any amount of white space into them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_SHRINKAGE = {"NFC": 4, "NFD": 4, "NFKC": 4, "NFKD": 4, "Lowercase": 3, "Prepend": 1}
_KEEPING_SPLITS = {"ByteLevel", "Digits", "Metaspace", "Punctuation", "Split", "UnicodeScripts"}


@dataclass(frozen=True, slots=True)
class PromptBound:
    """What one tokenizer can do at most with a text's bytes.

    Attributes:
        bytes_per_token: counted bytes that one token stands for at most, >= 1.
        unknown_bytes: bytes that are not counted.
    """

    bytes_per_token: int
    unknown_bytes: bytes = b""

    def fewest_tokens(self, text: str) -> int:
        """Return the bound for one text. Cost: a pass in C, about a millisecond per megabyte."""
        raw = text.encode(errors="ignore")  # lone surrogates: the tokenizer refuses them
        if self.unknown_bytes:
            raw = raw.translate(None, self.unknown_bytes)
        return -(-len(raw) // self.bytes_per_token)


def prompt_bound(
    tokenizer: Mapping[str, Any], byte_of_character: Mapping[str, int]
) -> PromptBound | None:
    """Work out the bound of a tokenizer.

    Args:
        tokenizer: content of a ``tokenizer.json``.
        byte_of_character: how byte-level vocabularies write the 256 bytes.

    Returns:
        The bound; None if there is none.
    """
    shrinkage = _shrinkage(tokenizer.get("normalizer"))
    splits = _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    added = tokenizer.get("added_tokens") or []
    if shrinkage is None or any(token["lstrip"] or token["rstrip"] for token in added):
        return None
    if any(s["type"] not in _KEEPING_SPLITS or s.get("behavior") == "Removed" for s in splits):
        return None
    model = tokenizer["model"]
    tokens = _vocabulary(model)
    longest = max((len(token["content"].encode()) for token in added), default=1)
    if model["type"] == "BPE" and any(step["type"] == "ByteLevel" for step in splits):
        # A character of such a token stands for one byte.
        unknown = bytes(b for character, b in byte_of_character.items() if character not in tokens)
        longest = max(longest, *map(len, tokens))
        # Normalising can turn counted bytes into unknown ones.
        return None if unknown and shrinkage > 1 else PromptBound(longest * shrinkage, unknown)
    if model.get("byte_fallback") and all(f"<0x{byte:02X}>" in tokens for byte in range(256)):
        return PromptBound(max(longest, *(len(t.encode()) for t in tokens)) * shrinkage)
    return None


def _shrinkage(normalizer: Mapping[str, Any] | None) -> int | None:
    """How many times shorter in UTF-8 the normaliser can make a text; None if without bound."""
    product = 1
    for step in _steps(normalizer, "normalizers"):
        kind = step["type"]
        if kind == "Replace":
            pattern = step["pattern"].get("String")
            if not pattern or len(step["content"].encode()) < len(pattern.encode()):
                return None
        elif kind in _SHRINKAGE:
            product *= _SHRINKAGE[kind]
        else:
            return None
    return product


def _steps(part: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """Return the steps of a normaliser or pre-tokeniser, nested sequences laid out flat."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for inner in part[key] for step in _steps(inner, key)]
    return [part]


def _vocabulary(model: Mapping[str, Any]) -> set[str]:
    """Return the texts of the model's tokens; at least one."""
    vocabulary: Iterable[Any] = model.get("vocab") or ()
    if model["type"] == "Unigram":
        vocabulary = (token for token, _ in vocabulary)
    return {"", *vocabulary}
