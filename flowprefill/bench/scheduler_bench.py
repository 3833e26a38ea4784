"""Times scheduling decisions: `python -m flowprefill.bench.scheduler_bench [--json FILE]`."""

# ruff: noqa: T201 (a bench prints)

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowprefill.config import POLICIES
from flowprefill.scheduling import (
    Arrival,
    CostModel,
    Finished,
    Job,
    MachineRates,
    ModelShape,
    Scheduler,
)

if TYPE_CHECKING:
    from flowprefill.scheduling import SchedulerEvent

SIZES = (10, 100, 1_000, 10_000)


def _job(number: int, now: float, rng: random.Random) -> Job:
    tokens = rng.choice((20, 100, 400, 1_500, 8_000))
    return Job(f"job-{number}", now, tokens, 0, now + rng.choice((0.25, 1.0, 6.0, 60.0)))


def _measure(policy: str, waiting: int, events: int) -> dict[str, Any]:
    """Fill a scheduler, then time pairs of an arrival and a completion, so that as many wait on."""
    rng = random.Random(0)
    model = CostModel(ModelShape(2e8, 2.5e8, 1e5, 6e7, 6e7), MachineRates(2e11, 1e11, 1e10, 1e-3))
    scheduler = Scheduler(policy, model)
    now, number = 0.0, 0
    for _ in range(waiting):
        number += 1
        now += 1e-4
        scheduler.on_event(Arrival(_job(number, now, rng)), now)
    seconds = []
    for _ in range(events):
        current = scheduler.current
        ended = len(current.job_ids) if current is not None else 0
        events_now: list[SchedulerEvent] = []
        for _ in range(ended):
            number += 1
            events_now.append(Arrival(_job(number, now, rng)))
        if current is not None:
            events_now.append(Finished(current.id, frozenset(current.job_ids)))
        for event in events_now:
            now += 1e-3
            started = time.perf_counter()
            scheduler.on_event(event, now)
            seconds.append(time.perf_counter() - started)
    seconds.sort()
    return {
        "policy": policy,
        "waiting": waiting,
        "mean_s": sum(seconds) / len(seconds),
        "p50_s": seconds[len(seconds) // 2],
        "p99_s": seconds[int(len(seconds) * 0.99)],
        "max_s": seconds[-1],
    }


def main(arguments: list[str] | None = None) -> None:
    """Print a table; write the same as JSON where asked."""
    parser = argparse.ArgumentParser(description="Time of scheduling decisions.")
    parser.add_argument("--events", type=int, default=1_000, help="completions per row")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    options = parser.parse_args(arguments)
    print(f"{'policy':16}{'waiting':>9}{'mean us':>10}{'p50 us':>10}{'p99 us':>10}{'max us':>10}")
    rows = []
    for policy in POLICIES:
        for waiting in SIZES:
            row = _measure(policy, waiting, options.events)
            rows.append(row)
            times = (row[name] * 1e6 for name in ("mean_s", "p50_s", "p99_s", "max_s"))
            print(f"{policy:16}{waiting:9}" + "".join(f"{value:10.1f}" for value in times))
    if options.json is not None:
        options.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
