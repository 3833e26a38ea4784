"""Patterns of tokenizers: those of real models pass, those that may take for ever do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flowprefill.errors import CheckpointError
from flowprefill.models.split_pattern import why_slow
from flowprefill.models.tokenizer_file import read_tokenizer_json

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"


@pytest.mark.parametrize(
    "pattern",
    [
        # The published splits of GPT-2, of cl100k and its kin, of o200k and its kin, and others.
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lo}\p{M}]*[\p{Ll}\p{Lo}\p{M}]+" + CONTRACTIONS + r"?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
        r"[\p{Lu}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{M}&&[^\p{Han}]]+", r" ?[^(\s|[.,!?])]+", r" {2,}",
        r"(?:\r?\n)+", r"[]a]+", r"\(a+\)+", "a{", "(", ")", "\\", "[", "(?", "", "{2}", None, 7,
    ],
)  # fmt: skip
def test_patterns_of_real_models_and_broken_ones_are_left_to_the_library(pattern: Any) -> None:
    assert why_slow(pattern) == ""


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a+)+b", r"(a*)*b", r"(?:a|a)*b", r"(?i:(\s+))+x", r"((a{1,20}){1,20}){1,20}b",
        r"(a+){2,}b", r"([a-z]+)*?\d", r"(?>(?<n>a+)b?)+", r"((a|b)c)+", r"(a+)\1", r"(a+){20}",
        r"\g<1>", r"(?<x>a)\k<x>", r"a*b*c*d*e", r"x(a*a*)(a*a*)", "a" * 5000, r"(a(b+)?)+",
    ],
)  # fmt: skip
def test_patterns_that_may_take_for_ever_are_refused(pattern: str) -> None:
    assert why_slow(pattern)


def replacing(*contents: str) -> dict[str, Any]:
    steps = [{"type": "Replace", "pattern": {"String": "a"}, "content": c} for c in contents]
    return {"normalizer": {"type": "Sequence", "normalizers": steps}}


def splitting(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split]}}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (splitting(r"(\s+)+x"), "pre_tokenizer: pattern"),
        (replacing(*["aa"] * 30), "normalizer: its replacements"),
        (replacing("a" * 1000), "normalizer: its replacements"),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": "(a+)+"}, "content": ""}}, "(a+)"),
    ],
)
def test_file_of_a_slow_tokenizer_is_refused(
    values: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError) as caught:
        read_tokenizer_json(path)
    assert words in caught.value.message
    assert str(path) in caught.value.message


def test_file_with_marks_for_spaces_passes(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(replacing("\u2581") | splitting(r"\s+(?!\S)|\s+")))
    read_tokenizer_json(path)
