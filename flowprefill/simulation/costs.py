"""WorkCosts: how long a work truly takes on a profile, and where its boundaries are.

Times come from the planner (csrc/graph) that cuts real runs: products and overheads from a plan of
so many rows, attention from the pairs, decode steps also from the bytes of the cache. Plans are
kept by size, so that most works cost two dictionary look-ups.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from flowprefill.native import _core
from flowprefill.scheduling.cost_model import attention_pairs

if TYPE_CHECKING:
    from flowprefill.config import Granularity
    from flowprefill.simulation.profile import Profile

EXACT_ROWS = 4096  # plans of more rows are made for the nearest size in steps of a 64th
FREE = 1e30  # a rate at which a part of the work takes no time
KEPT_PLANS = 50_000


def _rounded(value: int, bits: int) -> int:
    """Return the value cut to its highest bits: sizes that differ little share a plan."""
    shift = max(value.bit_length() - bits, 0)
    return value >> shift << shift


class WorkCosts:
    """Seconds of works on one profile with one granularity. One thread at a time."""

    def __init__(self, profile: Profile, granularity: Granularity) -> None:
        self.profile = profile
        self.granularity = granularity
        shape, rates = profile.shape, profile.rates
        self._pair_s = shape.attention_flops_per_pair / rates.attention_flops_per_s
        self._cache_token_s = shape.cache_bytes_per_token / rates.weight_bytes_per_s
        self._overhead_s = rates.run_overhead_s
        self._chunk = granularity.chunk_tokens
        self._planned = self._options(rates.attention_flops_per_s)
        self._linear_only = self._options(FREE)
        self._linear: dict[int, float] = {}
        self._bounds: dict[tuple[int, int], list[float]] = {}

    def prefill_s(self, rows: int, pairs: float) -> float:
        """Return the time of one prefill, undisturbed.

        Args:
            rows: new tokens of all its prompts.
            pairs: (token, visible token) pairs of them, see `attention_pairs`.
        """
        linear = self._linear.get(rows)
        if linear is None:
            linear = self._linear_s(rows)
        return linear + pairs * self._pair_s

    def decode_s(self, sequences: int, total_context: int) -> float:
        """Return the time of one decode step: weights and cache are read, one row each computed."""
        profile = self.profile
        shape, rates = profile.shape, profile.rates
        linear = max(
            shape.read_bytes(sequences) / rates.weight_bytes_per_s,
            sequences * shape.linear_flops_per_token / rates.gemm_flops_per_s,
        )
        head = max(
            shape.head_bytes / rates.weight_bytes_per_s,
            sequences * shape.head_flops_per_sequence / rates.gemm_flops_per_s,
        )
        attention = total_context * max(self._pair_s, self._cache_token_s)
        own = sequences * profile.sequence_overhead_s
        return self._overhead_s + linear + head + attention + own

    def bounds(self, rows: int, pairs: float) -> Sequence[float]:
        """Return the boundaries of a work as shares of its time, rising; the last is 1.

        Works of nearly the same size share them.
        """
        context = max(int((pairs - attention_pairs(rows, 0)) / rows), 0)
        key = (_rounded(rows, 6), _rounded(context, 4))
        found = self._bounds.get(key)
        if found is None:
            if len(self._bounds) >= KEPT_PLANS:
                self._bounds.clear()
            found = self._bounds[key] = self._plan_bounds(*key)
        return found

    def _plan_bounds(self, rows: int, context: int) -> list[float]:
        seconds = self.profile.predictor.segments(rows, context, self._planned).tolist()
        if self._chunk:
            chunks = -(-rows // self._chunk)
            seconds[:chunks] = [one + self._overhead_s for one in seconds[:chunks]]
        else:
            seconds[0] += self._overhead_s
        sums = list(accumulate(seconds))
        return [value / sums[-1] for value in sums[:-1]] + [1.0]

    def _linear_s(self, rows: int) -> float:
        """Return all of a prefill but its attention; each chunk is a run of its own."""
        planned = rows if rows <= EXACT_ROWS else _rounded(rows, 7)
        total = float(self.profile.predictor.segments(planned, 0, self._linear_only).sum())
        runs = -(-rows // self._chunk) if self._chunk else 1
        seconds = total * rows / planned + runs * self._overhead_s
        if len(self._linear) < KEPT_PLANS:
            self._linear[rows] = seconds
        return seconds

    def _options(self, attention_flops_per_s: float) -> _core.PlanOptions:
        profile, granularity = self.profile, self.granularity
        rates = profile.rates
        return _core.PlanOptions(
            granularity=granularity.kind,
            budget_s=granularity.budget_s or 2e-3,
            chunk_tokens=granularity.chunk_tokens or 512,
            rates=_core.MachineRates(
                gemm_flops_per_s=rates.gemm_flops_per_s,
                attention_flops_per_s=attention_flops_per_s,
                weight_bytes_per_s=rates.weight_bytes_per_s,
                step_overhead_s=profile.step_overhead_s,
            ),
        )
