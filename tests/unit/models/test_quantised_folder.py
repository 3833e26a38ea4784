"""Quantised folders: dequantised to the bit by numpy's formula; what does not fit is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantised_folders import KINDS, Tensors, change_tensors, e4m3, quantise_folder
from tiny_files import change_json

from flowprefill.errors import CheckpointError
from flowprefill.models import quantised_weights
from flowprefill.models.checkpoint import open_checkpoint
from flowprefill.models.weight_names import hf_name

Save = Callable[..., Any]
Quantise = Callable[..., tuple[Path, dict[str, np.ndarray]]]
UP = "model.layers.1.mlp.up_proj"  # of 40 x 32


@pytest.fixture
def quantise(save_tiny: Save, tmp_path: Path) -> Quantise:
    """Make a quantised folder: (kind, family, settings) -> the folder, and what it stands for."""

    def make(kind: str, family: str = "llama", **settings: Any) -> Any:
        _, plain = save_tiny(family, **settings)
        folder = tmp_path / "quantised"
        return folder, quantise_folder(plain, folder, KINDS[kind])

    return make


def refused(folder: Path, change: Callable[[Tensors], None]) -> CheckpointError:
    """Change the tensors of a folder and return why it is refused."""
    change_tensors(folder, change)
    with pytest.raises(CheckpointError) as caught:
        list(open_checkpoint(folder).weights())
    return caught.value


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_what_numpy_says(
    quantise: Quantise, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantised_weights, "_SLAB", 1000)  # so that matrices have several
    folder, meant = quantise(kind, intermediate_size=300)
    seen = {hf_name(name): tensor for name, tensor in open_checkpoint(folder).weights()}
    assert len(meant) == 14
    for name, expected in meant.items():
        assert seen[name].dtype is torch.float32
        np.testing.assert_array_equal(seen[name].numpy(), expected, err_msg=name)
    plain = seen["model.layers.0.input_layernorm.weight"]
    assert plain.shape == (32,)


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        *(("float channel", 12), ("float tensor", 12), ("fp8 tensor", 12)),
        *(("fp8 block", 0), ("float block", 0), ("int8 channel", 0), ("int4 group", 0)),
    ],
)
def test_fp8_with_a_scale_for_each_row_can_be_read_as_it_is_stored(
    quantise: Quantise, kind: str, count: int
) -> None:
    folder, _ = quantise(kind, "glm")
    checkpoint = open_checkpoint(folder)
    formats = checkpoint.block_formats(("E4M3",))
    assert len(formats) == count
    plain = dict(checkpoint.weights())
    for name, rows in checkpoint.weights(in_blocks=formats):
        if name not in formats:
            continue
        assert rows.dtype is torch.uint8
        scales = rows[:, -4:].contiguous().view(torch.float32).numpy()
        codes = rows[:, :-4].numpy()
        np.testing.assert_array_equal(e4m3(codes) * scales, plain[name].numpy(), err_msg=name)


def test_progress_counts_what_is_stored(quantise: Quantise) -> None:
    folder, _ = quantise("int4 group, zero points", tie_word_embeddings=True)
    calls: list[tuple[int, int]] = []
    list(open_checkpoint(folder).weights(lambda done, total: calls.append((done, total))))
    stored = open_checkpoint(folder)._reader
    assert calls[-1][0] == calls[-1][1] == open_checkpoint(folder).total_bytes
    packed = 40 * 32 // 2 + 40 * 4 * 2 + 5 * 4 * 4 + 16  # values, scales, zero points, shape
    assert stored.stored_bytes(f"{UP}.weight") == packed


def test_rows_are_put_in_order_after_dequantising(quantise: Quantise, save_tiny: Save) -> None:
    folder, meant = quantise("float channel", "glm")
    seen = dict(open_checkpoint(folder).weights())
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = np.sort(meant[name], axis=0)
    np.testing.assert_array_equal(np.sort(seen["layers.0.q"].numpy(), axis=0), expected)
    assert not np.array_equal(seen["layers.0.q"].numpy(), meant[name])


def test_groups_of_several_schemes_are_told_apart(quantise: Quantise) -> None:
    folder, _ = quantise("int4 group")
    groups = KINDS["int4 group"].config()["config_groups"]
    groups["group_1"] = KINDS["int8 packed"].config()["config_groups"]["group_0"]
    config = KINDS["int4 group"].config() | {"config_groups": groups, "format": "mixed-precision"}
    change_json(folder / "config.json", quantization_config=config)
    assert open_checkpoint(folder).config.num_layers == 2
    words = torch.arange(40 * 8, dtype=torch.int32).reshape(40, 8)  # 8 bits each

    def widen(tensors: Tensors) -> None:
        tensors[f"{UP}.weight_packed"] = words

    change_tensors(folder, widen)
    seen = dict(open_checkpoint(folder).weights())["layers.1.up"]
    scale = open_checkpoint(folder)._reader._read_stored(f"{UP}.weight_scale").float()  # type: ignore[attr-defined]
    values = words.numpy().view(np.uint8).astype(np.float32) - 128
    np.testing.assert_array_equal(seen.numpy(), values * np.repeat(scale.numpy(), 8, axis=1))


@pytest.mark.parametrize(
    ("kind", "end", "shape"),
    [
        ("fp8 block", "weight_scale_inv", "one of [3, 1], [3]"),
        ("fp8 tensor", "weight_scale_inv", "one of [1, 1], [1], []"),
        ("float channel", "weight_scale", "one of [40, 1], [40]"),
        ("int8 channel, zero points", "weight_zero_point", "[40, 1]"),
        ("int4 group", "weight_scale", "[40, 4]"),
        ("int4 group", "weight_shape", "[2]"),
        ("int4 group, zero points", "weight_zero_point", "[40, 4]"),
    ],
)
def test_what_is_missing_or_misshapen_is_named(
    quantise: Quantise, kind: str, end: str, shape: str
) -> None:
    folder, _ = quantise(kind)
    name = f"{UP}.{end}"
    kept: Tensors = {}
    missing = refused(folder, lambda tensors: kept.update({name: tensors.pop(name)}))
    assert missing.param == name
    assert f"tensor {name}: missing, expected shape {shape}" in missing.message
    wrong = torch.zeros(7, 3).to(kept[name].dtype)
    misshapen = refused(folder, lambda tensors: tensors.update({name: wrong}))
    assert f"tensor {name}: got shape [7, 3], expected" in misshapen.message
    odd = torch.zeros(kept[name].shape, dtype=torch.float64)
    dtype = refused(folder, lambda tensors: tensors.update({name: odd}))
    assert f"tensor {name}: got dtype F64, expected" in dtype.message


@pytest.mark.parametrize(
    ("kind", "end", "tensor", "says"),
    [
        ("fp8 block", "weight", torch.zeros(40, 32, dtype=torch.int8), "dtype I8, expected F8_E4"),
        ("int8 channel", "weight", torch.zeros(40, dtype=torch.int8), "shape [40] quantised"),
        ("int8 channel", "weight", torch.zeros(40, 32, dtype=torch.int32), "dtype I32, expected"),
        ("int8 channel", "weight", torch.zeros(40, 31, dtype=torch.int8), "shape [40, 31], expect"),
        ("int4 group", "weight_packed", torch.zeros(40, 5, dtype=torch.int32), "expected [40, 4]"),
        ("int4 group", "weight", torch.zeros(40, 32), "stored packed too"),
        ("int4 group", "weight_shape", torch.tensor([-1, 32]), "got shape [-1, 32] quantised"),
        ("int4 group, reordered", "weight_g_idx", torch.arange(32).int(), "groups 0..31, expected"),
        ("fp8 block", "weight_zero", torch.zeros(1), "expected no such tensor"),
    ],
)
def test_values_that_do_not_fit_are_named(
    quantise: Quantise, kind: str, end: str, tensor: torch.Tensor, says: str
) -> None:
    folder, _ = quantise(kind)
    error = refused(folder, lambda tensors: tensors.update({f"{UP}.{end}": tensor}))
    assert says in error.message
    assert str(error.param).startswith(UP)


def test_quantised_values_without_a_configuration_are_refused(quantise: Quantise) -> None:
    folder, _ = quantise("fp8 block")
    change_json(folder / "config.json", quantization_config=None)
    with pytest.raises(CheckpointError, match=r"proj\.weight: got dtype F8_E4M3, expected one of"):
        open_checkpoint(folder)


@pytest.mark.parametrize("kind", ["fp8 block", "float channel", "int8 channel"])
def test_experts_that_share_one_tensor_are_refused_as_such(quantise: Quantise, kind: str) -> None:
    """Not for their type, as if they could be read in another."""
    folder, _ = quantise(
        kind, "qwen3_moe", hidden_size=64, num_experts=3, num_experts_per_tok=2,
        moe_intermediate_size=32,
    )  # fmt: skip
    assert open_checkpoint(folder).config.num_experts == 3
    name = "model.layers.0.mlp.experts.{}down_proj{}"

    def stack(tensors: Tensors) -> None:
        for part in [end for end in (".weight", ".weight_scale", ".weight_scale_inv")
                     if name.format("0.", end) in tensors]:  # fmt: skip
            each = [tensors.pop(name.format(f"{expert}.", part)) for expert in range(3)]
            tensors[name.format("", part.replace(".weight", ""))] = torch.stack(each)

    error = refused(folder, stack)
    assert error.param == name.format("", "")
    assert error.message.endswith("got shape [3, 64, 32], expected a tensor for each expert")


def test_a_stale_index_is_named(quantise: Quantise) -> None:
    """It names a scale in a part that has none, or a part that is not there."""
    folder, _ = quantise("fp8 block")
    part, name = folder / "model-00001-of-00001.safetensors", f"{UP}.weight_scale_inv"
    change_tensors(folder, lambda tensors: tensors.update({"x": tensors.pop(name)}))
    (folder / "model.safetensors").rename(part)
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {}}')
    change_json(index, weight_map={name: part.name})
    with pytest.raises(CheckpointError, match=f"tensor {name}: missing, expected shape"):
        open_checkpoint(folder)
    change_json(index, weight_map={name: part.name, "x": "model-00002-of-00002.safetensors"})
    with pytest.raises(CheckpointError, match=r"00002\.safetensors: missing"):
        open_checkpoint(folder)


GROUP = "config_groups.g.weights"


def grouped(**weights: Any) -> dict[str, Any]:
    groups = {"g": {"weights": {"type": "int", "num_bits": 8, "strategy": "channel"} | weights}}
    return {"quant_method": "compressed-tensors", "format": "int-quantized",
            "config_groups": groups}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "field", "allowed"),
    [
        (7, "", "an object"),
        ({"bits": 4}, "quant_method: got None", "'fp8', 'compressed-tensors'"),
        ({"quant_method": "awq"}, "quant_method: got 'awq'", "'fp8', 'compressed-tensors'"),
        ({"quant_method": "gptq"}, "quant_method: got 'gptq'", "'compressed-tensors'"),
        ({"quant_method": "mxfp4"}, "quant_method: got 'mxfp4'", "'compressed-tensors'"),
        ({"quant_method": "bitsandbytes"}, "quant_method: got 'bitsandbytes'", "'fp8'"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt: got 'e5m2'", "'e4m3'"),
        ({"quant_method": "fp8", "weight_block_size": [8]}, "weight_block_size: got [8]", "two"),
        ({"quant_method": "fp8", "weight_block_size": [0, 1]}, "weight_block_size: got [0", ">= 1"),
        (grouped() | {"format": "nvfp4-pack-quantized"}, "format: got 'nvfp4", "'pack-quantized'"),
        (grouped() | {"sparsity_config": {"format": "sparse-24-bitmask"}},
         "sparsity_config.format: got 'sparse-24-bitmask'", "'dense'"),
        (grouped() | {"transform_config": {"a": {}}}, "transform_config: got {'a'", "none"),
        (grouped() | {"config_groups": {}}, "config_groups: got {}", "a group that has weights"),
        (grouped(num_bits=16), f"{GROUP}.num_bits: got 16", "1..8"),
        (grouped(type="float", num_bits=4), f"{GROUP}.num_bits: got 4", "8"),
        (grouped(strategy="tensor_group"), f"{GROUP}.strategy: got 'tensor_group'", "'block'"),
        (grouped(strategy="group"), f"{GROUP}.group_size: got 0", ">= 1"),
        (grouped(strategy="block"), f"{GROUP}.block_structure: got None", "two integers"),
        (grouped(symmetric="yes"), f"{GROUP}.symmetric: got 'yes'", "true or false"),
    ],
)  # fmt: skip
def test_a_configuration_that_is_not_read_is_named(
    save_tiny: Save, given: Any, field: str, allowed: str
) -> None:
    _, folder = save_tiny("llama")
    change_json(folder / "config.json", quantization_config=given)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    path = f"{folder / 'config.json'}: quantization_config{'.' if field else ''}{field}"
    assert caught.value.message.startswith(path)
    assert allowed in caught.value.message
