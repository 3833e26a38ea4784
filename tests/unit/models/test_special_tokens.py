"""Special tokens declared outside tokenizer.json: ids, ends and skipping equal transformers'."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors

from flowprefill.errors import CheckpointError
from flowprefill.models.hf_tokenizer import HfTokenizer
from flowprefill.models.model_config import ModelConfig
from flowprefill.models.special_tokens import read_special_tokens

# In the vocabulary; whether they are special, only the files next to it may say.
CANDIDATES = ["<s>", "</s>", "<|turn|>", "<|call|>", "[PAD]", "<unk>", "<img>"]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
CONFIG = ModelConfig(
    family="llama", vocab_size=300, hidden_size=2, intermediate_size=2, num_layers=1, num_heads=1,
    num_kv_heads=1, head_dim=2, rms_eps=1e-5, rope_theta=1e4, max_position=64, bos_token_id=0,
    eos_token_ids=(1,),
)  # fmt: skip
TEXT = " a<s>b </s> c<|turn|>user\nd <|call|>[PAD]  <unk>e<img><new> f"
Files = dict[str, Any]


def write_folder(folder: Path, files: Files, declared: list[str], adds_bos: bool) -> None:
    vocabulary = {token: index for index, token in enumerate([*CANDIDATES, *ALPHABET])}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(declared))
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    inner.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values))


def assert_equals_transformers(files: Files, declared: list[str], adds_bos: bool) -> None:
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        write_folder(folder, files, declared, adds_bos)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        reader = HfTokenizer(folder)
        ours = reader.build(CONFIG)
    for text in (TEXT, "plain", "<|turn|>"):
        for special in (True, False):
            expected = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, special) == expected, files
    assert ours.decode(range(7)) == theirs.decode(range(7), skip_special_tokens=True), files
    assert reader.special_tokens == theirs.special_tokens_map, files
    assert theirs.eos_token_id is None or theirs.eos_token_id in ours.eos_ids


NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "image_token")
texts = st.sampled_from([*CANDIDATES, "<new>"])
# How a token is matched is told of some tokens, alike wherever these are named.
FLAGS = {"<|call|>": {"lstrip": True}, "<img>": {"rstrip": True}, "<unk>": {"single_word": True}}


def told(text: str, **more: Any) -> Any:
    return {"content": text, **FLAGS[text], **more} if text in FLAGS else text


described = texts.map(told)
typed = texts.map(lambda text: told(text, __type="AddedToken", special=True))
named = st.dictionaries(st.sampled_from(NAMES), st.one_of(st.none(), typed), max_size=4)
lists = st.lists(texts, max_size=3, unique=True)


@st.composite
def folders(draw: st.DrawFn) -> Files:
    """What the files next to tokenizer.json may hold, of older and of newer checkpoints."""
    config: dict[str, Any] = draw(named)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if draw(st.booleans()):
        config["add_bos_token"] = draw(st.booleans())
    if draw(st.booleans()):
        config["model_specific_special_tokens"] = {"video_token": draw(texts)}
    config["split_special_tokens"] = draw(st.sampled_from([False, False, True]))
    if draw(st.booleans()):  # no token: it does not say that it is one
        config["audio_token"] = {"content": "<|call|>", "special": True}
    for name in draw(st.sets(st.sampled_from(["additional_special_tokens"]))):
        config[name] = draw(lists)
    if draw(st.booleans()):
        extra: Any = draw(st.one_of(lists, st.just({"image_token": "<img>"})))
        config["extra_special_tokens"] = extra
    if draw(st.booleans()):
        ids = draw(st.lists(st.integers(0, 6), unique=True, max_size=4))
        flags = draw(st.booleans())
        config["added_tokens_decoder"] = {
            str(i): {**FLAGS.get(CANDIDATES[i], {}), "content": CANDIDATES[i], "special": flags}
            for i in ids
        }
    files: Files = {"tokenizer_config.json": config}
    if draw(st.booleans()):
        files["special_tokens_map.json"] = draw(
            st.dictionaries(st.sampled_from(NAMES[:5]), described, max_size=4)
        )
    if draw(st.booleans()):
        added = draw(st.lists(st.integers(0, 6), unique=True, max_size=3))
        files["added_tokens.json"] = {CANDIDATES[i]: i for i in added}
    return files


@settings(max_examples=40, deadline=None)
@given(folders(), lists, st.booleans())
def test_any_declaration_equals_transformers(
    files: Files, declared: list[str], adds_bos: bool
) -> None:
    declared = [token for token in declared if token != "<new>"]
    assert_equals_transformers(files, declared, adds_bos)


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({"tokenizer_config.json": {"eos_token": "<|turn|>"}}, 2),
        ({"special_tokens_map.json": {"eos_token": {"content": "<|call|>", "lstrip": True}}}, 3),
        ({"tokenizer_config.json": {"eos_token": None}}, 1),
    ],
)
def test_the_declared_end_ends_a_text(tmp_path: Path, files: Files, ends: int) -> None:
    write_folder(tmp_path, files, [], False)
    tokenizer = HfTokenizer(tmp_path).build(CONFIG)
    assert ends in tokenizer.eos_ids
    assert set(tokenizer.eos_ids) == {1, ends}


def test_an_end_is_special_whatever_tokenizer_json_says(tmp_path: Path) -> None:
    write_folder(
        tmp_path, {"tokenizer_config.json": {"eos_token": "<|turn|>"}}, ["<|turn|>"], False
    )
    path = tmp_path / "tokenizer.json"
    values = json.loads(path.read_text())
    values["added_tokens"][0]["special"] = False
    padding = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None,
               "pad_id": 4, "pad_type_id": 0, "pad_token": "[PAD]"}  # fmt: skip
    path.write_text(json.dumps({**values, "padding": padding}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = HfTokenizer(tmp_path).build(CONFIG)
    assert ours.encode(TEXT) == theirs.encode(TEXT)
    assert ours.decode(range(7)) == theirs.decode(range(7), skip_special_tokens=True)


def test_a_null_bos_token_is_not_put_before_a_prompt(tmp_path: Path) -> None:
    files = {"tokenizer_config.json": {"bos_token": None, "add_bos_token": True}}
    write_folder(tmp_path, files, [], False)
    tokenizer = HfTokenizer(tmp_path).build(CONFIG)
    assert tokenizer.encode("hi") == tokenizer.encode("hi", add_special_tokens=False)


@pytest.mark.parametrize(
    ("config", "special_map", "added", "names"),
    [
        ({"pad_token": 5}, {}, {}, "pad_token"),
        ({"eos_token": {"content": 7}}, {}, {}, "eos_token"),
        ({"eos_token": {"content": "x", "lstrip": "yes"}}, {}, {}, "eos_token"),
        ({"additional_special_tokens": "x"}, {}, {}, "extra_special_tokens"),
        ({"extra_special_tokens": [5]}, {}, {}, r"extra_special_tokens\[0\]"),
        ({"extra_special_tokens": {"a_token": None}}, {}, {}, "extra_special_tokens.a_token"),
        ({"added_tokens_decoder": []}, {}, {}, "added_tokens_decoder"),
        ({"added_tokens_decoder": {"x": {"content": "y"}}}, {}, {}, "added_tokens_decoder"),
        ({"added_tokens_decoder": {"1": {}}}, {}, {}, r"added_tokens_decoder\.1"),
        ({}, {"bos_token": []}, {}, "special_tokens_map.json: bos_token"),
        ({}, {}, {"<x>": "1"}, "added_tokens.json"),
    ],
)
def test_a_wrong_declaration_names_file_and_field(
    config: Any, special_map: Any, added: Any, names: str
) -> None:
    with pytest.raises(CheckpointError, match=names):
        read_special_tokens(config, special_map, added)
