"""Rows of `bench goodput`: highest rates with paired intervals, sweeps, shares of the best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from flowprefill.bench.goodput.lab import Lab, Place
from flowprefill.bench.goodput.measurement import Measurement
from flowprefill.bench.goodput.pairs import Interval, mean_interval, ratio_interval, share_interval
from flowprefill.bench.goodput.search import Search
from flowprefill.bench.goodput.setting import FIRST_COME, Setting
from flowprefill.bench.report import Row

Found = Mapping[tuple[Setting, float], Sequence[Search]]
Rates = list[float | None]
COLUMNS = {
    "setting": "setting",
    "target": "target %",
    "max_rate_rps": "max rate 1/s",
    "goodput_rps": "goodput 1/s",
    "ratio_to_fcfs": "times fcfs+none",
    "ours_over": "ours / it",
    "samples": "samples",
    "unfinished": "unfinished",
}
IDEAL_COLUMNS = {
    "setting": "setting",
    "target": "target %",
    "share_of_clairvoyant": "rate / clairvoyant's",
    "share_of_queue_knowing": "rate / queue-knowing's",
    "share_of_requests": "requests of clairvoyant's there %",
}
SWEEP_COLUMNS = {
    "setting": "setting",
    "load": "load",
    "rate_rps": "rate 1/s",
    "slo_scale": "SLO scale",
    "requests": "requests",
    "median_ttft_s": "median TTFT ms",
    "attainment": "on time %",
    "attainment_low": "low %",
    "attainment_high": "high %",
    "ours_minus": "ours - it %",
    "ours_minus_low": "its low %",
    "ours_minus_high": "its high %",
    "ours_minus_least": "least %",
}


def rates_of(lab: Lab, searches: Sequence[Search]) -> Rates:
    """Return the highest rate on each sample; None: out of reach there, or no time to find it."""
    return [lab.rate_rps(one.index) if one.index is not None else None for one in searches]


@dataclass(frozen=True, slots=True)
class Ideals:
    """Highest rates of ideal schedulers by target.

    Attributes:
        clairvoyant: of the heuristic that knows all arrivals.
        queue_knowing: of the one that knows what has arrived.
        requests: setting and target -> shares as `shares_of_requests` gives them.
    """

    clairvoyant: Mapping[float, Rates]
    queue_knowing: Mapping[float, Rates]
    requests: Mapping[tuple[Setting, float], Sequence[float]] = field(default_factory=dict)


def rows_of(lab: Lab, found: Found, ideals: Ideals | None = None) -> list[Row]:
    """Return one row per setting and target; without ideals, the shares of them are left out."""
    rates = {key: rates_of(lab, searches) for key, searches in found.items()}
    first_come = Setting.parse(FIRST_COME)
    rows = []
    for (setting, target), mine in rates.items():
        others = {
            one: rates.get((one, target), [None] * len(mine)) for one in (first_come, lab.ours)
        }
        known = [rate for rate in mine if rate is not None]
        row: Row = {
            "policy": setting.policy,
            "granularity": setting.granularity,
            "batch_tokens": setting.most_batch_tokens,
            "setting": str(setting),
            "target": target,
            **_named("max_rate", mean_interval(known, least=0), mean_name="max_rate_rps"),
            "goodput_rps": mean_interval(known).mean * target,
            **_named("ratio_to_fcfs", ratio_interval(mine, others[first_come])),
            **_named("ours_over", ratio_interval(others[lab.ours], mine)),
            "samples": len(known),
            "unfinished": sum(not one.is_done for one in found[setting, target]),
            "rates_rps": mine,
        }
        if ideals is not None:
            best, online = ideals.clairvoyant[target], ideals.queue_knowing[target]
            row |= _named("share_of_clairvoyant", ratio_interval(mine, best))
            row |= _named("share_of_queue_knowing", ratio_interval(mine, online))
            row |= _named(
                "share_of_requests", mean_interval(ideals.requests.get((setting, target), ()))
            )
        rows.append(row)
    return rows


def told(row: Row) -> Row:
    """Return a row for a table: each ratio as text with its interval."""
    found = dict(row)
    for name in ("ratio_to_fcfs", "ours_over", "share_of_clairvoyant", "share_of_queue_knowing"):
        if name in row and not math.isnan(row[name]):
            low, high = row[f"{name}_low"], row[f"{name}_high"]
            interval = "" if math.isnan(low) else f" ({low:.3g}..{high:.3g})"
            found[name] = f"{row[name]:.3f}{interval}"
    return found


def _named(name: str, one: Interval, mean_name: str = "") -> dict[str, float]:
    return {mean_name or name: one.mean, f"{name}_low": one.low, f"{name}_high": one.high}


def measured(lab: Lab, settings: Sequence[Setting]) -> list[Row]:
    """Return a row for each setting and rate that was measured for a search, in order of rate."""
    rows: list[Row] = []
    for setting in settings:
        indices = {place.index for place in lab.places if place.setting == setting}
        for index in sorted(indices):
            rows += _sweep_rows(lab, [setting], index, 1.0, lab.places)
    return rows


def sweep(
    lab: Lab, settings: Sequence[Setting], indices: Sequence[int], slo_scales: Sequence[float]
) -> list[Row]:
    """Measure every setting at every rate and SLO scale, on every sample; a row for each."""
    rows: list[Row] = []
    for scale in slo_scales:
        for index in indices:
            for sample in range(len(lab.samples)):  # in turns: a machine's speed changes
                for setting in settings:
                    lab.at(Place(setting, sample, index, scale))
            rows += _sweep_rows(lab, settings, index, scale, lab.places)
    return rows


def _sweep_rows(
    lab: Lab,
    settings: Sequence[Setting],
    index: int,
    scale: float,
    places: Mapping[Place, Measurement],
) -> list[Row]:
    rows: list[Row] = []
    ours = lab.ours
    # A budget may end between two settings: all get the samples that all have.
    numbers = [
        n
        for n in range(len(lab.samples))
        if all(Place(setting, n, index, scale) in places for setting in settings)
    ]
    for setting in settings:
        pairs = [
            (places.get(Place(ours, n, index, scale)), places.get(Place(setting, n, index, scale)))
            for n in numbers
        ]
        ones = [one for _, one in pairs if one is not None]
        if not ones:
            continue
        differences = [mine.attainment - one.attainment for mine, one in pairs if mine and one]
        rows.append(
            {
                "policy": setting.policy,
                "granularity": setting.granularity,
                "setting": str(setting),
                "rate_rps": lab.rate_rps(index),
                "load": lab.rate_rps(index) / lab.capacity_rps,
                "slo_scale": scale,
                **_named("attainment", share_interval([one.attainment for one in ones])),
                **_named("ours_minus", mean_interval(differences)),
                "ours_minus_least": min(differences, default=math.nan),
                "preemptions": sum(one.preemptions for one in ones),
                "requests": sum(one.requests for one in ones),
                "failed": sum(one.failed for one in ones),
                "late_s": max(one.late_s for one in ones),
                "median_ttft_s": mean_interval([one.median_ttft_s for one in ones]).mean,
                "by_class": _by_class(ones),
                "blocking_mean_s": mean_interval([one.blocking_mean_s for one in ones]).mean,
                "blocking_p99_s": max(one.blocking_p99_s for one in ones),
            }
        )
    return rows


def _by_class(ones: Sequence[Measurement]) -> dict[str, dict[str, float]]:
    """Return attainment and median TTFT of each class, means over the samples that have it."""
    found = {}
    for name in dict.fromkeys(name for one in ones for name in one.by_class):
        of_class = [one for one in ones if name in one.by_class]
        found[name] = {
            "attainment": mean_interval([one.by_class[name] for one in of_class]).mean,
            "median_ttft_s": mean_interval(
                [one.median_by_class.get(name, math.nan) for one in of_class]
            ).mean,
        }
    return found


def against_ours(rows: Sequence[Row], ours: Setting) -> list[Row]:
    """Return per setting how ours compares over a whole sweep: mean and least difference."""
    found: list[Row] = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        mine = [row for row in rows if row["setting"] == setting]
        if setting == str(ours) or any(math.isnan(row["ours_minus"]) for row in mine):
            continue
        found.append(
            {
                "setting": setting,
                "ours_minus": sum(row["ours_minus"] for row in mine) / len(mine),
                "worst_mean": min(row["ours_minus"] for row in mine),
                "worst_sample": min(row["ours_minus_least"] for row in mine),
            }
        )
    return found


AGAINST_COLUMNS = {
    "setting": "setting",
    "ours_minus": "ours - it, mean over the sweep %",
    "worst_mean": "at the worst place %",
    "worst_sample": "on the worst sample there %",
}


def mean_rate(rows: Sequence[Row], setting: Setting, target: float) -> float | None:
    """Return a setting's mean highest rate; None: unknown."""
    for row in rows:
        if row["setting"] == str(setting) and row["target"] == target:
            rate: float = row["max_rate_rps"]
            return None if math.isnan(rate) else rate
    return None
