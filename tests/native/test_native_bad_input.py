"""Bad input to the native module: an error that names it, and nothing disturbed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from native_models import Runner, Saved, plan, relative_error

from flowprefill import _core
from flowprefill.engine.loading import native_config
from flowprefill.models.checkpoint import open_checkpoint

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
def config(saved: Callable[[str], Saved]) -> dict[str, Any]:
    return native_config(open_checkpoint(saved(CASE).folder).config)


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
        ({"sequences": ()}, "tokens"),
        ({"sequences": (ONE | {"rows": 19},)}, "tokens"),
        ({"sequences": (ONE | {"rows": 21},)}, r"sequence 0: got 21 rows, expected 1\.\.20"),
        ({"sequences": (ONE, ONE | {"rows": 0})}, "sequence 1: got 0 rows"),
        ({"sequences": (ONE | {"rows": -1},)}, "sequence 0: got -1 rows"),
        ({"sequences": (ONE | {"rows": "a"},)}, "rows: got 'a'"),
        ({"sequences": (ONE | {"context": 2.5},)}, "context: got 2.5"),
        ({"sequences": (ONE | {"context": -5},)}, "sequence 0: context: got -5"),
        ({"sequences": (ONE | {"context": 45},)}, "sequence 0: got 4 KV blocks, expected at least"),
        ({"sequences": (table(TABLE[:1]),)}, "sequence 0: got 1 KV blocks, expected at least 2"),
        ({"sequences": (table(TABLE + 95),)}, r"sequence 0: got KV block 96, expected 0\.\.95"),
        ({"sequences": (table(TABLE - 1),)}, "sequence 0: got KV block -1"),
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
def test_make_run_names_what_is_wrong(
    native: Runner, saved: Callable[[str], Saved], change: dict[str, Any], named: str
) -> None:
    before = _core.live_workspace_bytes()
    with pytest.raises(ValueError, match=named):
        make_run(native.model, **change)
    assert _core.live_workspace_bytes() == before
    model = saved(CASE)
    assert relative_error(native.prefill(model.ids, plan("layer")), model.expected[199]) < 1e-4


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("hidden_size", 47, "hidden_size: got 47, expected an even number"),
        ("hidden_size", -2, "hidden_size: got -2"),
        ("vocab_size", 0, "vocab_size: got 0"),
        ("num_layers", 0, "num_layers: got 0"),
        ("num_kv_heads", 3, "num_kv_heads: got 3, expected a divisor of num_heads"),
        ("num_heads", 0, "num_heads: got 0"),
        ("head_dim", 13, "head_dim: got 13"),
        ("head_dim", 1024, "head_dim: got 1024"),
        ("windows", [0], "windows: got 1, expected one per layer"),
        ("windows", "none", "windows: got 'none'"),
        ("inverse_frequencies", [1.0], "inverse_frequencies: got 1"),
        ("intermediate_size", 2**40, "intermediate_size: got 1099511627776"),
        ("rms_eps", None, "rms_eps: got None"),
    ],
)
def test_bad_config_is_named(config: dict[str, Any], field: str, value: object, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        _core.Model(config | {field: value}, "f32", 1)


def test_missing_config_field_and_bad_dtype_and_threads(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="dtype: got f16, expected bf16 or f32"):
        _core.Model(config, "f16", 1)
    with pytest.raises(ValueError, match="threads: got 0"):
        _core.Model(config, "f32", 0)
    del config["qk_norm"]
    with pytest.raises(ValueError, match="qk_norm: missing"):
        _core.Model(config, "f32", 1)


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
        ("layers.3.q", np.zeros((48, 48), np.float32), r"tensor layers\.3\.q: unknown name"),
        ("layers.-1.q", np.zeros((48, 48), np.float32), "unknown name"),
        ("layers.0.what", np.zeros((48, 48), np.float32), "unknown name"),
        ("layers.0.q_bias", np.zeros(48, np.float32), "the config says there is none"),
        ("layers.0.o_bias", np.zeros(48, np.float32), "the config says there is none"),
        ("layers.0.down_bias", np.zeros(48, np.float32), "the config says there is none"),
        ("layers.0.q_norm", np.zeros(12, np.float32), "the config says there is none"),
        ("layers.0.q", np.zeros((48, 48)), r"tensor layers\.0\.q: got an array of float64"),
        ("layers.0.q", np.zeros((48, 48), np.float16), "got an array of float16"),
        ("layers.0.q", np.zeros((1, 48, 48), np.float32), "got 3 dimensions"),
        ("layers.0.q", np.float32(1), "tensor layers.0.q: got float32, expected an array"),
        ("layers.0.q", [[1.0]], "tensor layers.0.q: got list"),
    ],
)
def test_bad_tensor_is_named(config: dict[str, Any], name: str, values: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        _core.Model(config, "f32", 1).load(name, values)


def test_every_missing_tensor_is_named(
    config: dict[str, Any], saved: Callable[[str], Saved]
) -> None:
    tensors = [
        (name, tensor.float().numpy())
        for name, tensor in open_checkpoint(saved(CASE).folder).weights()
    ]
    for missing, _ in tensors:
        model = _core.Model(config, "f32", 1)
        for name, values in tensors:
            if name != missing:
                model.load(name, values)
        with pytest.raises(ValueError, match=f"tensor {missing}: missing"):
            model.finish()


def test_calls_out_of_order(config: dict[str, Any], native: Runner) -> None:
    model = _core.Model(config, "f32", 1)
    model.allocate_cache(16, 4)
    with pytest.raises(RuntimeError, match="finish"):
        make_run(model)
    wrong = ((0, 4, "block_tokens: got 0"), (15, 4, "15"), (16, 0, "blocks: got 0"), (16, -1, "-1"))
    for block_tokens, blocks, named in wrong:
        with pytest.raises(ValueError, match=named):
            model.allocate_cache(block_tokens, blocks)
    run = native.make([(IDS.tolist(), 0, TABLE)], plan("layer"))
    with pytest.raises(ValueError, match="run: is ready, logits exist once it has finished"):
        _core.logits(run)
    with pytest.raises(ValueError, match="run: has no logits"):
        _core.logits(_core.spin_run(1, 1, 0.0))
    native.execute(run)
    with pytest.raises(ValueError, match="dispatched after it has finished"):
        native.executor.dispatch(run)


@pytest.mark.parametrize("granularity", ["none", "layer", "operator", "chunk:16", "budget:2"])
def test_a_failing_segment_names_its_operator_and_the_executor_lives_on(
    native: Runner, saved: Callable[[str], Saved], granularity: str
) -> None:
    model = saved(CASE)
    piece = (model.ids, 0, native.tables([200])[0])
    labels = native.make([piece], plan(granularity)).labels()
    for index in {0, len(labels) // 2, len(labels) - 1}:
        run = native.make([piece], plan(granularity), fail_at=index)
        native.executor.dispatch(run)
        native.wait(run, "failed")
        assert f"operator '{labels[index].op}' of layer {labels[index].layer}" in run.error
        assert f"segment {index} of {len(labels)}" in run.error
        assert "injected failure" in run.error
        with pytest.raises(ValueError, match="run: is failed"):
            _core.logits(run)
        got = native.execute(native.make([piece], plan(granularity)))[0]
        assert relative_error(got, model.expected[199]) < 1e-4


def test_blocks_zeroed_out_of_range_are_refused(native: Runner) -> None:
    with pytest.raises(ValueError, match="block"):
        native.model.zero_blocks([96])
    with pytest.raises(ValueError, match="block"):
        native.model.zero_blocks([-1])
