"""The clairvoyant's highest rates on the samples, and how far its heuristic is from the bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flowprefill.bench.goodput.clairvoyant import clairvoyant, jobs_of, most_on_time
from flowprefill.bench.goodput.lab import LEAST_LOAD, MOST_LOAD, START_LOAD, Lab
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


def clairvoyant_searches(lab: Lab, target: float) -> list[Search]:
    """Find the heuristic's highest rate on each sample."""
    least, most = (lab.index_of(lab.capacity_rps * x) for x in (LEAST_LOAD, MOST_LOAD))
    found = []
    for sample in lab.samples:
        search = Search(target, lab.index_of(lab.capacity_rps * START_LOAD), STRIDE, least, most)
        while not search.is_done:
            index = search.next_index
            requests = scaled_rate(sample, lab.step**index).requests
            jobs = jobs_of(requests, lab.backend.solo_s)
            search.tell(index, len(clairvoyant(jobs)) / len(jobs))
        found.append(search)
    return found


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
