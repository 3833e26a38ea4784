"""Tokenizer and IncrementalDecoder on the tokenizers library, sentencepiece and random tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from flowprefill.errors import CheckpointError, InvalidRequest
from flowprefill.models.gguf_tokenizer import SPLITTINGS, build_tokenizer
from flowprefill.models.model_config import ModelConfig
from flowprefill.models.tokenizer import Tokenizer, byte_of_character

SENTENCEPIECE = json.loads((Path(__file__).parent / "sentencepiece_bpe.json").read_text("utf-8"))
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
WORDS = ["Ġthe", "ing", "Ġ\u00c3", "\u00c3\u00a9", "<|user|>x y"]


class FakeHeader:
    """Stands in for a GGUF header: the tokenizer's keys only."""

    def __init__(self, **values: Any) -> None:
        self.values = {f"tokenizer.ggml.{key}": value for key, value in values.items()}

    def get(self, key: str, kind: Any, default: Any = None) -> Any:
        value = self.values.get(key, default)
        if not isinstance(value, kind):
            raise CheckpointError(f"{key}: got {value!r}", param=key)
        return value


def config(**values: Any) -> ModelConfig:
    sizes = dict.fromkeys(
        ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads",
         "num_kv_heads", "max_position"), 1
    )  # fmt: skip
    return ModelConfig(family="llama", head_dim=2, rms_eps=1e-5, rope_theta=1e4, **(sizes | values))


def gguf_tokenizer(bos: int | None = None, **values: Any) -> Tokenizer:
    header: Any = FakeHeader(**values)
    return build_tokenizer(header, config(bos_token_id=bos, eos_token_ids=(2,)))


def byte_level() -> tokenizers.Tokenizer:
    """All bytes, some longer tokens, two control tokens and a plain added one with spaces."""
    vocabulary = {token: index for index, token in enumerate([*ALPHABET, *WORDS[:4]])}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<s>", "</s>"])
    inner.add_tokens([AddedToken(WORDS[4], normalized=False)])
    return inner


INNER = byte_level()
TOKENIZER = Tokenizer(INNER, bos_id=INNER.token_to_id("<s>"), eos_ids=[INNER.token_to_id("</s>")])
SPIECE = gguf_tokenizer(
    bos=1,
    model="llama",
    tokens=SENTENCEPIECE["tokens"],
    scores=SENTENCEPIECE["scores"],
    token_type=SENTENCEPIECE["types"],
)


def stream(tokenizer: Tokenizer, ids: list[int], skip_special_tokens: bool = True) -> list[str]:
    decoder = tokenizer.incremental_decoder(skip_special_tokens)
    return [*(decoder.push(token_id) for token_id in ids), decoder.flush()]


def test_byte_table_is_that_of_the_library() -> None:
    table = byte_of_character()
    assert sorted(table) == ALPHABET
    assert sorted(table.values()) == list(range(256))


@given(ids=st.lists(st.integers(0, INNER.get_vocab_size() - 1), max_size=60), skip=st.booleans())
def test_pieces_of_random_tokens_join_to_the_library_decoding(ids: list[int], skip: bool) -> None:
    expected = INNER.decode(ids, skip_special_tokens=skip)
    assert "".join(stream(TOKENIZER, ids, skip)) == expected
    assert TOKENIZER.decode(ids, skip) == expected


MARK = decoders.Replace("\u2581", " ")
BYTES, FUSE, STRIP = decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)


def with_decoder(*steps: Any) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer.from_str(SPIECE._inner.to_str())
    inner.decoder = decoders.Sequence(list(steps))
    return inner


