"""Mixtures of experts where numbers are rounded, and that no row's bits depend on other rows.

In float32 the suites of all families compare them with transformers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from cases import MIXTURES, Piece, Runner, relative_error
from devices import Device, on
from test_preemption import stop_everywhere

GetRunner = Callable[..., Runner]
pytestmark = pytest.mark.timeout(600)  # a test may compute many boundaries
ROUNDING = ("cpu-bf16", "cpu-bf16-team", "cpu-int8")
ON_CPU = ("cpu", "cpu-team", *ROUNDING)


@pytest.mark.parametrize("case", MIXTURES)
@on(ROUNDING)
def test_most_rows_are_close_where_numbers_are_rounded(
    device: Device, case: str, runner: GetRunner
) -> None:
    """Rounding exchanges an expert for one with nearly the same logit here and there."""
    native = runner(case)
    wanted = native.saved.expected
    errors = [
        relative_error(native.prefill(native.ids[:tokens], "none"), wanted[tokens - 1])
        for tokens in range(1, 200, 5)
    ]
    assert np.median(errors) < device.tolerance
    assert np.mean(np.array(errors) < 2 * device.tolerance) > 0.75


@pytest.mark.parametrize("case", MIXTURES)
@on(ON_CPU)
def test_bits_do_not_depend_on_how_the_work_is_cut(case: str, runner: GetRunner) -> None:
    native = runner(case)
    wanted = native.prefill(native.ids[:190], "none")
    for granularity in ("layer", "operator", "budget:2", "budget:0.1"):
        got = native.prefill(native.ids[:190], granularity)
        np.testing.assert_array_equal(got, wanted, err_msg=granularity)


@pytest.mark.parametrize("case", MIXTURES)
@on(ON_CPU)
def test_bits_do_not_depend_on_who_else_decodes(case: str, runner: GetRunner) -> None:
    """Each of several sequences has the logits of its step alone."""
    native = runner(case)
    contexts = [30, 5, 77, 120, 64]
    tables = native.tables([context + 1 for context in contexts], seed=2)
    steps: list[Piece] = []
    for context, table in zip(contexts, tables, strict=True):
        native.logits([(native.ids[:context], 0, table)], "none")
        steps.append(([native.ids[context]], context, table))
    together = native.logits(steps, "budget:2")
    for row, step in zip(together, steps, strict=True):
        np.testing.assert_array_equal(row, native.logits([step], "none")[0])


@pytest.mark.parametrize("case", MIXTURES)
@on(ON_CPU)
def test_preempted_all_along_is_bit_equal(case: str, runner: GetRunner) -> None:
    for granularity in ("operator", "budget:0.1"):
        stop_everywhere(runner(case), granularity, most=150)
