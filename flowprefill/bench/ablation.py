"""`flowprefill simulate --ablate`: slack_edf with each of its constants and rules changed alone.

Every change serves the same resamples of the trace, so that differences are between pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

from flowprefill.bench.common import say
from flowprefill.scheduling import SchedulerSettings, decoding, scheduler
from flowprefill.scheduling.policies import forecast, planning, slack_edf
from flowprefill.simulation import Configuration

if TYPE_CHECKING:
    from flowprefill.bench.report import Row
    from flowprefill.simulation import Result
    from flowprefill.traces import Trace

COLUMNS = {
    "change": "changed alone",
    "attainment": "SLO met %",
    "difference": "difference %",
    "interval": "+- %",
    "ttft_p50_s": "TTFT p50 ms",
    "ttft_mean_s": "mean ms",
    "ttft_p99_s": "p99 ms",
    "preemptions": "preempt.",
}
Z95 = 1.96


class Change(NamedTuple):
    """A value in the place of another; owner None: of a field of SchedulerSettings."""

    name: str
    owner: Any
    values: tuple[Any, ...]
    rule: str = ""  # what it is called, where the value is a function


def _keeps_all(works: Sequence[Any], _start_s: float, _limits: Sequence[float]) -> Sequence[Any]:
    return works


def _deadlines(_self: object, works: Sequence[Any], _now: float) -> list[float]:
    return [work.deadline_s for work in works]


def _head_alone(_self: object, head: Any, _waiting: object, _now: float) -> list[Any]:
    return [head]


CHANGES = (
    Change("keepable", planning, (_keeps_all,), "the plan gives nothing up"),
    Change("limits", forecast.Forecast, (_deadlines,), "no time for arrivals"),
    Change("batch", slack_edf.SlackEdf, (_head_alone,), "no packing"),
    Change("LOOKAHEAD", scheduler, (4, 64)),
    Change("MEMORY_S", forecast, (1.0, 20.0)),
    Change("LULL", forecast, (1.0, math.inf)),
    Change("SLACK_TO_SPEND", slack_edf, (0.0, 0.1, 0.5, 1.0)),
    Change("OVERTAKING", slack_edf, (0.0, 4.0, 64.0)),
    Change("MUCH_SHORTER", slack_edf, (0.0, 1.0)),
    Change("PACKING_GAIN", slack_edf, (0.0, 0.5)),
    Change("late_share", None, (0.001, 0.02, 0.1)),
    Change("late_patience_s", None, (0.5, 30.0)),
    Change("late_slice_s", None, (0.01, 0.2)),
    Change("LEAST_WORTH", decoding, (0.06, 1.0)),
    Change("idle_share", None, (0.1, 0.5)),
)
DECODING = ("LEAST_WORTH", "idle_share")  # change nothing where nothing decodes


@contextmanager
def _set(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def rows(
    samples: Sequence[Trace],
    configuration: Configuration,
    serve: Callable[[Trace, Configuration], Result],
    *,
    decodes: bool,
) -> Iterator[Row]:
    """Yield the row of slack_edf as it is, then one of each change."""
    as_it_is = [serve(sample, configuration) for sample in samples]
    yield _row("nothing", as_it_is, as_it_is)
    for change in CHANGES:
        for value in change.values if decodes or change.name not in DECODING else ():
            name = change.rule or f"{change.name} {value:g}"
            say(name)
            if change.owner is None:
                settings = configuration.settings or SchedulerSettings()
                settings = replace(settings, **{change.name: value})
                other = replace(configuration, settings=settings)
                results = [serve(sample, other) for sample in samples]
            else:
                with _set(change.owner, change.name, value):
                    results = [serve(sample, configuration) for sample in samples]
            yield _row(name, results, as_it_is)


def _row(name: str, results: Sequence[Result], as_it_is: Sequence[Result]) -> Row:
    pairs = zip(results, as_it_is, strict=True)
    more = [one.attainment - other.attainment for one, other in pairs]
    return {
        "change": name,
        "attainment": fmean(one.attainment for one in results),
        "difference": fmean(more),
        "interval": Z95 * stdev(more) / math.sqrt(len(more)),
        "ttft_p50_s": fmean(one.ttft_quantile(0.5) for one in results),
        "ttft_mean_s": fmean(fmean(each.ttft_s for each in one.outcomes) for one in results),
        "ttft_p99_s": fmean(one.ttft_quantile(0.99) for one in results),
        "preemptions": fmean(one.preemptions for one in results),
    }
