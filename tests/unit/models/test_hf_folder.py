"""Hugging Face folders: weights equal to transformers', streamed; every damaged file is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tiny_files import change_json
from tiny_models import LLAMAS
from tokenizers import decoders, models, pre_tokenizers, processors

from flowprefill.errors import CheckpointError, InvalidRequest
from flowprefill.models.checkpoint import Checkpoint, open_checkpoint
from flowprefill.models.weight_names import hf_name

Save = Callable[..., Any]


def write_tokenizer(folder: Path, adds_bos: bool = False) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet])}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<s>", "</s>"])
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    inner.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def assert_equals_transformers(checkpoint: Checkpoint, model: Any) -> None:
    state = model.state_dict()
    seen = dict(checkpoint.weights())
    assert list(seen) == list(checkpoint.graph.sources())
    for name, tensor in seen.items():
        torch.testing.assert_close(tensor, state[hf_name(name)], rtol=0, atol=0)
    used = {hf_name(name) for name in seen} | {"lm_head.weight"}
    assert set(state) <= used


@pytest.mark.parametrize("shard", ["5GB", "8KB"])
@pytest.mark.parametrize("family", LLAMAS)
def test_weights_of_every_family_equal_transformers(
    save_tiny: Save, family: str, shard: str
) -> None:
    model, folder = save_tiny(family, shard)
    assert (len(list(folder.glob("*.safetensors"))) > 1) is (shard == "8KB")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.name == f"tiny-{family}"
    assert_equals_transformers(checkpoint, model)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_biased_weights_equal_transformers(save_tiny: Save, family: str) -> None:
    extra = {"mlp_bias": True} if family == "llama" else {}
    model, folder = save_tiny(family, attention_bias=True, **extra)
    checkpoint = open_checkpoint(folder)
    assert_equals_transformers(checkpoint, model)
    assert "layers.1.o_bias" in dict(checkpoint.weights())


def test_tied_model_has_no_lm_head(save_tiny: Save) -> None:
    model, folder = save_tiny("llama", tie_word_embeddings=True)
    assert_equals_transformers(open_checkpoint(folder), model)
    assert "lm_head" not in dict(open_checkpoint(folder).weights())
    path = folder / "model.safetensors"
    tensors = {key: value.clone() for key, value in load_file(path).items()}  # not its map
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path)
    assert "lm_head" not in dict(open_checkpoint(folder).weights())


def test_a_stored_head_that_is_not_the_embedding_wins(save_tiny: Save) -> None:
    """As in transformers 5: config.json says tied, and the file has a head of its own."""
    _, folder = save_tiny("llama", tie_word_embeddings=True)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    head = tensors["model.embed_tokens.weight"] + 1.0
    save_file(tensors | {"lm_head.weight": head}, path)
    checkpoint = open_checkpoint(folder)
    assert not checkpoint.config.tie_embeddings
    torch.testing.assert_close(dict(checkpoint.weights())["lm_head"], head, rtol=0, atol=0)
    save_file(tensors | {"lm_head.weight": head[:-1].contiguous()}, path)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: got shape"):
        open_checkpoint(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_keep_their_dtype(save_tiny: Save, dtype: torch.dtype) -> None:
    _, folder = save_tiny("llama")
    path = folder / "model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    assert {tensor.dtype for _, tensor in open_checkpoint(folder).weights()} == {dtype}


def test_progress_ends_at_the_total(save_tiny: Save) -> None:
    _, folder = save_tiny("qwen2")
    calls: list[tuple[int, int]] = []
    checkpoint = open_checkpoint(folder)
    tensors = list(checkpoint.weights(progress=lambda done, total: calls.append((done, total))))
    assert len(calls) == len(tensors)
    size = sum(tensor.nbytes for _, tensor in tensors)
    assert calls[-1] == (size, size)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_eos_ids_come_from_all_files(save_tiny: Save) -> None:
    _, folder = save_tiny("llama")
    change_json(folder / "generation_config.json", eos_token_id=[2, 7])
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config.eos_token_ids == (2, 7)
    write_tokenizer(folder)
    assert open_checkpoint(folder).tokenizer.eos_ids == (2, 7, 1)


def test_chat_template_is_found_in_each_place(save_tiny: Save) -> None:
    _, folder = save_tiny("llama")
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(InvalidRequest, match="no chat template"):
        open_checkpoint(folder).chat_template.render(messages)
    write_tokenizer(folder)
    text = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    change_json(folder / "tokenizer_config.json", chat_template=text)
    assert open_checkpoint(folder).chat_template.render(messages) == "<s>hi</s>"
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "named"}]
    change_json(folder / "tokenizer_config.json", chat_template=named)
    assert open_checkpoint(folder).chat_template.render(messages) == "named"
    (folder / "chat_template.jinja").write_text("file")
    assert open_checkpoint(folder).chat_template.render(messages) == "file"


@pytest.mark.parametrize("file_adds", [True, False])
@pytest.mark.parametrize("setting", [True, False, None])
def test_the_post_processor_alone_adds_bos(
    save_tiny: Save, file_adds: bool, setting: bool | None
) -> None:
    """As in transformers 5, which ignores add_bos_token where there is a tokenizer.json."""
    _, folder = save_tiny("llama")
    write_tokenizer(folder, adds_bos=file_adds)
    change_json(folder / "tokenizer_config.json", add_bos_token=setting)
    tokenizer = open_checkpoint(folder).tokenizer
    plain = tokenizer.encode("hi", add_special_tokens=False)
    assert tokenizer.encode("hi") == ([0, *plain] if file_adds else plain)
    assert tokenizer.decode(tokenizer.encode("hi")) == "hi"


NEEDED = ("config.json", "model.safetensors", "tokenizer.json")
OPTIONAL = ("generation_config.json", "tokenizer_config.json")


@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, damage) for name in NEEDED for damage in ("missing", "truncated", "empty")]
    + [(name, damage) for name in OPTIONAL for damage in ("truncated", "empty")],
)
def test_damaged_file_is_named(save_tiny: Save, name: str, damage: str) -> None:
    _, folder = save_tiny("llama")
    write_tokenizer(folder)
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    with pytest.raises(CheckpointError, match=name):
        _ = open_checkpoint(folder).tokenizer


def test_missing_or_odd_shard_is_named(save_tiny: Save) -> None:
    _, folder = save_tiny("llama", "8KB")
    index = folder / "model.safetensors.index.json"
    third = sorted(folder.glob("*.safetensors"))[2]
    third.unlink()
    with pytest.raises(CheckpointError, match=third.name):
        open_checkpoint(folder)
    change_json(index, weight_map={"embed": "../other.safetensors"})
    with pytest.raises(CheckpointError, match=r"\.\./other\.safetensors"):
        open_checkpoint(folder)
    change_json(index, weight_map=[])
    with pytest.raises(CheckpointError, match="weight_map"):
        open_checkpoint(folder)


def test_missing_extra_and_wrong_tensors_are_named(save_tiny: Save) -> None:
    _, folder = save_tiny("llama")
    path = folder / "model.safetensors"
    tensors = {key: value.clone() for key, value in load_file(path).items()}  # not its map
    name = "model.layers.1.mlp.up_proj.weight"

    def message(changed: dict[str, torch.Tensor]) -> str:
        save_file(changed, path)
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(folder)
        return caught.value.message

    missing = message({key: value for key, value in tensors.items() if key != name})
    assert name in missing
    assert "missing, expected shape [40, 32]" in missing
    wrong = message(tensors | {name: torch.zeros(40, 31)})
    assert name in wrong
    assert "got shape [40, 31], expected [40, 32]" in wrong
    assert "lora.weight" in message(tensors | {"lora.weight": torch.zeros(3)})
    assert "got dtype F64" in message(tensors | {name: torch.zeros(40, 32, dtype=torch.float64)})
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}, path)
    assert len(list(open_checkpoint(folder).weights())) == 21


def test_tokenizer_of_another_model_is_told(
    save_tiny: Save, caplog: pytest.LogCaptureFixture
) -> None:
    for known, told in (258, False), (257, True):
        _, folder = save_tiny("llama", vocab_size=known)
        write_tokenizer(folder)
        assert open_checkpoint(folder).tokenizer.vocab_size == 258
        assert ("the tokenizer has 258 tokens and the model knows 257" in caplog.text) is told


def test_tokenizer_of_an_unknown_decoder_is_refused(save_tiny: Save) -> None:
    _, folder = save_tiny("llama")
    write_tokenizer(folder)
    inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.decoder = decoders.WordPiece()
    inner.save(str(folder / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"decoder: got WordPiece, expected ByteLevel"):
        _ = open_checkpoint(folder).tokenizer