@pytest.mark.parametrize(
    "steps",
    [
        (MARK, BYTES, FUSE, STRIP),
        (BYTES, MARK, FUSE),
        (MARK, BYTES),
        (BYTES, decoders.Metaspace(prepend_scheme="never")),
        (BYTES, decoders.Metaspace()),
    ],
)
def test_sentencepiece_decoders_are_those_of_the_library(steps: tuple[Any, ...]) -> None:
    inner = with_decoder(*steps)
    ours = Tokenizer(inner)
    for text in (" a 🙂 b", "a", "  b ☃", "x\n y"):
        ids = inner.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == inner.decode(ids)


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ((MARK, BYTES, FUSE, decoders.Strip(" ", 2, 0)), "'start': 2"),
        ((MARK, BYTES, FUSE, decoders.Strip("a", 1, 0)), "'content': 'a'"),
        ((decoders.Replace("_", " "), BYTES, FUSE), "'_'"),
        ((decoders.Metaspace(replacement="_"), BYTES), "'_'"),
        ((MARK, BYTES, STRIP), r"Replace\+ByteFallback\+Strip"),
        ((MARK, MARK, BYTES), r"Replace\+Replace"),
        ((BYTES, FUSE), r"ByteFallback\+Fuse"),
        ((FUSE, MARK, BYTES), r"Fuse\+Replace"),
    ],
)
def test_a_decoder_of_another_spelling_is_refused(steps: tuple[Any, ...], name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"decoder: got .*{name}"):
        Tokenizer(with_decoder(*steps))


