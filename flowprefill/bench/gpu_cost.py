"""What cutting a prefill costs, for `bench gpu --shape`: the table `cost`.

One prompt, granularity after granularity and back again, so that clocks and temperature are the
same for all. Each prefill is held against the uncut one of its round, and a row has the median of
these shares: single measurements of one prompt differ by 1 %.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from flowprefill.bench.gpu_model import GpuModel
from flowprefill.bench.report import Row
from flowprefill.bench.statistics import median, percentile

UNCUT = "none"
GRANULARITIES = (UNCUT, "budget:0.3", "budget:0.5", "budget:1")
LEAST_TOKENS = 512  # a shorter prompt's cuts are lost in noise
MOST_TOKENS = 10_000  # of the prompts that get all granularities and rounds
FEW = (UNCUT, "budget:0.5")
ROUNDS, FEW_ROUNDS = 13, 5


def cost_rows(
    model: GpuModel, plan_of: Callable[[str], Any], tokens: int, has_time: Callable[[float], bool]
) -> Iterator[Row]:
    """Yield one row for each granularity, the uncut one first; none of a short prompt or where
    time is over.

    Args:
        plan_of: makes a granularity's options.
        has_time: whether so many seconds are left.
    """
    if tokens < LEAST_TOKENS:
        return
    is_long = tokens > MOST_TOKENS
    names = FEW if is_long else GRANULARITIES
    plans = {name: plan_of(name) for name in names}
    took_s: dict[str, list[float]] = defaultdict(list)
    for plan in plans.values():
        for _ in range(1 if is_long else 3):  # graphs are captured at a second launch
            model.prefill_s(tokens, plan)
    for turn in range(FEW_ROUNDS if is_long else ROUNDS):
        if not has_time(5):
            break
        for name in names if turn % 2 == 0 else reversed(names):
            took_s[name].append(model.prefill_s(tokens, plans[name]))
    for name, plan in plans.items() if took_s else ():
        shares = [whole / one for whole, one in zip(took_s[UNCUT], took_s[name], strict=True)]
        yield {
            "granularity": name,
            "tokens": tokens,
            "segments": model.make(tokens, plan).num_segments,
            "seconds": median(took_s[name]),
            "of_none": median(shares),
            "of_none_p25": percentile(shares, 0.25),
            "of_none_p75": percentile(shares, 0.75),
            "rounds": len(shares),
            "operators": _by_operator(model, tokens, plan),
        }


def _by_operator(model: GpuModel, tokens: int, plan: Any) -> dict[str, dict[str, float]]:
    """Return count, seconds and predicted seconds of the segments by their first operator."""
    labels = model.make(tokens, plan).labels()
    with model.recorded() as segments:
        model.prefill_s(tokens, plan)
    sums: dict[str, dict[str, float]] = {}
    for segment in segments:
        label = labels[segment.index]
        of_one = sums.setdefault(label.op, {"segments": 0, "seconds": 0.0, "predicted_s": 0.0})
        of_one["segments"] += 1
        of_one["seconds"] += segment.end_s - segment.start_s
        of_one["predicted_s"] += label.predicted_s
    return sums
