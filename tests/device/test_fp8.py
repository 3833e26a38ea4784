"""FP8 on GPUs: weights of a checkpoint kept as they are, or rounded; bits; what is refused.

On the double the products are those of codes widened to bf16, by plain loops: cuBLASLt is absent.
"""

from __future__ import annotations

import ctypes
import json
import logging
import math
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from cases import Logits, Runner, Saved, reference_logits, relative_error, save, settings_of
from devices import DEVICES, DOUBLE, GPUS, Device, double_module, on
from engines import assert_all_free, ids_of, prompt_of
from quantised_folders import KINDS, quantise_folder
from test_preemption import stop_everywhere
from tiny_models import save_with_tokenizer, tiny_model

from flowprefill import ConfigError, Engine
from flowprefill.bench import gpu_shape
from flowprefill.cli import main
from flowprefill.models.checkpoint import open_checkpoint

LOG2_E = 1 / math.log(2)  # scores are powers of two
# How a folder stores its projections; plain: in bf16. Blocks are rounded again, by rows.
STORED = ("plain", "float channel", "fp8 tensor", "fp8 block")


def in_bf16(values: torch.Tensor) -> torch.Tensor:
    return values.bfloat16().float()


def in_e4m3(rows: torch.Tensor) -> torch.Tensor:
    """Divide each row by what makes its largest 448, round it to e4m3, multiply again."""
    scales = rows.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 448
    codes = (rows * (1 / scales)).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes.float() * scales


