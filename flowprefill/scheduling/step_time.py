"""StepTime: what passes from one decode step to the next, learnt; decoding.py asks how wide it is.

The cost model knows what the device computes. From step to step more passes: choosing tokens,
handing them over and sending them, for each row anew, on the cores that compute.
"""

from __future__ import annotations

KEPT = 0.98  # of what was seen before, with each step: fifty count
# How many steps' worth the assumption is that only the device takes time, and rows none besides.
PRIOR_SCALE, PRIOR_ROWS = 0.05, 0.001
LEAST_SCALE = 0.1


class StepTime:
    """Fits scale * (the model's time) + rows * (a time per row) by least relative squares."""

    def __init__(self, row_unit_s: float) -> None:
        """Start from the model.

        Args:
            row_unit_s: what a row may cost at most by order of magnitude: a step with one.
        """
        self._unit_s = row_unit_s
        self._scale, self._units_per_row = 1.0, 0.0
        self._mm = self._mr = self._rr = self._m = self._r = 0.0

    def seconds(self, model_s: float, rows: int) -> float:
        """Return what is predicted for a step, seconds; grows with the rows as the model does."""
        return self._scale * model_s + self._units_per_row * self._unit_s * rows

    def observe(self, model_s: float, rows: int, seconds: float) -> None:
        """Learn from a step that was not suspended; O(1)."""
        if not (seconds > 0 and model_s > 0):
            return
        m, r = model_s / seconds, self._unit_s * rows / seconds  # so that the target is 1
        self._mm = KEPT * self._mm + m * m
        self._mr = KEPT * self._mr + m * r
        self._rr = KEPT * self._rr + r * r
        self._m = KEPT * self._m + m
        self._r = KEPT * self._r + r
        mm, m1 = self._mm + PRIOR_SCALE, self._m + PRIOR_SCALE
        rr = self._rr + PRIOR_ROWS
        per_row = (mm * self._r - self._mr * m1) / (mm * rr - self._mr * self._mr)
        self._units_per_row = max(per_row, 0.0)
        self._scale = max((m1 - self._mr * self._units_per_row) / mm, LEAST_SCALE)
