"""Model folders as they are found in the field: stale indexes, odd ids, sampling defaults, rope."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_hf_folder import write_tokenizer
from tiny_files import change_json
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from flowprefill.errors import CheckpointError, ConfigError
from flowprefill.models.chat_template import read_template_file
from flowprefill.models.checkpoint import open_checkpoint
from flowprefill.models.families import read_config
from flowprefill.models.model_config import rope_inverse_frequencies
from flowprefill.models.rope import RopeScaling

Save = Callable[..., Any]
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("shards", ["gone", "old", "nonsense"])
def test_a_whole_file_wins_over_an_index_next_to_it(save_tiny: Save, shards: str) -> None:
    _, folder = save_tiny("llama")
    weights = load_file(folder / "model.safetensors")
    names = dict.fromkeys(weights, "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": names} if shards != "nonsense" else []))
    if shards == "old":
        old = {name: tensor + 1 for name, tensor in weights.items()}
        save_file(old, folder / "model-00001-of-00001.safetensors")
    first, tensor = next(iter(open_checkpoint(folder).weights()))
    assert first == "embed"
    assert (tensor == weights["model.embed_tokens.weight"]).all()


def test_an_index_of_shards_that_are_gone_names_the_first(save_tiny: Save) -> None:
    _, folder = save_tiny("llama", "8KB")
    gone = min(folder.glob("model-*.safetensors"))
    gone.unlink()
    with pytest.raises(CheckpointError, match=gone.name):
        open_checkpoint(folder)


def test_the_index_says_which_of_two_tensors_counts(save_tiny: Save) -> None:
    _, folder = save_tiny("llama", "8KB")
    named = {name: tensor.clone() for name, tensor in open_checkpoint(folder).weights()}
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    stored = load_file(first), load_file(second)
    for path, own, other in ((first, *stored), (second, *stored[::-1])):
        save_file({**{name: tensor + 1 for name, tensor in other.items()}, **own}, path)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {name: f"./{file}" for name, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    for name, tensor in open_checkpoint(folder).weights():
        assert (tensor == named[name]).all()


def test_a_tensor_counts_that_is_in_another_shard_than_the_index_has_it(save_tiny: Save) -> None:
    """As in transformers, which reads whatever is in the files that an index names."""
    _, folder = save_tiny("llama", "8KB")
    named = {name: tensor.clone() for name, tensor in open_checkpoint(folder).weights()}
    index = json.loads((folder / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    shifted = dict(zip(files, files[1:] + files[:1], strict=True))
    index["weight_map"] = {name: shifted[file] for name, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    found = dict(open_checkpoint(folder).weights())
    assert found.keys() == named.keys()
    assert all((tensor == named[name]).all() for name, tensor in found.items())
    twice = load_file(folder / files[0]) | load_file(folder / files[1])
    save_file(twice, folder / files[0])
    index["weight_map"] = dict.fromkeys(index["weight_map"], files[2])
    index["weight_map"] |= {"x": files[0], "y": files[1]}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="stored in two files"):
        open_checkpoint(folder)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_of_two_tied_tensors_the_head_may_be_the_one_that_is_stored(
    save_tiny: Save, family: str
) -> None:
    model, folder = save_tiny(family, tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    weights["model.rotary_emb.inv_freq"] = torch.ones(4, dtype=torch.float64)  # of old writers
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    read = dict(open_checkpoint(folder).weights())
    assert "lm_head" not in read
    torch.testing.assert_close(read["embed"], model.get_input_embeddings().weight, rtol=0, atol=0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(theirs.get_input_embeddings().weight, read["embed"])


def test_a_head_of_another_dtype_is_compared_by_its_values(save_tiny: Save) -> None:
    _, folder = save_tiny("llama", tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    embed = weights["model.embed_tokens.weight"].bfloat16()
    same = {**weights, "model.embed_tokens.weight": embed, "lm_head.weight": embed.float()}
    save_file(same, folder / "model.safetensors")
    assert open_checkpoint(folder).config.tie_embeddings
    save_file({**same, "lm_head.weight": embed.float() + 1}, folder / "model.safetensors")
    assert not open_checkpoint(folder).config.tie_embeddings


@pytest.mark.parametrize("shard_size", ["1GB", "8KB"])
def test_a_bare_decoder_is_stored_without_its_prefix(save_tiny: Save, shard_size: str) -> None:
    _, folder = save_tiny("qwen3", shard_size, tie_word_embeddings=True)
    named = {name: tensor.clone() for name, tensor in open_checkpoint(folder).weights()}
    for path in folder.glob("*.safetensors"):  # as embedding models are published
        bare = {name.removeprefix("model."): one for name, one in load_file(path).items()}
        save_file(bare, path)
    again = dict(open_checkpoint(folder).weights())
    assert list(again) == list(named)
    assert all((again[name] == tensor).all() for name, tensor in named.items())


@pytest.mark.parametrize("eos", [-1, 48, [2, -1, 10**9]])
def test_end_tokens_that_are_no_tokens_are_left_out(save_tiny: Save, eos: Any) -> None:
    _, folder = save_tiny("llama")
    change_json(folder / "config.json", eos_token_id=eos)
    (folder / "generation_config.json").unlink()
    expected = (2,) if isinstance(eos, list) else ()
    assert open_checkpoint(folder).config.eos_token_ids == expected


def test_sampling_defaults_come_from_generation_config(save_tiny: Save) -> None:
    _, folder = save_tiny("llama")
    change_json(
        folder / "generation_config.json", temperature=0.6, top_p=1, top_k=20.0, do_sample=True,
        max_new_tokens=7, typical_p=0.5, stop_strings=["</a>", "\n\n"],
    )  # fmt: skip
    defaults = open_checkpoint(folder).sampling_defaults
    assert defaults == {
        "temperature": 0.6, "top_p": 1.0, "top_k": 20, "max_new_tokens": 7,
        "stop_strings": ("</a>", "\n\n"),
    }  # fmt: skip
    change_json(folder / "generation_config.json", stop_strings="one")
    assert open_checkpoint(folder).sampling_defaults["stop_strings"] == ("one",)
    (folder / "generation_config.json").unlink()
    assert open_checkpoint(folder).sampling_defaults == {}


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", "hot"), ("temperature", 3), ("top_p", -0.1), ("top_k", 1.5), ("top_k", 1e300),
     ("max_new_tokens", 0), ("repetition_penalty", 0), ("min_p", True), ("top_k", float("inf")),
     ("stop_strings", [""]), ("stop_strings", {}), ("stop_strings", ["\ud800"]),
     ("stop_strings", 0)],
)  # fmt: skip
def test_a_wrong_sampling_default_is_named(save_tiny: Save, field: str, value: Any) -> None:
    _, folder = save_tiny("llama")
    change_json(folder / "generation_config.json", **{field: value})
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {field}"):
        open_checkpoint(folder)


def test_templates_lie_in_more_places(save_tiny: Save) -> None:
    _, folder = save_tiny("llama")
    write_tokenizer(folder)
    more = folder / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("with tools")
    user = [{"role": "user", "content": "x"}]
    (folder / "chat_template.jinja").write_text("without")
    template = open_checkpoint(folder).chat_template
    assert template.render(user) == "without"
    assert template.render(user, tools=[{"name": "f"}]) == "with tools"


def test_templates_by_name_may_be_one_object(save_tiny: Save) -> None:
    _, folder = save_tiny("llama")
    write_tokenizer(folder)
    templates = {"default": "without", "tool_use": "with tools"}
    change_json(folder / "tokenizer_config.json", chat_template=templates)
    assert open_checkpoint(folder).chat_template.render([{"role": "u", "content": ""}]) == "without"


def test_a_template_of_ones_own_is_read_or_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("{{ messages[0].role }} ü")
    assert read_template_file(str(path)).endswith("ü")
    path.write_bytes(b"\xff")
    for wrong in (path, tmp_path / "absent.jinja", tmp_path):
        with pytest.raises(ConfigError, match="chat_template: got"):
            read_template_file(str(wrong))


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("{% if %}", "line 1: "),
        ("\n{{ a | no_such_filter }}", "line 2: "),
        ("{% for x in y %}", "line 1"),
    ],
)
def test_a_template_of_ones_own_that_does_not_compile_is_refused_at_once(
    tmp_path: Path, text: str, where: str
) -> None:
    path = tmp_path / "broken.jinja"
    path.write_text(text)
    with pytest.raises(
        ConfigError, match=rf"chat_template: got .*expected a jinja2 template \({where}"
    ):
        read_template_file(str(path))
    path.write_text("{{ raise_exception('it wants messages') }}")
    assert read_template_file(str(path))


@pytest.mark.parametrize("served", [100, 128, 200, 512])
def test_dynamic_rope_follows_the_longest_context_that_is_served(served: int) -> None:
    config = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=4, num_hidden_layers=1, max_position_embeddings=128,
        rope_scaling={"rope_type": "dynamic", "factor": 4.0},
    )  # fmt: skip
    ours = read_config(config.to_dict())
    assert ours.max_position == 512
    expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, "cpu", seq_len=served)
    object.__setattr__(ours, "rope_scaling", ours.rope_scaling.served_up_to(served))
    inverse, factor = rope_inverse_frequencies(ours)
    np.testing.assert_allclose(inverse, expected.numpy(), rtol=1e-6)
    assert factor == 1.0


def test_dynamic_rope_extends_the_longest_context() -> None:
    scaling = RopeScaling.from_hf({"type": "dynamic", "factor": 2.0}, 100)
    assert scaling.longest_context(100) == 200
