"""Ideal schedulers on the samples, and how near the heuristic comes to its bound."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from flowprefill.bench.goodput.clairvoyant import (
    Timed,
    clairvoyant,
    jobs_of,
    looking_ahead,
    most_on_time,
)
from flowprefill.bench.goodput.lab import LEAST_LOAD, MOST_LOAD, START_LOAD, Lab
from flowprefill.bench.goodput.pairs import mean_interval, ratio_interval, share_interval
from flowprefill.bench.goodput.search import Search
from flowprefill.bench.report import Row
from flowprefill.traces import TraceRequest, scaled_rate, window

WINDOW_S = 30.0  # the bound costs the third power of the requests
STRIDE = 64

CALIBRATION_COLUMNS = {
    "window": "window",
    "requests": "requests",
    "heuristic": "heuristic, on time",
    "bound_solo": "proved bound",
    "share": "heuristic of bound %",
    "bound_any": "bound with packing",
}

LOOKAHEAD_COLUMNS = {
    "target": "target",
    "lookahead_s": "sees ahead s",
    "max_rate_rps": "rate 1/s",
    "share_of_clairvoyant": "of clairvoyant",
    "share_of_clairvoyant_low": "low",
    "share_of_clairvoyant_high": "high",
}

Ideal = Callable[[Sequence[Timed]], set[int]]


def attained(lab: Lab, ideal: Ideal, sample: int, index: float) -> float:
    """Return the share of a sample's requests that an ideal scheduler has on time at a rate."""
    requests = scaled_rate(lab.samples[sample], lab.step**index).requests
    return len(ideal(jobs_of(requests, lab.backend.solo_s))) / len(requests)


def searches_of(lab: Lab, ideal: Ideal, target: float) -> list[Search]:
    """Find an ideal scheduler's highest rate on each sample."""
    least, most = (lab.index_of(lab.capacity_rps * x) for x in (LEAST_LOAD, MOST_LOAD))
    found = []
    for sample in range(len(lab.samples)):
        search = Search(target, lab.index_of(lab.capacity_rps * START_LOAD), STRIDE, least, most)
        while not search.is_done:
            search.tell(search.next_index, attained(lab, ideal, sample, search.next_index))
        found.append(search)
    return found


def shares_of_requests(lab: Lab, searches: Sequence[Search]) -> list[float]:
    """Return how many requests a setting has on time at its highest rates, as a share of the
    clairvoyant heuristic's there; one value for each sample where the target is in reach."""
    return [
        search.target / attained(lab, clairvoyant, sample, search.index)
        for sample, search in enumerate(searches)
        if search.index is not None
    ]


def sweep_rows(lab: Lab, indices: Sequence[int], ideal: Ideal, name: str) -> list[Row]:
    """Return an ideal scheduler's attainment at several rates, as rows of a sweep."""
    rows: list[Row] = []
    for index in indices:
        values = [attained(lab, ideal, n, index) for n in range(len(lab.samples))]
        found = share_interval(values)
        rate_rps = lab.rate_rps(index)
        rows.append(
            {
                "setting": name, "rate_rps": rate_rps, "load": rate_rps / lab.capacity_rps,
                "slo_scale": 1.0, "attainment": found.mean, "attainment_low": found.low,
                "attainment_high": found.high,
            }
        )  # fmt: skip
    return rows


def lookahead_rows(
    lab: Lab, lookaheads_s: Sequence[float], best: Mapping[float, Sequence[float | None]]
) -> list[Row]:
    """Return for each target and lookahead the highest rate of a scheduler that sees so far.

    Args:
        best: target -> the clairvoyant heuristic's rate on each sample.
    """
    rows: list[Row] = []
    for target, of_best in best.items():
        for ahead_s in lookaheads_s:
            found = searches_of(lab, partial(looking_ahead, ahead_s=ahead_s), target)
            rates = [lab.rate_rps(one.index) if one.index is not None else None for one in found]
            share = ratio_interval(rates, of_best)
            known = [rate for rate in rates if rate is not None]
            rows.append(
                {
                    "target": target, "lookahead_s": ahead_s,
                    "max_rate_rps": mean_interval(known).mean,
                    "share_of_clairvoyant": share.mean, "share_of_clairvoyant_low": share.low,
                    "share_of_clairvoyant_high": share.high, "rates_rps": rates,
                }
            )  # fmt: skip
    return rows


def calibration(lab: Lab, searches: Sequence[Search], least_s: Callable[[int], float]) -> list[Row]:
    """Compare heuristic and bound on a short window of each sample, at the heuristic's rate.

    Args:
        least_s: prompt tokens -> machine time that the prompt costs at least in any schedule.
    """
    rows = []
    for number, (sample, search) in enumerate(zip(lab.samples, searches, strict=True)):
        if search.index is None:
            continue
        whole = scaled_rate(sample, lab.step**search.index)
        requests = window(whole, whole.requests[0].at_s, WINDOW_S).requests
        rows.append(_compared(number, requests, lab.backend.solo_s, least_s))
    return rows


def _compared(
    number: int,
    requests: Sequence[TraceRequest],
    solo_s: Callable[[int], float],
    least_s: Callable[[int], float],
) -> Row:
    jobs = jobs_of(requests, solo_s)
    kept, most = len(clairvoyant(jobs)), most_on_time(jobs)
    return {
        "window": f"sample {number}, first {WINDOW_S:g} s",
        "requests": len(requests),
        "heuristic": kept,
        "bound_solo": most,
        "bound_any": most_on_time(jobs_of(requests, least_s)),
        "share": kept / most if most else float("nan"),
    }
