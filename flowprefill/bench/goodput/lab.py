"""Lab: measures settings on samples at rates, asks each measurement once, keeps to a budget."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from flowprefill.bench.common import say
from flowprefill.bench.goodput.measurement import Backend, Measurement
from flowprefill.bench.goodput.records import Records
from flowprefill.bench.goodput.search import Search
from flowprefill.bench.goodput.setting import FIRST_COME, OURS, Setting
from flowprefill.traces import Trace, TraceRequest, scaled_rate

START_LOAD, START_LOAD_FIRST_COME = 0.7, 0.25  # where searches begin
LEAST_LOAD, MOST_LOAD = 0.003, 30.0  # where they give up
SAID_EVERY_S = 10.0
POINT_REQUESTS = 60  # that a measurement cut by `point_s` has at least: 90 % of fewer says little

Starts = Mapping[tuple[Setting, float], Sequence[int | None]]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a measurement lies.

    Attributes:
        sample: number of the sample.
        index: of the rate on the grid.
        slo_scale: of all objectives, times the bench's own.
    """

    setting: Setting
    sample: int
    index: int
    slo_scale: float = 1.0

    @property
    def key(self) -> str:
        """Its name in the records."""
        return f"{self.setting} sample {self.sample} rate {self.index} slo {self.slo_scale:g}"


