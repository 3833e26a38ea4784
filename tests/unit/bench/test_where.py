"""Operations of each group of operators, and the rows of `bench where`."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from flowprefill.bench import common, where
from flowprefill.bench.where import (
    ElementBytes,
    bytes_of_groups,
    decode_rows_of,
    flops_of_groups,
    rows_of,
)
from flowprefill.engine.records import TimelineEntry
from flowprefill.models.graph import ModelGraph, WeightPart

FIRSTS = ("embed", "attn_norm", "attention", "down_proj", "final_norm")


def two_layers() -> ModelGraph:
    """Two layers of a product, attention, a product; the second layer looks back on 4 keys."""
    graph = ModelGraph(vocab_size=10, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8)
    graph.add("embed", "embed", output="hidden")
    for layer, window in ((0, 0), (1, 4)):
        for name, rows in (("qkv_proj", 32), ("down_proj", 16)):
            graph.matrix(f"{name}{layer}", 16, WeightPart(f"{name}{layer}", rows))
        graph.add("norm", "attn_norm", output="x", layer=layer)
        graph.add("linear", "qkv_proj", output="qkv", layer=layer, weight=f"qkv_proj{layer}")
        graph.add("attention", "attention", output="y", layer=layer, window=window)
        graph.add("linear", "down_proj", output="z", layer=layer, weight=f"down_proj{layer}")
    graph.matrix("head", 16, WeightPart("head", 10))
    graph.add("norm", "final_norm", output="last")
    graph.add("linear", "lm_head", output="logits", weight="head")
    return graph


def test_groups_hold_their_heavy_operators_and_operations() -> None:
    found = flops_of_groups(two_layers(), FIRSTS, 6)
    pairs = (1 + 2 + 3 + 4 + 5 + 6) + (1 + 2 + 3 + 4 + 4 + 4)
    assert found == {
        "embed": ("embed", 0.0),
        "attn_norm": ("qkv_proj", 2 * 2 * 6 * 32 * 16.0),
        "attention": ("attention", 4 * 16 * float(pairs)),
        "down_proj": ("down_proj", 2 * 2 * 6 * 16 * 16.0),
        "final_norm": ("lm_head", 2 * 10 * 16.0),
    }


def test_groups_of_a_decode_step_hold_the_bytes_that_they_read() -> None:
    found = bytes_of_groups(
        two_layers(), FIRSTS, sequences=3, context=10, element_bytes=ElementBytes(2, 2)
    )
    assert found == {
        "embed": ("embed", 0.0),
        "attn_norm": ("qkv_proj", 2 * 2 * 32 * 16.0),
        "attention": ("attention", 3 * (10 + 4) * 2 * 8 * 2.0),
        "down_proj": ("down_proj", 2 * 2 * 16 * 16.0),
        "final_norm": ("lm_head", 2 * 10 * 16.0),
    }

    quantised = bytes_of_groups(two_layers(), FIRSTS, 3, 10, ElementBytes(1, 2))
    assert quantised["down_proj"][1] == found["down_proj"][1] / 2
    assert quantised["attention"] == found["attention"]


def test_rows_of_decode_hold_rates_and_end_with_all_together() -> None:
    step = [TimelineEntry("decode of 3", 1, "final_norm", 10.0, 12.0, 0.0)]
    one, whole = decode_rows_of(two_layers(), 3, 10, ElementBytes(2, 2), [step], 1000.0)
    assert one["operators"] == "lm_head"
    assert (one["seconds"], one["gb_per_s"], one["of_read"]) == (2.0, 160e-9, 0.16)
    assert whole == one | {"operators": "all"}


def test_rows_are_sums_over_layers_and_medians_over_runs() -> None:
    def run(factor: float) -> list[TimelineEntry]:
        seconds = {"attn_norm L0": 1.0, "attention L0": 2.0, "attn_norm L1": 3.0}
        return [
            TimelineEntry("prefill a", 1, f"{name} [0, 6)", 10.0, 10.0 + factor * taken, 0.0)
            for name, taken in seconds.items()
        ]

    rows = rows_of(two_layers(), 6, [run(1.0), run(2.0), run(9.0)], 1e3)
    assert [row["operators"] for row in rows] == ["qkv_proj", "attention, down_proj, lm_head"]
    assert [row["seconds"] for row in rows] == pytest.approx([8.0, 4.0])
    assert [row["share"] for row in rows] == pytest.approx([2 / 3, 1 / 3])
    assert rows[0]["of_peak"] == pytest.approx(2 * 2 * 6 * 32 * 16 / 8.0 / 1e3)


def test_sequences_get_more_tokens_until_they_all_decode_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []

    def steps_of_all(*given: Any) -> list[Any]:
        asked.append(given[-1])
        return [["a segment"]] if asked[-1] > 100 else []

    monkeypatch.setattr(where, "_steps_of_all", steps_of_all)
    engine: Any = None
    assert where._decode_steps(engine, random.Random(1), 16, 24) == [["a segment"]]
    assert asked == [24, 96, 384]


def test_ceilings_of_products_and_of_memory_come_from_one_measurement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []

    def measured(threads: int) -> dict[str, Any]:
        asked.append(threads)
        return {"f32": 1.0, "bf16": 2.0, "int8": 4.0, "reads": [(10, 8.0), (99, 3.0)]}

    monkeypatch.setattr(common._core, "measure_ceilings", measured)
    found = {"device": "cpu", "quantization": "none"}
    engine: Any = SimpleNamespace(describe=lambda: found, threads=2, dtype="bf16")
    assert common.measure_ceilings(engine) == (2.0, 3.0)
    assert asked == [2]
    found["quantization"] = "int8"
    assert common.measure_ceilings(engine) == (4.0, 3.0)