@given(text=st.text(max_size=80))
def test_unicode_text_survives_byte_level_tokens(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert ids == INNER.encode(text).ids
    assert TOKENIZER.decode(ids) == text
    assert "".join(stream(TOKENIZER, ids)) == text


# Its tokens write a space so: one of the text's own comes back as a space.
@given(text=st.text(st.characters(exclude_characters="\u2581"), max_size=80))
def test_unicode_text_survives_sentencepiece_tokens(text: str) -> None:
    ids = SPIECE.encode(text, add_special_tokens=False)
    assert SPIECE.decode(ids) == text
    assert "".join(stream(SPIECE, ids)) == text


def test_character_over_several_tokens_comes_when_complete() -> None:
    ids = TOKENIZER.encode("a🙂b")
    assert stream(TOKENIZER, ids) == ["a", "", "", "", "🙂", "b", ""]
    assert stream(TOKENIZER, ids[:3]) == ["a", "", "", "\ufffd"]


def test_every_prefix_pushed_is_a_prefix_of_the_text() -> None:
    text = "naïve 🙂 東京\n  end"
    pieces = stream(TOKENIZER, TOKENIZER.encode(text))
    for count in range(len(pieces)):
        assert text.startswith("".join(pieces[:count]))


def test_special_tokens_are_left_out_unless_wanted() -> None:
    ids = [TOKENIZER.token_id("<s>") or -1, *TOKENIZER.encode("hi"), TOKENIZER.eos_ids[0]]
    assert TOKENIZER.decode(ids) == "hi"
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == "<s>hi</s>"
    assert TOKENIZER.is_special(ids[0])
    assert not TOKENIZER.is_special(ids[1])


def test_ids_outside_the_vocabulary_are_nothing() -> None:
    size = TOKENIZER.vocab_size
    assert TOKENIZER.decode([size, size + 1000, -1]) == ""
    assert TOKENIZER.token_bytes(size) == b""
    assert TOKENIZER.token_bytes(TOKENIZER.encode("é")[0]) == b"\xc3"


def test_broken_surrogates_name_the_prompt() -> None:
    with pytest.raises(InvalidRequest, match=r"prompt: got .*ud800.*surrogates") as caught:
        TOKENIZER.encode("x\ud800y")
    assert caught.value.param == "prompt"


def test_truncation_and_padding_of_the_file_are_switched_off() -> None:
    inner = byte_level()
    inner.enable_truncation(2)
    inner.enable_padding(length=8)
    assert len(Tokenizer(inner).encode("abcd")) == 4


def test_flush_makes_the_decoder_usable_again() -> None:
    decoder = SPIECE.incremental_decoder()
    ids = SPIECE.encode("Hello", add_special_tokens=False)
    for _ in range(2):
        assert "".join([decoder.push(token_id) for token_id in ids]) + decoder.flush() == "Hello"


def test_sentencepiece_gguf_encodes_as_sentencepiece_did() -> None:
    for text, ids in zip(SENTENCEPIECE["texts"], SENTENCEPIECE["ids"], strict=True):
        assert SPIECE.encode(text, add_special_tokens=False) == ids, text
        assert SPIECE.encode(text) == [1, *ids]
        assert SPIECE.decode(ids) == text


def test_first_space_of_sentencepiece_is_kept_when_text_goes_on() -> None:
    ids = SPIECE.encode("the run", add_special_tokens=False)
    decoder = SPIECE.incremental_decoder(keeps_space=True)
    assert "".join(decoder.push(token_id) for token_id in ids) == " the run"


def test_broken_bytes_of_sentencepiece_become_replacement_characters() -> None:
    first = SPIECE.token_id("<0xE6>")
    assert first is not None
    word = SPIECE.encode("the", add_special_tokens=False)
    assert SPIECE.decode([first, *word]) == "\ufffd the"


def test_tokens_without_a_decoder_are_words() -> None:
    inner = tokenizers.Tokenizer(models.WordLevel({"one": 0, "two": 1}, unk_token="one"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = Tokenizer(inner)
    assert tokenizer.decode(tokenizer.encode("one two one")) == inner.decode([0, 1, 0])


BYTES = {"model": "gpt2", "tokens": [*ALPHABET, "12", "123"], "merges": ["1 2", "12 3"]}
SPLIT = {name: gguf_tokenizer(**BYTES, pre=name)._inner.pre_tokenizer for name in SPLITTINGS}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("smollm", ["It", "'s", "Ġ", "1", "2", "3", "4", "ĠABc", "!?", "ĊĊ"]),
        ("gpt-2", ["It", "'s", "Ġ1234", "ĠABc", "!?", "ĊĊ"]),
        ("llama-bpe", ["It", "'s", "Ġ", "123", "4", "ĠABc", "!?ĊĊ"]),
        ("qwen2", ["It", "'s", "Ġ", "1", "2", "3", "4", "ĠABc", "!?ĊĊ"]),
        ("tekken", ["It", "'s", "Ġ", "1", "2", "3", "4", "ĠABc", "!?ĊĊ"]),
        ("default", ["It", "'", "s", "Ġ", "123", "4", "ĠABc", "!?", "ĊĊ"]),
    ],
)
def test_text_is_split_as_the_model_was_trained(name: str, words: list[str]) -> None:
    split = SPLIT[name].pre_tokenize_str("It's 1234 ABc!?\n\n")
    assert [word for word, _ in split] == words


@given(text=st.text(st.sampled_from("ab'sZé東1٣ \t\n\r.!$_🙂"), max_size=30))
def test_gpt2_and_smollm_split_as_the_library_does(text: str) -> None:
    theirs = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    expected = {"gpt-2": theirs, "smollm": pre_tokenizers.Sequence([digits, theirs])}
    for name, splitter in expected.items():
        ours = SPLIT[name].pre_tokenize_str(text)
        assert [word for word, _ in ours] == [word for word, _ in splitter.pre_tokenize_str(text)]


@pytest.mark.parametrize("name", SPLITTINGS)
def test_every_splitting_keeps_the_text(name: str) -> None:
    tokenizer = gguf_tokenizer(**BYTES, pre=name)
    text = "It's 1234 ABc!?\n\n  naïve  東京🙂\r\n\t end "
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bos_of_a_gguf_follows_the_key_then_the_model() -> None:
    plain = {**BYTES, "pre": "llama-bpe"}
    assert gguf_tokenizer(bos=0, **plain).encode("a")[0] == 0
    assert gguf_tokenizer(bos=0, **plain, add_bos_token=False).encode("a")[0] != 0
    assert gguf_tokenizer(bos=0, **{**BYTES, "pre": "qwen2"}).encode("a")[0] != 0


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"pre": "chatglm-bpe"}, ["tokenizer.ggml.pre", "chatglm-bpe", "smollm"]),
        ({"model": "rwkv"}, ["tokenizer.ggml.model", "rwkv", "gpt2 or llama"]),
        ({"tokens": []}, ["tokenizer.ggml.tokens", "list of texts"]),
        ({"token_type": [1]}, ["tokenizer.ggml.token_type", "1 entries", "258"]),
        ({"merges": ["q zz"]}, ["tokenizer.ggml.merges", "pairs of tokens"]),
        ({"model": "llama", "scores": [0.0]}, ["tokenizer.ggml.scores", "1 entries", "258"]),
        ({"model": "llama"}, ["tokenizer.ggml.scores"]),
    ],
)
def test_bad_gguf_tokenizer_names_the_key(changes: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        gguf_tokenizer(**({**BYTES, "pre": "smollm"} | changes))
    for name in names:
        assert name in caught.value.message