@dataclass
class Lab:
    """What is measured on what.

    Attributes:
        samples: one trace each, all of the base rate; paired: every setting gets all of them.
        base_rps: mean rate of the trace that the samples are drawn from.
        step: the grid's rates are ``base_rps * step**index``.
        seed: of prompts and noise; sample n gets seed + n.
        deadline_s: on the monotonic clock; inf is no budget.
        ours: the setting that the others are compared with.
        point_s: a measurement serves what arrives within so many seconds, and at least
            `POINT_REQUESTS`; inf: the whole sample. Prompts of a lower rate are the first ones of a
            higher rate.
        beyond_s: how much longer than its requests' span a measurement took, at most so far.
        places: what this run has asked for, without details.
    """

    backend: Backend
    samples: Sequence[Trace]
    base_rps: float
    records: Records
    step: float
    seed: int
    deadline_s: float = math.inf
    ours: Setting = field(default_factory=lambda: Setting.parse(OURS))
    point_s: float = math.inf
    beyond_s: float = 0.0
    places: dict[Place, Measurement] = field(default_factory=dict)
    _said_s: float = field(default_factory=time.monotonic)

    @property
    def mean_solo_s(self) -> float:
        """Predicted time of a mean request alone, seconds; NaN if unknown."""
        requests = [one for sample in self.samples for one in sample.requests]
        return sum(self.backend.solo_s(one.prompt_tokens) for one in requests) / len(requests)

    @property
    def capacity_rps(self) -> float:
        """Requests per second that would take all of the device's time, one after another."""
        mean_s = self.mean_solo_s
        return self.base_rps if math.isnan(mean_s) else 1.0 / mean_s

    def index_of(self, rate_rps: float) -> int:
        """Return the grid's index nearest to a rate."""
        return round(math.log(rate_rps / self.base_rps) / math.log(self.step))

    def rate_rps(self, index: float) -> float:
        """Return the rate at an index, requests per second."""
        return float(self.base_rps * self.step**index)

    def has_time_for(self, requests: Sequence[TraceRequest]) -> bool:
        """Whether a measurement of these is likely to end before the deadline."""
        span_s = 0.0 if self.backend.is_fast else requests[-1].at_s - requests[0].at_s
        return time.monotonic() + span_s + self.beyond_s <= self.deadline_s

    def requests_at(self, place: Place) -> Sequence[TraceRequest]:
        """Return what is sent there, with the bench's own objectives."""
        sample = scaled_rate(self.samples[place.sample], self.step**place.index)
        requests = sample.requests
        end_s = requests[0].at_s + self.point_s
        within = sum(one.at_s < end_s for one in requests)
        return requests[: max(within, POINT_REQUESTS)]

    def at(self, place: Place, *, is_detailed: bool = False) -> Measurement | None:
        """Return a measurement, made now if need be; None: there is no time left to make it."""
        key = place.key + (" detailed" if is_detailed else "")
        if key not in self.records:
            requests = self.requests_at(place)
            if not self.has_time_for(requests):
                return None
            self._measure(place, requests, key, is_detailed)
        found = self.records[key]
        if not is_detailed:
            self.places[place] = found
        return found

    def _measure(
        self, place: Place, requests: Sequence[TraceRequest], key: str, is_detailed: bool
    ) -> None:
        began_s = time.monotonic()
        scale = place.slo_scale
        sent = [
            replace(one, ttft_s=one.ttft_s * scale, tpot_s=one.tpot_s * scale) for one in requests
        ]
        found = self.backend.measure(
            place.setting, sent, self.seed + place.sample, is_detailed=is_detailed
        )
        self.records.add(key, found)
        span_s = 0.0 if self.backend.is_fast else found.span_s
        self.beyond_s = max(self.beyond_s, time.monotonic() - began_s - span_s)
        if not self.backend.is_fast:
            self._say(place, found)

    def _say(self, place: Place, found: Measurement) -> None:
        left_s = self.deadline_s - time.monotonic()
        left = "" if math.isinf(left_s) else f", {max(left_s, 0) / 60:.0f} min left"
        late = f", sent up to {found.late_s * 1e3:.0f} ms late" if found.late_s > 0.01 else ""
        rate = self.rate_rps(place.index)
        say(
            f"{place.setting!s:<32} {rate:6.2f}/s  {found.attainment * 100:5.1f} % on time{late}"
            f"{left}"
        )

    def searches(
        self,
        settings: Sequence[Setting],
        targets: Sequence[float],
        stride: int,
        starts: Starts | None = None,
    ) -> dict[tuple[Setting, float], list[Search]]:
        """Find the highest rates: for each setting and target a search per sample.

        Args:
            stride: first step of a search's widening, on the grid.
            starts: where searches begin; None, or no entry: at a share of the capacity.

        Slow backends take turns, one measurement per setting, so that a machine whose speed
        drifts treats all alike, and an early end leaves something of each.
        """
        least, most = (self.index_of(self.capacity_rps * x) for x in (LEAST_LOAD, MOST_LOAD))
        found: dict[tuple[Setting, float], list[Search]] = {}
        for setting in settings:
            load = START_LOAD_FIRST_COME if str(setting) == FIRST_COME else START_LOAD
            middle = self.index_of(self.capacity_rps * load)
            for target in targets:
                given = (starts or {}).get((setting, target), [None] * len(self.samples))
                found[setting, target] = [
                    Search(target, middle if start is None else start, stride, least, most)
                    for start in given
                ]
        began_s = time.monotonic()
        for _ in self._rounds(found, settings, targets):
            done = sum(one.is_done for ones in found.values() for one in ones)
            self._say_progress(done, sum(map(len, found.values())), began_s)
        return found

    def _rounds(
        self,
        searches: dict[tuple[Setting, float], list[Search]],
        settings: Sequence[Setting],
        targets: Sequence[float],
    ) -> Iterator[None]:
        """Advance every search by one measurement per round, sample after sample."""
        for target in targets:
            for sample in range(len(self.samples)):
                active = {one: searches[one, target][sample] for one in settings}
                while active:
                    for setting, search in list(active.items()):
                        if search.is_done or not self._advance(setting, sample, search):
                            del active[setting]
                    yield

    def _advance(self, setting: Setting, sample: int, search: Search) -> bool:
        index = search.next_index
        measured = self.at(Place(setting, sample, index))
        if measured is None:
            return False
        search.tell(index, measured.attainment)
        return True

    def _say_progress(self, done: int, total: int, began_s: float) -> None:
        now = time.monotonic()
        if now - self._said_s > SAID_EVERY_S and done:
            self._said_s = now
            left_min = (now - began_s) / done * (total - done) / 60
            say(f"{done} of {total} searches, about {left_min:.1f} min left for them")
