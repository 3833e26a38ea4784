"""Simulation: the engine's scheduler and planner on a virtual clock; minutes of load in a second.

`simulate` serves a trace on one worker, `simulate_cluster` on many behind a router. Profiles say
how fast which model is on which machine.
"""

from __future__ import annotations

from flowprefill.simulation.cluster import ClusterResult, simulate_cluster
from flowprefill.simulation.costs import WorkCosts
from flowprefill.simulation.profile import Profile
from flowprefill.simulation.result import Outcome, Result
from flowprefill.simulation.simulator import Configuration, simulate

__all__ = [
    "ClusterResult",
    "Configuration",
    "Outcome",
    "Profile",
    "Result",
    "WorkCosts",
    "simulate",
    "simulate_cluster",
]
