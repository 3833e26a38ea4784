"""Measurement: how one setting served one sample at one rate; what backends return. Pure data."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from flowprefill.bench.goodput.setting import Setting
from flowprefill.bench.statistics import median, percentile
from flowprefill.traces import TraceRequest


@dataclass(frozen=True, slots=True)
class Served:
    """How one request fared.

    Attributes:
        ttft_s: from its planned arrival to its first token, seconds; inf: there was none.
        is_on_time: whether it met its objectives.
    """

    request: TraceRequest
    ttft_s: float
    is_on_time: bool


@dataclass(frozen=True, slots=True)
class Stretch:
    """A time in which the device executed for one request: seconds from the first arrival.

    Attributes:
        number: of the (first) request in the sample.
    """

    number: int
    begin_s: float
    end_s: float


@dataclass
class Measurement:
    """One setting on one sample at one rate.

    Attributes:
        attainment: share of the requests that met their objectives.
        by_class: the same by class.
        requests: how many.
        span_s: from the first arrival to the last, seconds.
        preemptions: how often a run was suspended.
        blocking_mean_s, blocking_p99_s: waits of dispatched runs for the one that executed.
        late_s: how much later than planned a request was sent, at most (real backends).
        failed: requests without a first token.
        median_ttft_s: of the requests that had a first token; NaN: none had.
        median_by_class: the same by class.
        ttft_s: by class, sorted, finite ones only; kept where details were asked for.
        blocking_s: every wait, where details were asked for.
        stretches: what executed when, where details were asked for and known.
    """

    attainment: float
    by_class: dict[str, float]
    requests: int
    span_s: float
    preemptions: int = 0
    blocking_mean_s: float = 0.0
    blocking_p99_s: float = 0.0
    late_s: float = 0.0
    failed: int = 0
    median_ttft_s: float = math.nan
    median_by_class: dict[str, float] = field(default_factory=dict)
    ttft_s: dict[str, list[float]] = field(default_factory=dict)
    blocking_s: list[float] = field(default_factory=list)
    stretches: list[Stretch] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON's types; empty details are left out."""
        return {key: value for key, value in asdict(self).items() if value not in ([], {})}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Measurement:
        """Read what `to_dict` wrote."""
        stretches = [Stretch(**one) for one in values.get("stretches", [])]
        return cls(**{"by_class": {}, **values, "stretches": stretches})


class Backend(Protocol):
    """Serves requests under a setting; one thread."""

    name: str
    is_fast: bool  # whether a measurement takes less time than its requests' span

    def measure(
        self, setting: Setting, requests: Sequence[TraceRequest], seed: int, *, is_detailed: bool
    ) -> Measurement:
        """Serve the requests at their times and tell how they fared.

        Args:
            seed: of prompts, or of noise; equal for all settings that are compared.
            is_detailed: keep TTFTs by class, blocking times and the timeline.
        """

    def solo_s(self, prompt_tokens: int) -> float:
        """Return the predicted time of an undisturbed prefill, seconds; NaN if unknown."""

    def close(self) -> None:
        """Free what it holds."""


def summarised(
    served: Sequence[Served],
    blocking_s: Sequence[float],
    preemptions: int,
    *,
    late_s: float = 0.0,
    stretches: Sequence[Stretch] = (),
    is_detailed: bool = False,
) -> Measurement:
    """Make a measurement of what became of each request."""
    by_class: dict[str, list[Served]] = defaultdict(list)
    for one in served:
        by_class[one.request.service_class].append(one)
    times_s = [one.request.at_s for one in served]
    found = Measurement(
        attainment=_share(served),
        by_class={name: _share(ones) for name, ones in by_class.items()},
        requests=len(served),
        span_s=max(times_s) - min(times_s),
        preemptions=preemptions,
        blocking_mean_s=sum(blocking_s) / len(blocking_s) if blocking_s else 0.0,
        blocking_p99_s=percentile(blocking_s, 0.99) if blocking_s else 0.0,
        late_s=late_s,
        failed=sum(math.isinf(one.ttft_s) for one in served),
        median_ttft_s=_median(served),
        median_by_class={name: _median(ones) for name, ones in by_class.items()},
    )
    if is_detailed:
        found.ttft_s = {
            name: sorted(one.ttft_s for one in ones if one.ttft_s < math.inf)
            for name, ones in by_class.items()
        }
        found.blocking_s = sorted(blocking_s)
        found.stretches = list(stretches)
    return found


def _median(served: Sequence[Served]) -> float:
    return median(one.ttft_s for one in served if one.ttft_s < math.inf)


def _share(served: Sequence[Served]) -> float:
    return sum(one.is_on_time for one in served) / len(served)
