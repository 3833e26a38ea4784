"""Bad input to the native module: an error that names it, and nothing disturbed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from address_space import memory_limited
from cases import Runner, Saved
from devices import DEVICES, Device, on
from devices import ONE as ALL_KINDS

from flowprefill import ConfigError, EngineConfig, _core
from flowprefill.engine.local_worker import LocalWorker
from flowprefill.models.checkpoint import open_checkpoint
from flowprefill.models.graph import ModelGraph, WeightPart

CASE = "llama-grouped"
TABLE = np.arange(4, dtype=np.int32)
IDS = np.arange(20, dtype=np.int32)
ONE = {"rows": 20, "context": 0, "block_table": TABLE}
RATES = {"gemm_flops_per_s": 1e11, "attention_flops_per_s": 5e10, "weight_bytes_per_s": 1e10}
OPTIONS = {"granularity": "layer", "budget_s": 2e-3, "chunk_tokens": 512}


def make_run(
    model: _core.Model,
    tokens: Any = IDS,
    sequences: tuple[dict[str, Any], ...] = (ONE,),
    rates: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
) -> _core.Run:
    """Make a run of something that is right but for what a test changes."""
    batch = _core.Batch(tokens, [_core.BatchSequence(**each) for each in sequences])
    speeds = _core.MachineRates(**(RATES | (rates or {})))
    return model.make_run(1, batch, _core.PlanOptions(rates=speeds, **(OPTIONS | (options or {}))))


def table(blocks: Any) -> dict[str, Any]:
    return ONE | {"block_table": blocks}


@pytest.fixture
def native(runner: Callable[..., Runner]) -> Runner:
    return runner(CASE)


@pytest.fixture
def graph(saved: Callable[[Device, str], Saved]) -> ModelGraph:
    return open_checkpoint(saved(DEVICES["cpu"], CASE).folder).graph


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tokens": IDS.astype(np.int64)}, "tokens: got an array of int64, expected int32"),
        ({"tokens": IDS.astype(np.float32)}, "tokens: got an array of float32"),
        ({"tokens": IDS.reshape(4, 5)}, "tokens: got 2 dimensions"),
        ({"tokens": list(IDS)}, "tokens: got list, expected an array of int32"),
        ({"tokens": np.full(20, 200, np.int32)}, r"token id: got 200, expected 0\.\.199"),
        ({"tokens": np.full(20, -1, np.int32)}, "token id: got -1"),
        ({"tokens": IDS[:0], "sequences": ()}, "tokens"),
        ({"sequences": ()}, "batch: sequences: got 0"),
        ({"sequences": (ONE | {"rows": 19},)}, "tokens"),
        ({"sequences": (ONE | {"rows": 21},)}, r"sequence 0: got 21 rows, expected 1\.\.20"),
        ({"sequences": (ONE, ONE | {"rows": 0})}, "sequence 1: got 0 rows"),
        ({"sequences": (ONE | {"rows": -1},)}, "sequence 0: got -1 rows"),
        ({"sequences": (ONE | {"rows": "a"},)}, "rows: got 'a'"),
        ({"sequences": (ONE | {"context": 2.5},)}, "context: got 2.5"),
        ({"sequences": (ONE | {"context": -5},)}, "sequence 0: context: got -5"),
        ({"sequences": (ONE | {"context": 45},)}, "sequence 0: KV blocks: got 4, expected"),
        ({"sequences": (table(TABLE[:1]),)}, "sequence 0: KV blocks: got 1, expected at least 2"),
        ({"sequences": (table(TABLE + 95),)}, r"sequence 0: KV block: got 96, expected 0\.\.95"),
        ({"sequences": (table(TABLE - 1),)}, "sequence 0: KV block: got -1"),
        ({"sequences": (table(TABLE / 1),)}, "block_table: got an array of float64"),
        ({"options": {"granularity": "atom"}}, "granularity: got atom, expected none, layer"),
        ({"options": {"granularity": 3}}, "granularity: got 3"),
        ({"options": {"budget_s": 0.0}}, "budget_s: got 0"),
        ({"options": {"budget_s": float("nan")}}, "budget_s: got nan"),
        ({"options": {"chunk_tokens": 0}}, "chunk_tokens: got 0"),
        ({"rates": {"gemm_flops_per_s": -1.0}}, "gemm_flops_per_s: got -1"),
        ({"rates": {"step_overhead_s": 0.0}}, "step_overhead_s: got 0"),
        ({"rates": {"weight_bytes_per_s": "x"}}, "weight_bytes_per_s: got 'x'"),
    ],
)  # fmt: skip
def test_make_run_names_what_is_wrong(native: Runner, change: dict[str, Any], named: str) -> None:
    before = _core.live_workspace_bytes()
    with pytest.raises(ValueError, match=named):
        make_run(native.model, **change)
    assert _core.live_workspace_bytes() == before
    native.assert_close(native.prefill(native.ids, "layer"), 200)


def test_a_cache_for_which_there_is_no_memory_names_its_setting(
    saved: Callable[[Device, str], Saved],
) -> None:
    checkpoint = open_checkpoint(saved(DEVICES["cpu"], CASE).folder)
    config = EngineConfig(
        device="cpu", dtype="f32", threads=1, kv_cache_gib=100.0, calibrate=False
    )  # fmt: skip
    words = r"kv_cache_gib: 100\.00 GiB in addition to .*: no such memory"
    with memory_limited(8 << 30), pytest.raises(ConfigError, match=words):
        LocalWorker(config, checkpoint)


def test_a_run_for_which_there_is_no_memory_leaves_none_counted(native: Runner) -> None:
    """What was taken before the limit was met is given back."""
    before = _core.live_workspace_bytes()
    rows = 300_000
    blocks = np.zeros(rows // 16, np.int32)
    batch = _core.Batch(
        np.zeros(rows, np.int32), [_core.BatchSequence(rows=rows, context=0, block_table=blocks)]
    )
    with memory_limited(256 << 20), pytest.raises(MemoryError):
        native.model.make_run(1, batch, native.plan("operator"))
    assert _core.live_workspace_bytes() == before


def change(parts: list[Any], part_name: str, /, **fields: Any) -> None:
    """Change the first part of a graph that has this name."""
    index = next(i for i, part in enumerate(parts) if part.name == part_name)
    parts[index] = replace(parts[index], **fields)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("vocab_size", 0, "vocab_size: got 0"),
        ("num_layers", 0, "num_layers: got 0"),
        ("num_layers", 4, "operators: layers: got 3, expected 4"),
        ("num_kv_heads", 3, "num_kv_heads: got 3, expected a divisor of num_heads"),
        ("num_heads", 0, "num_heads: got 0"),
        ("num_heads", 2**40, "num_heads: got 1099511627776"),
        ("head_dim", 13, "head_dim: got 13"),
        ("head_dim", 1024, "head_dim: got 1024"),
        ("head_dim", None, "head_dim: got None"),
        ("operators", [], "operators: layers: got 0, expected 3"),
    ],
)
def test_bad_graph_field_is_named(graph: ModelGraph, field: str, value: object, named: str) -> None:
    setattr(graph, field, value)
    with pytest.raises(ValueError, match=named):
        _core.Model(graph, "f32", 1)


@pytest.mark.parametrize(
    ("parts", "name", "fields", "named"),
    [
        ("tensors", "normed", {"columns": 0}, "tensor normed: columns: got 0"),
        ("tensors", "normed", {"columns": 46}, "operator attn_norm: input hidden: columns: got 48"),
        ("tensors", "normed", {"type": "half"}, "type: got half, expected one of float"),
        ("tensors", "last", {"extent": "tile"}, "operator final_norm: rows are sequences: got 0"),
        ("operators", "rope", {"kind": "spin"}, "kind: got spin, expected one of embed"),
        ("operators", "rope", {"rotary": "cos"}, "rotary: got cos, no tensor of the graph"),
        ("operators", "rope", {"output": ""}, "operator rope: output: got -1"),
        ("operators", "rope", {"layer": 1}, "operator rope: layer: got 1, expected 0|layer: got 0"),
        ("operators", "rotary", {"table": 1}, "operator rotary: table: got 1"),
        (
            "operators",
            "o_proj",
            {"weight": "layers.0.up"},
            "weight layers.0.up: the graph has none",
        ),
        ("operators", "o_proj", {"weight": "layers.0.down"}, "columns: got 88, expected 48"),
        ("operators", "o_proj", {"epilogue": "gate"}, "operator o_proj: weight"),
        ("operators", "gate_up_proj", {"epilogue": "store"}, "operator gate_up_proj: weight"),
        ("operators", "attention", {"softcap": "x"}, "softcap: got 'x'"),
        ("weights", "layers.0.qkv", {"parts": ()}, "weight layers.0.qkv: parts: got none"),
        ("weights", "layers.0.qkv", {"order": "paired"}, "weight layers.0.qkv: order: got paired"),
        ("weights", "layers.0.qkv", {"name": "layers.0.o"}, "layers.0.qkv|named twice"),
        ("weights", "final_norm", {"columns": 2}, "weight final_norm: columns: got 2, expected 1"),
    ],
)
def test_bad_part_of_a_graph_is_named(
    graph: ModelGraph, parts: str, name: str, fields: dict[str, Any], named: str
) -> None:
    change(getattr(graph, parts), name, **fields)
    with pytest.raises(ValueError, match=named):
        _core.Model(graph, "f32", 1)


def test_a_tensor_named_twice_is_refused(graph: ModelGraph) -> None:
    graph.tensors.append(graph.tensors[0])
    with pytest.raises(ValueError, match="tensor hidden: named: got 2, expected once"):
        _core.Model(graph, "f32", 1)


def test_odd_depth_bad_dtype_and_threads_are_named(graph: ModelGraph) -> None:
    with pytest.raises(ValueError, match="dtype: got f16, expected bf16 or f32"):
        _core.Model(graph, "f16", 1)
    with pytest.raises(ValueError, match="quantization: got int4, expected none or int8"):
        _core.Model(graph, "f32", 1, "int4")
    with pytest.raises(ValueError, match="threads: got 0"):
        _core.Model(graph, "f32", 0)
    change(graph.tensors, "gated", columns=87)
    for layer in range(graph.num_layers):
        gate, up = (WeightPart(f"layers.{layer}.{name}", 87) for name in ("gate", "up"))
        change(graph.weights, f"layers.{layer}.gate_up", parts=(gate, up))
        change(graph.weights, f"layers.{layer}.down", columns=87)
    with pytest.raises(ValueError, match="operator down_proj of layer 0: input columns: got 87"):
        _core.Model(graph, "f32", 1)


@pytest.mark.parametrize(
    ("name", "values", "named"),
    [
        (
            "layers.0.q",
            np.zeros((48, 47), np.float32),
            r"tensor layers\.0\.q: got shape \[48, 47\]",
        ),
        ("layers.0.k", np.zeros((25, 48), np.float32), r"expected \[24, 48\]"),
        ("embed", np.zeros((48, 200), np.float32), r"tensor embed: got shape \[48, 200\]"),
        ("final_norm", np.zeros(3, np.float32), "tensor final_norm: got shape"),
        ("layers.3.q", np.zeros((48, 48), np.float32), r"tensor layers\.3\.q: the model has no"),
        ("layers.-1.q", np.zeros((48, 48), np.float32), "the model has no tensor of this name"),
        ("layers.0.what", np.zeros((48, 48), np.float32), "the model has no tensor of this name"),
        ("layers.0.q_bias", np.zeros(48, np.float32), "the model has no tensor of this name"),
        ("layers.0.o_bias", np.zeros(48, np.float32), "the model has no tensor of this name"),
        ("layers.0.down_bias", np.zeros(48, np.float32), "the model has no tensor of this name"),
        ("layers.0.q_norm", np.zeros(12, np.float32), "the model has no tensor of this name"),
        ("layers.0.q", np.zeros((48, 48)), r"tensor layers\.0\.q: got an array of float64"),
        ("layers.0.q", np.zeros((48, 48), np.float16), "got an array of float16"),
        ("layers.0.q", np.zeros((1, 48, 48), np.float32), "got 3 dimensions"),
        ("layers.0.q", np.float32(1), "tensor layers.0.q: got float32, expected an array"),
        ("layers.0.q", [[1.0]], "tensor layers.0.q: got list"),
    ],
)
def test_bad_tensor_is_named(graph: ModelGraph, name: str, values: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        _core.Model(graph, "f32", 1).load(name, values)


def test_every_missing_tensor_is_named(graph: ModelGraph, native: Runner) -> None:
    checkpoint = open_checkpoint(native.saved.folder)
    tensors = [(name, tensor.float().numpy()) for name, tensor in checkpoint.weights()]
    for missing, _ in tensors:
        model = _core.Model(graph, "f32", 1)
        for name, values in tensors:
            if name != missing:
                model.load(name, values)
        with pytest.raises(ValueError, match=f"tensor {missing}: missing"):
            model.finish()


def test_calls_out_of_order(graph: ModelGraph, native: Runner) -> None:
    model = _core.Model(graph, "f32", 1)
    model.allocate_cache(16, 4)
    with pytest.raises(RuntimeError, match="finish"):
        make_run(model)
    wrong = ((0, 4, "block_tokens: got 0"), (15, 4, "15"), (16, 0, "blocks: got 0"), (16, -1, "-1"))
    for block_tokens, blocks, named in wrong:
        with pytest.raises(ValueError, match=named):
            model.allocate_cache(block_tokens, blocks)
    run = native.make([(IDS.tolist(), 0, TABLE)], "layer")
    with pytest.raises(ValueError, match="run: is ready, logits exist once it has finished"):
        _core.logits(run)
    with pytest.raises(ValueError, match="run: has no logits"):
        _core.logits(_core.spin_run(1, 1, 0.0))
    native.execute(run)
    with pytest.raises(ValueError, match="dispatched after it has finished"):
        native.executor.dispatch(run)


@on(ALL_KINDS)
def test_a_failing_segment_names_its_operator_and_the_executor_lives_on(
    device: Device, native: Runner
) -> None:
    piece = (native.ids, 0, native.tables([200])[0])
    for granularity in device.granularities:
        labels = native.make([piece], granularity).labels()
        for index in {0, len(labels) // 2, len(labels) - 1}:
            run = native.make([piece], granularity, fail_at=index)
            native.executor.dispatch(run)
            native.wait(run, "failed")
            assert f"operator '{labels[index].op}' of layer {labels[index].layer}" in run.error
            assert f"segment {index} of {len(labels)}" in run.error
            assert "injected failure" in run.error
            with pytest.raises(ValueError, match="run: is failed"):
                native.native.logits(run)
            native.assert_close(native.logits([piece], granularity)[0], 200)


def test_blocks_zeroed_out_of_range_are_refused(native: Runner) -> None:
    with pytest.raises(ValueError, match="block"):
        native.model.zero_blocks([96])
    with pytest.raises(ValueError, match="block"):
        native.model.zero_blocks([-1])