def attend_in_bf16(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention of one prompt, [1, heads, tokens, width], with what is kept in bf16."""
    groups = query.shape[1] // key.shape[1]
    keys, values = (in_bf16(x).repeat_interleave(groups, 1) for x in (key, value))
    scores = in_bf16(query * (scaling * LOG2_E)) @ keys.transpose(2, 3)
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    shares = (scores.masked_fill(later, -torch.inf) / LOG2_E).softmax(-1)
    return (shares @ values).transpose(1, 2).contiguous(), None


def round_as_kernels_do(model: transformers.PreTrainedModel, rounds_weights: bool) -> None:
    """Have a model of transformers round what the kernels round, and there.

    What is left are sums in another order. They tip a rounding to bf16 now and then, that one to
    e4m3 in a sixteenth of the cases: then one of 128 addends is off by an eighth at most, a product
    by 1/8 / sqrt(128) = 1 % of its size. So logits are as close as those of bf16.
    """

    def round_rows(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (in_e4m3(in_bf16(args[0])),)

    def round_product(module: Any, _: object, output: torch.Tensor) -> torch.Tensor:
        bias = 0 if module.bias is None else module.bias
        return in_bf16(output - bias) + bias  # which is added behind the store

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            if rounds_weights:
                module.weight.data = in_e4m3(module.weight.data)
            module.register_forward_pre_hook(round_rows)
            if name.endswith(("q_proj", "k_proj", "v_proj")):
                module.register_forward_hook(round_product)
    head: Any = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, args: (in_bf16(args[0]),))
    transformers.AttentionInterface.register("in_bf16", attend_in_bf16)
    model.set_attn_implementation("in_bf16")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    """Make a tiny folder that stores its projections so, and evaluate it dequantised."""

    @cache
    def make(kind: str) -> Saved:
        family, shape = settings_of(DEVICES["cuda"], "llama-biases")
        model = tiny_model(family, spread=0.15, rounds=True, **shape)
        folder = tmp_path_factory.mktemp("fp8")
        saved = save(model, folder / "plain")
        stored = saved.folder
        if kind != "plain":
            stored = folder / "quantised"
            meant = quantise_folder(saved.folder, stored, KINDS[kind])
            state = {name: torch.from_numpy(values) for name, values in meant.items()}
            model.load_state_dict(state, strict=False)
        round_as_kernels_do(model, rounds_weights=kind in ("plain", "fp8 block"))
        return Saved(stored, saved.ids, reference_logits(model, saved.ids))

    return make


@pytest.fixture
def fp8_device(device: Device) -> Iterator[Device]:
    """The device, with compute capability 8.9 or more; GPUs that have less are skipped."""
    if not device.is_double:
        if device.module.device_info()["compute_capability"] < (8, 9):
            pytest.skip("this GPU does not multiply FP8")
        yield device
        return
    set_capability(device, 89)
    yield device
    set_capability(device, 80)


def set_capability(device: Device, capability: int) -> None:
    """Of the double."""
    assert device.is_double
    double_module()
    ctypes.CDLL(DOUBLE).double_set_compute_capability(capability)


@pytest.fixture
def open_fp8(
    fp8_device: Device, folders: Callable[[str], Saved]
) -> Iterator[Callable[[str], Runner]]:
    """Load a folder with FP8 products; closed at the end of the test."""
    opened: list[Runner] = []

    def open_one(kind: str) -> Runner:
        opened.append(Runner(fp8_device, folders(kind), keeps_blocks=True))
        return opened[-1]

    yield open_one
    for one in opened:
        one.close()


@pytest.mark.parametrize("kind", STORED)
@on(GPUS)
def test_logits_are_those_of_rounded_weights_and_rows(
    fp8_device: Device, open_fp8: Callable[[str], Runner], kind: str
) -> None:
    native = open_fp8(kind)
    for tokens in (1, 65, 130):
        error = relative_error(
            native.prefill(native.ids[:tokens], "operator"), native.saved.expected[tokens - 1]
        )
        # A GPU's sums have fewer bits than float, so more roundings tip.
        allowed = fp8_device.tolerance * (1 if fp8_device.is_double else 2)
        assert error < allowed, f"{tokens} tokens: {error}"


@on(GPUS)
def test_weights_take_half_of_bf16(
    device: Device, open_fp8: Callable[[str], Runner], folders: Callable[[str], Saved]
) -> None:
    """Those of layers' products; and a scale for each row."""
    kept = open_fp8("float channel")
    plain = Runner(device, folders("float channel"))
    graph = kept.device.shape
    hidden, heads, width = graph["hidden_size"], graph["num_attention_heads"], graph["head_dim"]
    qkv = (heads + 2 * graph["num_key_value_heads"]) * width
    rows_of = [(qkv, hidden), (hidden, heads * width), (hidden, graph["intermediate_size"])]
    rows_of.append((2 * graph["intermediate_size"], hidden))
    saved = graph["num_hidden_layers"] * sum(rows * (columns - 4) for rows, columns in rows_of)
    assert plain.model.weight_bytes - kept.model.weight_bytes == pytest.approx(saved, rel=0.01)
    plain.close()


@pytest.mark.parametrize("kind", ["plain", "float channel"])
@on(GPUS)
def test_preempted_at_every_boundary_is_bit_equal(
    device: Device, open_fp8: Callable[[str], Runner], kind: str
) -> None:
    native = open_fp8(kind)
    granularities = device.granularities if kind == "plain" else ("operator",)
    for granularity in granularities:
        stop_everywhere(native, granularity)


@on(GPUS)
def test_every_cut_and_every_repetition_gives_the_same_bits(
    device: Device, open_fp8: Callable[[str], Runner]
) -> None:
    """Slices of rows and of columns; graphs."""
    native = open_fp8("fp8 tensor")
    found: list[Logits] = []
    for granularity in (*device.granularities, *device.granularities):
        if not granularity.startswith("chunk"):  # whose attention sees other tiles
            found.append(native.prefill(native.ids[:128], granularity))
    assert all(np.array_equal(found[0], other) for other in found)


@pytest.mark.parametrize("kind", ["plain", "float channel", "fp8 block"])
@on(GPUS)
def test_engine_serves_fp8(
    fp8_device: Device,
    open_engine: Callable[..., Engine],
    kind: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    model = tiny_model("llama", spread=0.15, rounds=True, **fp8_device.served)
    folder = tmp_path / "served"
    save_with_tokenizer(model, folder)
    if kind != "plain":
        quantise_folder(folder, tmp_path / "quantised", KINDS[kind])
        for part in ("model.safetensors", "config.json"):
            (tmp_path / "quantised" / part).replace(folder / part)
    plain = open_engine(folder, quantization="none")
    engine = open_engine(folder, quantization="fp8")
    assert engine.describe()["quantization"] == "fp8"
    worker, of_plain = engine._worker, plain._worker
    assert worker.shape.weight_bytes * 2 == of_plain.shape.weight_bytes  # type: ignore[attr-defined]
    assert worker.shape.head_bytes == of_plain.shape.head_bytes  # type: ignore[attr-defined]
    assert worker._model.weight_bytes < of_plain._model.weight_bytes  # type: ignore[attr-defined]
    tokens = ids_of(engine, prompt_of(60, 3), 6)
    assert tokens == ids_of(engine, prompt_of(60, 3), 6)
    stored = 14 if kind == "float channel" else 0
    lines = [record.getMessage() for record in caplog.records]
    assert f"cuda:0: {stored} tensors are FP8 as stored, others are rounded to it" in lines
    becomes = any("FP8 weights become bf16; quantization 'fp8' keeps them" in one for one in lines)
    assert becomes == (kind == "float channel")
    if fp8_device.is_double:
        assert any("FP8 is multiplied by kernels of bf16, which is slow" in one for one in lines)
    for one in (plain, engine):
        assert_all_free(one)


@on(("cuda-double",))
def test_a_gpu_that_does_not_multiply_fp8_is_named(
    device: Device, open_engine: Callable[..., Engine]
) -> None:
    set_capability(device, 80)
    for setting in ("cuda", "auto"):
        with pytest.raises(
            ConfigError,
            match=r"quantization: got 'fp8', expected 'auto' or 'none' on cuda:0: its compute "
            r"capability is 8\.0, FP8 is multiplied from 8\.9 on",
        ) as caught:
            open_engine(device=setting, quantization="fp8")
        assert caught.value.param == "quantization"


@on(("cuda-double",))
def test_rows_of_another_shape_are_named(device: Device, folders: Callable[[str], Saved]) -> None:
    graph = open_checkpoint(folders("plain").folder).graph
    model = device.module.Model(graph, {"fp8_sources": ["layers.0.o"], "max_tokens": 16})
    with pytest.raises(ValueError, match=r"layers\.0\.o: got .* expected"):
        model.load_blocks("layers.0.o", np.zeros((3, 260), np.uint8))
    with pytest.raises(ValueError, match="expected 2: rows and their bytes"):
        model.load_blocks("layers.0.o", np.zeros(3, np.uint8))
    with pytest.raises(RuntimeError, match=r"layers\.0\.q: .*not announced"):
        model.load_blocks("layers.0.q", np.zeros((3, 260), np.uint8))


@pytest.mark.slow
@pytest.mark.timeout(600)
@on(GPUS)
def test_the_bench_measures_a_shape_in_fp8(fp8_device: Device, tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    flags = ["--shape", "tiny", "--layers", "1", "--tokens", "64", "520", "--limit-s", "1e9"]
    flags += ["--weights", "bf16", "fp8", "--parts", "prefill", "decode", "operators", "torch"]
    assert main(["bench", "gpu", *flags, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    rows = [row for row in report["rows"] if row["weights"] == "fp8"]
    prefills = [row["tokens"] for row in rows if row["table"] == "prefill"]
    assert prefills == [64, 520]
    decodes = [(row["batch"], row["granularity"]) for row in rows if row["table"] == "decode"]
    assert decodes == [(n, cut) for n in gpu_shape.BATCHES for cut in (gpu_shape.USUAL, "none")]
    assert {"attention", "down_proj"} <= {
        row["operator"] for row in rows if row["table"] == "operators"
    }
    assert any(row["table"] == "torch" for row in rows), "its products, or why there are none"
    assert report["graphs_fp8"]["num_failed"] == 0, report["graphs_fp8"]["last_failure"]
    assert report["memory_fp8"]["weight_bytes"] < report["memory"]["weight_bytes"]
