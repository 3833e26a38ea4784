"""What passes from one decode step to the next: learnt from steps of one width, and of several."""

from __future__ import annotations

import pytest

from flowprefill.scheduling.step_time import StepTime


def model_s(rows: int) -> float:
    return max(0.006, rows * 0.3e-3)


def learnt(*widths: int, scale: float = 1.0, row_s: float = 0.0, steps: int = 200) -> StepTime:
    """Return what was learnt on a machine that takes so long."""
    times = StepTime(model_s(1))
    for number in range(steps):
        rows = widths[number % len(widths)]
        times.observe(model_s(rows), rows, scale * model_s(rows) + row_s * rows)
    return times


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_nothing_seen_is_the_models_time(rows: int) -> None:
    assert StepTime(0.006).seconds(model_s(rows), rows) == model_s(rows)


@pytest.mark.parametrize(("scale", "row_s"), [(1.0, 0.0), (1.0, 0.35e-3), (3.0, 1e-3), (0.5, 0.0)])
@pytest.mark.parametrize("rows", [1, 8, 30, 64])
def test_steps_of_two_widths_tell_the_time_of_all(scale: float, row_s: float, rows: int) -> None:
    predicted_s = learnt(2, 40, scale=scale, row_s=row_s).seconds(model_s(rows), rows)
    assert predicted_s == pytest.approx(scale * model_s(rows) + row_s * rows, rel=0.05)


def test_steps_of_one_width_put_what_is_over_down_to_the_rows() -> None:
    times = learnt(64, row_s=0.35e-3)
    assert times.seconds(model_s(64), 64) == pytest.approx(model_s(64) + 64 * 0.35e-3, rel=0.02)
    assert times.seconds(model_s(1), 1) == pytest.approx(model_s(1) + 0.35e-3, rel=0.05)


def test_one_step_that_took_far_too_long_changes_little() -> None:
    times = learnt(4, 40, row_s=0.2e-3)
    before_s = times.seconds(model_s(20), 20)
    times.observe(model_s(40), 40, 60.0)
    assert times.seconds(model_s(20), 20) == pytest.approx(before_s, rel=0.05)
