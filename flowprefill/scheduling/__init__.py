"""Scheduling: pure decisions, event in, decision out; the engine, the simulator and tests drive it.

`Scheduler(policy, cost_model, settings).on_event(event, now) -> Decision` never reads a clock,
sleeps, or touches a tensor. One thread at a time: the caller holds its lock around it.
"""

from __future__ import annotations

from flowprefill.scheduling.cost_model import CostModel, MachineRates, ModelShape
from flowprefill.scheduling.interface import (
    Arrival,
    Cancelled,
    Decision,
    Failed,
    Finished,
    Held,
    Load,
    SchedulerEvent,
    SchedulerSettings,
    TimerFired,
)
from flowprefill.scheduling.job import Job, WorkKind
from flowprefill.scheduling.scheduler import Scheduler
from flowprefill.scheduling.work import Work

__all__ = [
    "Arrival",
    "Cancelled",
    "CostModel",
    "Decision",
    "Failed",
    "Finished",
    "Held",
    "Job",
    "Load",
    "MachineRates",
    "ModelShape",
    "Scheduler",
    "SchedulerEvent",
    "SchedulerSettings",
    "TimerFired",
    "Work",
    "WorkKind",
]
