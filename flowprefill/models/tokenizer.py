"""Tokenizer and IncrementalDecoder: text to token ids, and back while they are generated.

Built by the checkpoint readers around the ``tokenizers`` library; used by engine and server.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import Any

import tokenizers

from flowprefill.errors import CheckpointError, InvalidRequest, PromptTooLong, overflow, shortened
from flowprefill.models.prompt_bound import prompt_bound

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
# Texts up to this length are encoded on the caller's thread, in about a millisecond at most; longer
# ones without the GIL, by a thread of the tokenizers library, which costs a change of threads.
_SHORT_CHARS = 2000
_WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"  # how sentencepiece writes a space


class Pieces(Enum):
    """How token strings spell bytes."""

    BYTE_LEVEL = "byte_level"  # every character stands for one byte (GPT-2's table)
    SENTENCEPIECE = "sentencepiece"  # text with a mark for spaces, bytes as <0xXX>
    WORDS = "words"  # plain words, joined by spaces


def byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins for all 256 bytes (Radford et al. 2019, released encoder)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return table


class Tokenizer:
    """One model's tokenizer.

    Attributes:
        bos_id: beginning-of-sequence token, or None.
        eos_ids: every token that ends a text.

    Thread: any; encoding a long text releases the GIL.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        *,
        bos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        add_bos: bool | None = None,
        last_id: int | None = None,
        literal_ids: Iterable[int] = (),
    ) -> None:
        """Wrap a tokenizer.

        Args:
            inner: the tokenizer; truncation and padding are switched off.
            bos_id: id of the beginning-of-sequence token.
            eos_ids: ids that end a text.
            add_bos: whether encoding with special tokens starts with bos_id; None leaves that to
                ``inner``'s own post-processor.
            last_id: token that encoding with special tokens puts at the end; embedding models
                have one.
            literal_ids: tokens whose string is their text, not a spelling of it.

        Raises:
            CheckpointError: its decoder is of a kind that cannot be streamed.
        """
        inner.no_truncation()
        inner.no_padding()
        description: dict[str, Any] = json.loads(inner.to_str())
        self._inner = inner
        self.bos_id = bos_id
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self._add_bos = add_bos if bos_id is not None else None
        self._last_id = last_id
        self._pieces, self._strips_space = _pieces_of(description)
        self._bytes_table = byte_of_character()
        self._bound = prompt_bound(description, self._bytes_table)
        self._cache: dict[int, bytes] = {}
        self._literal = frozenset(literal_ids)
        added = inner.get_added_tokens_decoder()
        self._special = frozenset(token_id for token_id, token in added.items() if token.special)

    @property
    def joins_words(self) -> bool:
        """Whether decoding puts spaces between tokens, so that a text is not its tokens' bytes."""
        return self._pieces is Pieces.WORDS

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model's vocabulary may be padded beyond it."""
        return self._inner.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Turn text into token ids.

        Args:
            text: special tokens written in it become those tokens.
            add_special_tokens: add what the model expects around a plain prompt (BOS).

        Raises:
            InvalidRequest: the text has lone surrogates (broken UTF-8 of the caller), or the
                tokenizer cannot encode it; names ``prompt``.

        Cost: O(len(text)), about a microsecond per token; see check_fits to refuse what is too
        long before paying it.
        """
        ids = self._encode(text, add_special_tokens)
        if add_special_tokens and self._add_bos is not None:
            starts = bool(ids) and ids[0] == self.bos_id
            if self._add_bos and not starts and self.bos_id is not None:
                ids.insert(0, self.bos_id)
            elif not self._add_bos and starts and not self._writes_bos(text):
                del ids[0]
        if add_special_tokens and self._last_id is not None and ids[-1:] != [self._last_id]:
            ids.append(self._last_id)
        return ids

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                allowed = "valid Unicode without lone surrogates"
                raise InvalidRequest.field("prompt", text, allowed) from None
        try:
            if len(text) <= _SHORT_CHARS:
                short = self._inner.encode(text, add_special_tokens=add_special_tokens)
                return list(short.ids)
            # encode() holds the GIL for the whole text; of the library's ways this one does not,
            # and it leaves out the offsets, which no caller reads.
            batch = self._inner.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            return list(batch[0].ids)
        except BaseException as error:
            if not is_library_error(error):
                raise
            message = f"prompt: the tokenizer fails on it ({error})"
            raise InvalidRequest(message, param="prompt") from None

    def check_fits(self, text: str, max_tokens: int) -> None:
        """Refuse a prompt by its size, before any time goes into tokenising it.

        Raises:
            PromptTooLong: however it is tokenised, it has ``max_tokens`` tokens or more, and one
                more is to be generated.
        """
        fewest = 0 if self._bound is None else self._bound.fewest_tokens(text)
        if fewest >= max_tokens:
            raise PromptTooLong(
                f"prompt: got {len(text)} characters, at least {fewest} tokens, expected at most "
                f"{max_tokens - 1}, for one is to generate. {overflow(max_tokens)}",
                param="prompt",
            )

    def _writes_bos(self, text: str) -> bool:
        bos = self._inner.id_to_token(self.bos_id) if self.bos_id is not None else None
        return bos is not None and text.startswith(bos)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Turn token ids into text; unknown ids are nothing, broken UTF-8 is U+FFFD."""
        decoder = IncrementalDecoder(self, skip_special_tokens)
        return "".join([decoder.push(token_id) for token_id in ids]) + decoder.flush()

    def is_special(self, token_id: int) -> bool:
        """Whether a token is a control token, which output text leaves out."""
        return token_id in self._special

    def token_id(self, text: str) -> int | None:
        """Id of the token spelled exactly so in the vocabulary, or None."""
        return self._inner.token_to_id(text)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for, as UTF-8 that may be a part of a character; b"" if unknown."""
        known = self._cache.get(token_id)
        if known is None:
            known = self._cache[token_id] = self._spell(token_id)
        return known

    def _spell(self, token_id: int) -> bytes:
        token = self._inner.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        if token is None:
            return b""
        if token_id in self._literal:
            return token.encode()
        if self._pieces is Pieces.BYTE_LEVEL:
            table = self._bytes_table
            if all(character in table for character in token):
                return bytes(table[character] for character in token)
            return token.encode()
        if self._pieces is Pieces.SENTENCEPIECE:
            match = _BYTE_TOKEN.fullmatch(token)
            return bytes([int(match[1], 16)]) if match else token.replace(_WORD_START, " ").encode()
        return token.encode()

    def incremental_decoder(
        self, skip_special_tokens: bool = True, keeps_space: bool = False
    ) -> IncrementalDecoder:
        """Make the decoder of one request; see IncrementalDecoder."""
        return IncrementalDecoder(self, skip_special_tokens, keeps_space)


class IncrementalDecoder:
    """Gives the text of a growing token sequence as soon as it is final.

    All pushes joined with the flush are ``Tokenizer.decode`` of all ids. One per request, one
    thread at a time.
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool = True, keeps_space: bool = False
    ) -> None:
        """Start with no tokens.

        Args:
            tokenizer: whose ids are pushed.
            skip_special_tokens: leave control tokens out of the text.
            keeps_space: keep the space that sentencepiece vocabularies put before a first word;
                wanted when the text continues another, as in completions.
        """
        self._tokenizer = tokenizer
        self._skips_special = skip_special_tokens
        self._strips_space = tokenizer._strips_space and not keeps_space
        self._joins_words = tokenizer._pieces is Pieces.WORDS
        self._is_first = True
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Take one token.

        Returns:
            Text that became final: empty while a character is incomplete.

        Cost: O(bytes of the token).
        """
        if self._skips_special and self._tokenizer.is_special(token_id):
            return ""
        piece = self._tokenizer.token_bytes(token_id)
        if not piece:
            return ""
        if self._is_first:
            self._is_first = False
            if self._strips_space:
                piece = piece.removeprefix(b" ")
        elif self._joins_words:
            piece = b" " + piece
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """End the text: an incomplete character becomes U+FFFD. The decoder starts afresh."""
        self._is_first = True
        return self._utf8.decode(b"", final=True)


def is_library_error(error: BaseException) -> bool:
    """Whether the tokenizers library raised it: plain Exception, or a panic of its Rust code.

    A panic is a BaseException, which ``except Exception`` lets through.
    """
    return type(error) is Exception or type(error).__name__ == "PanicException"


def _pieces_of(description: Mapping[str, Any]) -> tuple[Pieces, bool]:
    """Read from the decoder how tokens are spelled, and whether the first word's space goes."""
    decoder = description.get("decoder")
    if decoder is None:
        return Pieces.WORDS, False
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return Pieces.BYTE_LEVEL, False
    odd = next((step for step in steps if not _is_usual(step)), None)
    if odd is None and (kinds == ["Metaspace"] or _joins_bytes(kinds)):
        marks = (step for step in steps if step["type"] == "Metaspace")
        strips = any(step.get("prepend_scheme", "always") != "never" for step in marks)
        return Pieces.SENTENCEPIECE, "Strip" in kinds or strips
    got = "+".join(kinds)
    if odd is not None and odd["type"] in _USUAL:
        got += f" with {shortened(dict(odd))}"
    raise CheckpointError(
        f"tokenizer.json: decoder: got {got}, expected ByteLevel or sentencepiece's "
        f"(Replace of {_WORD_START!r} by a space, ByteFallback, Fuse, Strip of a space at the "
        "start; or Metaspace)",
        param="decoder",
    )


# What steps of sentencepiece's decoders say.
_USUAL: Mapping[str, Mapping[str, Any]] = {
    "Replace": {"pattern": {"String": _WORD_START}, "content": " "},
    "ByteFallback": {},
    "Fuse": {},
    "Strip": {"content": " ", "start": 1, "stop": 0},
    "Metaspace": {"replacement": _WORD_START},
}


def _is_usual(step: Mapping[str, Any]) -> bool:
    return step["type"] in _USUAL and _USUAL[step["type"]].items() <= step.items()


def _joins_bytes(kinds: Sequence[str]) -> bool:
    """Whether marks become spaces and bytes characters; what is joined then may lose a space."""
    marks, end = set(kinds[:2]), list(kinds[2:])
    spells = marks in ({"Replace", "ByteFallback"}, {"Metaspace", "ByteFallback"})
    return spells and end in ([], ["Fuse"], ["Fuse", "Strip"])
