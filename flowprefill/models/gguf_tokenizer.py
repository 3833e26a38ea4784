"""Builds a Tokenizer from a GGUF file's ``tokenizer.ggml`` keys; called by gguf_file."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from flowprefill.errors import CheckpointError
from flowprefill.models.gguf_metadata import GgufMetadata
from flowprefill.models.model_config import ModelConfig
from flowprefill.models.tokenizer import Tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type
_LITERAL = (_UNKNOWN, _CONTROL, _USER_DEFINED)  # their text is plain text, in no spelling
_WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"

# Published in the models' own tokenizer.json files; the GGUF key names which one was used.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Tokens that end a text by their name, whatever the file's keys say: converters of years left
# out which tokens end a turn. As in llama.cpp.
_END_NAMES = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
    "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
    "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "[e~[",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
})  # fmt: skip
# Names that end a text only where none of these sets is in the vocabulary.
_NO_END_WITH = {
    "<|end|>": ({"<|return|>", "<|call|>"}, {"<|return|>", "<|calls|>"},
                {"<|flush|>", "<|call|>"}, {"<|flush|>", "<|calls|>"}),
    "</s>": ({"<|tool_response>"},),
}  # fmt: skip
# Markers of code models: what comes after them is another file.
_FILE_MARKS = frozenset({
    "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]",
    "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>",
})  # fmt: skip

# Finding what a token is merged from costs the square of its length.
MAX_TOKEN_CHARS = 4096


@dataclass(frozen=True, slots=True)
class _Splitting:
    """How text is cut into words before merging.

    Attributes:
        patterns: applied one after another; a match and what lies between matches are words.
        ignore_merges: a word that is a token stays whole.
        nfc: text is normalised first.
        add_bos: default where the file does not say.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    nfc: bool = False
    add_bos: bool = False


