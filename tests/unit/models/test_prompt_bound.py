"""The bound on a prompt's tokens: never above the true number, and none where none holds."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from flowprefill.errors import InvalidRequest, PromptTooLong
from flowprefill.models.checkpoint import open_checkpoint
from flowprefill.models.prompt_bound import PromptBound, prompt_bound
from flowprefill.models.tokenizer import Tokenizer, byte_of_character

MERGES = [("a", "b"), ("ab", "ab"), ("Ġ", "Ġ"), ("ĠĠ", "ĠĠ")]


def byte_level(left_out: str = "") -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer of 256 bytes, less some characters, and a few merges."""
    texts = [c for c in byte_of_character() if c not in left_out]
    texts += [left + right for left, right in MERGES]
    inner = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(texts)}, MERGES))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return inner


def byte_fallback() -> tokenizers.Tokenizer:
    """A sentencepiece-like BPE tokenizer that falls back to byte tokens."""
    texts = [f"<0x{byte:02X}>" for byte in range(256)] + ["\u2581", "a", "b", "ab", "\u2581ab"]
    merges = [("a", "b"), ("\u2581", "ab")]
    model = models.BPE({t: i for i, t in enumerate(texts)}, merges, byte_fallback=True)
    inner = tokenizers.Tokenizer(model)
    steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    inner.normalizer = normalizers.Sequence(steps)
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence(parts)
    return inner


def bound_of(inner: tokenizers.Tokenizer) -> PromptBound | None:
    return prompt_bound(json.loads(inner.to_str()), byte_of_character())


def with_nfc() -> tokenizers.Tokenizer:
    inner = byte_level()
    inner.normalizer = normalizers.NFC()
    return inner


def with_added() -> tokenizers.Tokenizer:
    inner = byte_level()
    inner.add_special_tokens(["<|a very long special token|>"])
    return inner


BOUNDED = {
    "bytes": byte_level(),
    "some bytes unknown": byte_level(left_out="\u0104\u0106"),
    "fallback": byte_fallback(),
    "nfc": with_nfc(),
    "added": with_added(),
    "packaged": open_checkpoint("smollm2-135m").tokenizer._inner,
}
BOUNDS = {name: bound_of(inner) for name, inner in BOUNDED.items()}
# What is long in bytes for its tokens: merges, control bytes, decomposed characters, spaces.
PIECES = st.sampled_from(
    ["abab", "    ", "\x04\x06", "\u1fbe\u0308\u0341", "\u212a", "\u2581ab", "\U0001f600", "x",
     "<|a very long special token|>", "<|im_start|>"]
) | st.text(max_size=4)  # fmt: skip


@pytest.mark.parametrize("name", BOUNDED)
@given(pieces=st.lists(PIECES, max_size=30))
@settings(max_examples=60, deadline=None)
def test_no_text_has_fewer_tokens_than_the_bound(name: str, pieces: list[str]) -> None:
    inner, text = BOUNDED[name], "".join(pieces).encode(errors="ignore").decode()
    bound = BOUNDS[name]
    assert bound is not None
    assert bound.fewest_tokens(text) <= len(inner.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("name", BOUNDED)
def test_long_text_is_refused_by_its_size_alone(name: str) -> None:
    tokenizer = Tokenizer(BOUNDED[name])
    tokenizer.check_fits("ab " * 20, 1000)
    with pytest.raises(PromptTooLong, match=r"got 3000000 characters, at least \d+ tokens"):
        tokenizer.check_fits("ab " * 1_000_000, 1000)


def strips() -> tokenizers.Tokenizer:
    inner = byte_level()
    inner.normalizer = normalizers.Strip()
    return inner


def eats_spaces() -> tokenizers.Tokenizer:
    inner = byte_level()
    inner.add_tokens([AddedToken("<mask>", lstrip=True)])
    return inner


def drops_spaces() -> tokenizers.Tokenizer:
    inner = byte_level()
    both = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(use_regex=False)]
    inner.pre_tokenizer = pre_tokenizers.Sequence(both)
    return inner


def fuses_unknown() -> tokenizers.Tokenizer:
    vocabulary = {"a": 0, "<unk>": 1}
    return tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True))


@pytest.mark.parametrize(
    ("inner", "text"),
    [
        (strips(), "a" + " " * 5000),
        (eats_spaces(), " " * 5000 + "<mask>"),
        (drops_spaces(), "a" + " " * 5000),
        (fuses_unknown(), "x" * 5000),
    ],
    ids=["strip", "lstrip", "whitespace", "fused"],
)
def test_tokenizer_that_swallows_text_has_no_bound(inner: Any, text: str) -> None:
    assert len(inner.encode(text).ids) <= 2
    assert bound_of(inner) is None
    Tokenizer(inner).check_fits(text, 10)


def test_long_and_short_texts_are_encoded_alike() -> None:
    tokenizer = open_checkpoint("smollm2-135m").tokenizer
    text = "The scheduler said: <|im_end|> na\u00efve \U0001f600\n" * 200
    ids = tokenizer._inner.encode(text, add_special_tokens=True).ids
    assert len(text) > 2000
    assert tokenizer.encode(text) == ids
    with pytest.raises(InvalidRequest, match="surrogates"):
        tokenizer.encode(text + "\udc00")


def test_other_threads_run_while_a_long_text_is_encoded() -> None:
    tokenizer = open_checkpoint("smollm2-135m").tokenizer
    text = "A long report about rivers, harbours and the winds between them. " * 16_000
    ticks, done = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.is_set():
            time.sleep(0.001)
            ticks += 1

    ticker = threading.Thread(target=tick)
    ticker.start()
    seen = []
    for _ in range(10):  # the best counts: other programs may want the cores meanwhile
        before = ticks
        tokenizer.encode(text)
        seen.append(ticks - before)
        if seen[-1] >= 10:
            break
    done.set()
    ticker.join()
    assert seen[-1] >= 10, f"the thread stood still for the whole text: {seen}"


class PanicException(BaseException):
    """As the library's Rust code raises it."""


class Panics:
    def encode(self, *_: Any, **__: Any) -> Any:
        raise PanicException("index out of bounds")

    encode_batch_fast = encode


@pytest.mark.parametrize("text", ["short", "long " * 1000], ids=["short", "long"])
def test_panic_of_the_library_is_a_bad_request(text: str) -> None:
    tokenizer = Tokenizer(byte_level())
    tokenizer._inner = Panics()  # type: ignore[assignment]
    with pytest.raises(InvalidRequest, match="prompt: the tokenizer fails on it"):
        tokenizer.encode(text)
