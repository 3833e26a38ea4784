"""A scheduler whose machine prefills 10,000 tokens a second, and jobs that arrive at it by hand."""

from __future__ import annotations

import math
from typing import Any

from flowprefill.scheduling import (
    Arrival,
    CostModel,
    Decision,
    Job,
    MachineRates,
    ModelShape,
    Scheduler,
    SchedulerSettings,
)

TOKENS_PER_S = 10_000


def make(policy: str = "slack_edf", **settings: Any) -> Scheduler:
    model = CostModel(
        ModelShape(1e6, 1e6, 1e-3, 1.0, 1.0),
        MachineRates(1e6 * TOKENS_PER_S, 1e10, 1e9, 1e-3),
        is_calibrated=True,
    )
    return Scheduler(policy, model, SchedulerSettings(**settings))


def job(name: str, tokens: int, ttft: float = math.inf, at: float = 0.0, **more: Any) -> Job:
    return Job(name, at, tokens, 0, at + ttft, **more)


def arrive(scheduler: Scheduler, *args: Any, **more: Any) -> Decision:
    new = job(*args, **more)
    return scheduler.on_event(Arrival(new), new.arrival_s)