_LLAMA3_SPLITTING = _Splitting((_LLAMA3,), ignore_merges=True, add_bos=True)
_QWEN2_SPLITTING = _Splitting((_QWEN2,), nfc=True)
SPLITTINGS = {
    "smollm": _Splitting((r"\p{N}", _GPT2)),
    "gpt-2": _Splitting((_GPT2,)),
    "llama-bpe": _LLAMA3_SPLITTING,
    "llama3": _LLAMA3_SPLITTING,
    "llama-v3": _LLAMA3_SPLITTING,
    "qwen2": _QWEN2_SPLITTING,
    "deepseek-r1-qwen": _QWEN2_SPLITTING,
    "tekken": _Splitting((_TEKKEN,), ignore_merges=True, add_bos=True),
    "default": _Splitting((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """Tokens by id, their types and the lookup by text."""

    tokens: Sequence[str]
    types: Sequence[int]
    ids: dict[str, int]


def build_tokenizer(metadata: GgufMetadata, config: ModelConfig) -> Tokenizer:
    """Build the tokenizer a file describes.

    Args:
        metadata: the file's header.
        config: the model's, for its first and last tokens.

    Raises:
        CheckpointError: a key is missing or inconsistent, or the tokenizer is of a kind that is not
            supported; names the key.
    """
    vocabulary = _vocabulary(metadata)
    kind = metadata.get("tokenizer.ggml.model", str)
    if kind == "gpt2":
        inner, add_bos = _byte_level(metadata, vocabulary)
    elif kind == "llama":
        inner, add_bos = _sentencepiece(metadata, vocabulary), True
    else:
        raise _bad("tokenizer.ggml.model", kind, "gpt2 or llama")
    ends = end_tokens(vocabulary.ids)
    _add_special(inner, vocabulary, ends)
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", bool, add_bos)
    ends_prompts = metadata.get("tokenizer.ggml.add_eos_token", bool, False)
    return Tokenizer(
        inner,
        bos_id=config.bos_token_id,
        eos_ids=(*config.eos_token_ids, *ends),
        add_bos=add_bos,
        # The first is that of the key eos_token_id, if the file has one.
        last_id=next(iter(config.eos_token_ids), None) if ends_prompts else None,
        literal_ids=[i for i, kind in enumerate(vocabulary.types) if kind in _LITERAL],
    )


def end_tokens(ids: Mapping[str, int]) -> tuple[int, ...]:
    """Return the tokens of a vocabulary that end a text by their name, ascending."""
    names = {name for name in _END_NAMES | _FILE_MARKS if name in ids}
    for name, others in _NO_END_WITH.items():
        if any(other <= names for other in others):
            names.discard(name)
    return tuple(sorted(ids[name] for name in names))


def _vocabulary(metadata: GgufMetadata) -> _Vocabulary:
    tokens = _texts(metadata, "tokenizer.ggml.tokens")
    types = metadata.get("tokenizer.ggml.token_type", list, [_NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise _bad("tokenizer.ggml.token_type", f"{len(types)} entries", f"{len(tokens)}")
    ids: dict[str, int] = {}
    for token_id, token in enumerate(tokens):
        if len(token) > MAX_TOKEN_CHARS:
            allowed = f"at most {MAX_TOKEN_CHARS} characters"
            raise _bad(f"tokenizer.ggml.tokens[{token_id}]", f"{len(token)} characters", allowed)
        ids.setdefault(token, token_id)
    return _Vocabulary(tokens, types, ids)


def _byte_level(
    metadata: GgufMetadata, vocabulary: _Vocabulary
) -> tuple[tokenizers.Tokenizer, bool]:
    name = metadata.get("tokenizer.ggml.pre", str, "default")
    if name not in SPLITTINGS:
        raise _bad("tokenizer.ggml.pre", name, "one of " + ", ".join(SPLITTINGS))
    splitting = SPLITTINGS[name]
    merges: list[tuple[str, str]] = []
    for merge in _texts(metadata, "tokenizer.ggml.merges"):
        left, _, right = merge.partition(" ")
        merges.append((left, right))
    try:
        model = models.BPE(vocabulary.ids, merges, ignore_merges=splitting.ignore_merges)
    except Exception as error:  # the library raises plain Exception
        raise _bad("tokenizer.ggml.merges", str(error), "pairs of tokens") from None
    inner = tokenizers.Tokenizer(model)
    if splitting.nfc:
        inner.normalizer = normalizers.NFC()
    steps: list[Any] = [
        pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splitting.patterns
    ]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    inner.pre_tokenizer = pre_tokenizers.Sequence(steps)
    inner.decoder = decoders.ByteLevel()
    return inner, splitting.add_bos


def _sentencepiece(metadata: GgufMetadata, vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    """Byte-pair encoding whose merges are ranked by the score of what they make."""
    scores = metadata.get("tokenizer.ggml.scores", list)
    if len(scores) != len(vocabulary.tokens):
        raise _bad("tokenizer.ggml.scores", f"{len(scores)} entries", f"{len(vocabulary.tokens)}")
    unknown = [t for t, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
               if kind == _UNKNOWN]  # fmt: skip
    model = models.BPE(
        vocabulary.ids,
        _ranked_merges(vocabulary, scores),
        unk_token=unknown[0] if unknown else None,
        fuse_unk=True,
        byte_fallback=True,
    )
    inner = tokenizers.Tokenizer(model)
    adds_prefix = metadata.get("tokenizer.ggml.add_space_prefix", bool, True)
    steps: list[Any] = [normalizers.Prepend(_WORD_START)] if adds_prefix else []
    inner.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _WORD_START)])
    strip = [decoders.Strip(" ", 1, 0)] if adds_prefix else []
    inner.decoder = decoders.Sequence(
        [decoders.Replace(_WORD_START, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return inner


def _ranked_merges(vocabulary: _Vocabulary, scores: Sequence[float]) -> list[tuple[str, str]]:
    normal = {
        token: token_id
        for token, token_id in vocabulary.ids.items()
        if vocabulary.types[token_id] == _NORMAL
    }
    if not isinstance(scores[0], (int, float)):
        raise _bad("tokenizer.ggml.scores", scores[:3], "numbers")
    ranked: list[tuple[float, int, int, tuple[str, str]]] = []
    for token, token_id in normal.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in normal and right in normal:
                rank = (-scores[token_id], normal[left], normal[right], (left, right))
                ranked.append(rank)
    ranked.sort()
    return [pair for _, _, _, pair in ranked]


def _add_special(
    inner: tokenizers.Tokenizer, vocabulary: _Vocabulary, ends: Collection[int]
) -> None:
    special: list[str | AddedToken] = []
    plain: list[str | AddedToken] = []
    for token_id, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if token and (kind in (_CONTROL, _UNKNOWN) or token_id in ends):
            special.append(AddedToken(token, special=True, normalized=False))
        elif kind == _USER_DEFINED and token:
            plain.append(AddedToken(token, special=False, normalized=False))
    inner.add_special_tokens(special)
    inner.add_tokens(plain)


def _texts(metadata: GgufMetadata, key: str) -> list[str]:
    values: list[Any] = metadata.get(key, list)
    if not values or not isinstance(values[0], str):
        raise _bad(key, values[:3], "a list of texts")
    return values


def _bad(key: str, value: Any, allowed: str) -> CheckpointError:
    return CheckpointError(f"{key}: got {str(value)[:120]!r}, expected {allowed}", param=key)
