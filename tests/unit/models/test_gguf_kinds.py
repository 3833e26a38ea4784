"""GGUF as it is found in the field: ends by name, split files, literal tokens, odd ids."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tiny_files import TinyGguf, add_value

from flowprefill.errors import CheckpointError
from flowprefill.models.checkpoint import open_checkpoint
from flowprefill.models.gguf_tokenizer import end_tokens

MakeGguf = Callable[..., TinyGguf]


def add_token(tiny: TinyGguf, text: str, kind: int) -> int:
    """Write a token over one of the letters; returns its id."""
    token_id = 9
    tiny.tokenizer["tokenizer.ggml.tokens"][token_id] = text
    tiny.tokenizer["tokenizer.ggml.token_type"][token_id] = kind
    return token_id


@pytest.mark.parametrize("kind", [1, 3, 4])
@pytest.mark.parametrize(
    "text",
    ["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|eom_id|>", "<EOT>", "<|file_sep|>", "[PAD]",
     "[e~[", "<\uff5cend\u2581of\u2581sentence\uff5c>"],
)  # fmt: skip
def test_tokens_with_the_name_of_an_end_end_a_text(
    tiny_gguf: MakeGguf, tmp_path: Path, text: str, kind: int
) -> None:
    tiny = tiny_gguf()
    token_id = add_token(tiny, text, kind)
    tokenizer = open_checkpoint(tiny.write(tmp_path / "m.gguf")).tokenizer
    assert set(tokenizer.eos_ids) == {0, token_id}
    assert tokenizer.is_special(token_id)
    assert tokenizer.encode(f"a{text}b", add_special_tokens=False) == [2, token_id, 3]


def test_an_end_of_a_message_is_none_where_a_turn_has_other_ends() -> None:
    assert end_tokens({"<|end|>": 1, "<|return|>": 2}) == (1, 2)
    assert end_tokens({"<|end|>": 1, "<|return|>": 2, "<|call|>": 3}) == (2, 3)
    assert end_tokens({"<|end|>": 1, "<|flush|>": 2, "<|calls|>": 3}) == (2, 3)
    assert end_tokens({"</s>": 4, "<|tool_response>": 5}) == (5,)
    assert end_tokens({"word": 4}) == ()


@pytest.mark.parametrize("text", ["«§»", "é", "ĠĠ", "Ċ", "日本", "a b"])
def test_user_defined_tokens_are_plain_text(tiny_gguf: MakeGguf, tmp_path: Path, text: str) -> None:
    """Also where every character of theirs would stand for a byte in a merged token."""
    tiny = tiny_gguf()
    token_id = add_token(tiny, text, 4)
    tokenizer = open_checkpoint(tiny.write(tmp_path / "m.gguf")).tokenizer
    ids = tokenizer.encode(f"c{text}d", add_special_tokens=False)
    assert ids == [4, token_id, 5]
    assert tokenizer.decode(ids) == f"c{text}d"


@pytest.mark.parametrize("key", ["eot", "eom", "fim_pad", "fim_rep", "fim_sep"])
def test_keys_name_further_ends(tiny_gguf: MakeGguf, tmp_path: Path, key: str) -> None:
    tiny = tiny_gguf()
    tiny.tokenizer[f"tokenizer.ggml.{key}_token_id"] = 7
    assert open_checkpoint(tiny.write(tmp_path / "m.gguf")).tokenizer.eos_ids == (0, 7)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_prompts_end_with_the_end_where_the_file_says_so(
    tiny_gguf: MakeGguf, tmp_path: Path, adds_bos: bool
) -> None:
    tiny = tiny_gguf()
    tiny.tokenizer |= {"tokenizer.ggml.add_eos_token": True,
                       "tokenizer.ggml.add_bos_token": adds_bos}  # fmt: skip
    tokenizer = open_checkpoint(tiny.write(tmp_path / "m.gguf")).tokenizer
    assert tokenizer.encode("abc") == [1] * adds_bos + [47, 0]
    assert tokenizer.encode("abc", add_special_tokens=False) == [47]


def test_sentencepiece_has_its_usual_ids_where_the_file_names_none(
    tiny_gguf: MakeGguf, tmp_path: Path
) -> None:
    tiny = tiny_gguf()
    tokens = ["<unk>", "<s>", "</s>", "\u2581", "a", "\u2581a", *(f"x{i}" for i in range(42))]
    tiny.tokenizer = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3] + [1] * 45,
        "tokenizer.ggml.scores": [-float(i) for i in range(48)],
    }  # fmt: skip
    tokenizer = open_checkpoint(tiny.write(tmp_path / "m.gguf")).tokenizer
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.encode("a")) == (1, (2,), [1, 5])
    tiny.tokenizer["tokenizer.ggml.scores"] = ["high"] * 48
    with pytest.raises(CheckpointError, match=r"m\.gguf: tokenizer\.ggml\.scores: got .*numbers"):
        assert open_checkpoint(tiny.write(tmp_path / "m.gguf")).tokenizer


@pytest.mark.parametrize("wrong", [48, 4_294_967_295])
def test_ids_outside_the_vocabulary_name_no_token(
    tiny_gguf: MakeGguf, tmp_path: Path, wrong: int
) -> None:
    tiny = tiny_gguf()
    tiny.tokenizer |= {
        "tokenizer.ggml.bos_token_id": wrong,
        "tokenizer.ggml.eot_token_id": wrong,
        "tokenizer.ggml.add_bos_token": True,
    }
    checkpoint = open_checkpoint(tiny.write(tmp_path / "m.gguf"))
    assert checkpoint.config.bos_token_id is None
    assert checkpoint.tokenizer.eos_ids == (0,)
    assert checkpoint.tokenizer.encode("a") == [2]


def test_templates_know_the_tokens_and_there_may_be_one_for_tools(
    tiny_gguf: MakeGguf, tmp_path: Path
) -> None:
    tiny = tiny_gguf()
    tiny.tokenizer |= {
        "tokenizer.ggml.padding_token_id": 3,
        "tokenizer.ggml.unknown_token_id": 4,
        "tokenizer.chat_template": "{{ pad_token }}{{ unk_token }}{{ bos_token }}",
        "tokenizer.chat_template.tool_use": "tools {{ tools | length }}",
    }
    template = open_checkpoint(tiny.write(tmp_path / "m.gguf")).chat_template
    user = [{"role": "user", "content": "x"}]
    assert template.render(user) == "bc<|start|>"
    assert template.render(user, tools=[{}, {}]) == "tools 2"


def write_split(tiny: TinyGguf, folder: Path, parts: int, stem: str = "big") -> list[Path]:
    """Write a model as gguf-split does: all keys in the first part, the tensors in turn."""
    folder.mkdir(exist_ok=True)
    names = list(tiny.tensors)
    paths = []
    for part in range(parts):
        path = folder / f"{stem}-{part + 1:05}-of-{parts:05}.gguf"
        writer = gguf.GGUFWriter(path, tiny.architecture)
        if part == 0:
            prefixed = {f"{tiny.architecture}.{key}": v for key, v in tiny.metadata.items()}
            for key, value in (prefixed | tiny.tokenizer).items():
                add_value(writer, key, value)
        writer.add_uint16("split.no", part)
        writer.add_uint16("split.count", parts)
        writer.add_int32("split.tensors.count", len(names))
        for name in names[part::parts]:
            writer.add_tensor(name, np.ascontiguousarray(tiny.tensors[name]))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(path)
    return paths


@pytest.mark.parametrize("named", ["folder", "first", "last"])
def test_a_split_model_is_one_model(tiny_gguf: MakeGguf, tmp_path: Path, named: str) -> None:
    tiny = tiny_gguf()
    whole = open_checkpoint(tiny.write(tmp_path / "whole.gguf"))
    paths = write_split(tiny, tmp_path / "parts", 3)
    source = {"folder": tmp_path / "parts", "first": paths[0], "last": paths[-1]}[named]
    split = open_checkpoint(source)
    assert split.name == "big"
    assert split.config == whole.config
    assert split.total_bytes == whole.total_bytes
    weights = dict(whole.weights())
    for name, tensor in split.weights():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=0)
    assert split.tokenizer.encode("abc") == whole.tokenizer.encode("abc")


def test_what_is_wrong_with_a_split_model_is_named(tiny_gguf: MakeGguf, tmp_path: Path) -> None:
    tiny = tiny_gguf()
    first, second = write_split(tiny, tmp_path, 2)
    other = write_split(tiny, tmp_path / "other", 3, "other")
    with pytest.raises(CheckpointError, match=r"big.*other|holds several"):
        open_checkpoint(shutil.copy(other[0], tmp_path) and tmp_path)
    content = second.read_bytes()
    second.unlink()
    with pytest.raises(CheckpointError, match=r"big-00002-of-00002\.gguf: missing, part 2 of 2"):
        open_checkpoint(first)
    shutil.copy(first, second)
    with pytest.raises(CheckpointError, match=r"split\.no.*got \(0, 2\), expected \(1, 2\)"):
        open_checkpoint(first)
    second.write_bytes(content[:-9000])
    with pytest.raises(CheckpointError, match=r"big-00002-of-00002\.gguf: damaged"):
        open_checkpoint(first)
    alone = shutil.copy(first, tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match=r"renamed\.gguf: file name.*split\.count is 2"):
        open_checkpoint(alone)
