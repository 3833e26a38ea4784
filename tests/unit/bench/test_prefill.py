"""Operations per prompt, and the rows of `bench prefill`."""

from __future__ import annotations

import random

import pytest

from flowprefill.bench.common import random_ids
from flowprefill.bench.prefill import flops_of, rows_of
from flowprefill.scheduling.cost_model import ModelShape

SHAPE = ModelShape(2e8, 2e8, 7e4, 5e7, 5e7)


def test_flops_count_projections_causal_attention_and_one_row_of_the_head() -> None:
    assert flops_of(3, SHAPE) == 3 * 2e8 + (1 + 2 + 3) * 7e4 + 5e7


def test_rows_hold_medians_ranges_ceiling_and_factor() -> None:
    seconds = {
        ("flowprefill", 100): [1.0, 2.0, 4.0],
        ("transformers bf16 eager", 100): [6.0],
        ("flowprefill", 50): [1.0],
    }
    rows = rows_of(seconds, SHAPE, 1e12)
    assert [(row["engine"], row["tokens"]) for row in rows] == [
        ("flowprefill", 50),
        ("flowprefill", 100),
        ("transformers bf16 eager", 100),
    ]
    ours, other = rows[1:]
    assert (ours["tokens_per_s"], ours["min"], ours["max"]) == (50.0, 25.0, 100.0)
    assert other["flowprefill_faster"] == 3.0
    assert ours["ceiling_tokens_per_s"] == pytest.approx(100 * 1e12 / flops_of(100, SHAPE))
    assert ours["of_ceiling"] == pytest.approx(50.0 / ours["ceiling_tokens_per_s"])


def test_random_ids_fit_any_vocabulary() -> None:
    assert set(random_ids(random.Random(1), 50, 8)) == {7}
    assert all(100 <= token < 500 for token in random_ids(random.Random(1), 200, 500))
