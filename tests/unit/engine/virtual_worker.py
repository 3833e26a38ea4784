"""A worker that computes nothing, on a clock of its own: what the protocol Worker asks, no more."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from flowprefill.config import Granularity
from flowprefill.engine.worker import (
    Batch,
    RunEventKind,
    RunState,
    WorkerLimits,
    WorkerStats,
)
from flowprefill.scheduling import MachineRates, ModelShape

TOKEN_S = 1e-3  # of every new token
TOKEN = 7  # what is chosen each time


@dataclass
class VirtualAccounting:
    """See RunAccounting."""

    first_start_s: float = 0.0
    running_s: float = 0.0
    suspended_s: float = 0.0
    max_blocking_s: float = 0.0
    num_preemptions: int = 0


@dataclass(eq=False)
class VirtualRun:
    """See RunHandle."""

    id: int
    left_s: float
    outcomes: list[int]
    state: RunState = "ready"
    error: str = ""
    since_s: float = 0.0
    account: VirtualAccounting = field(default_factory=VirtualAccounting)

    def accounting(self) -> VirtualAccounting:
        """Return the account."""
        return self.account


@dataclass
class VirtualEvent:
    """See RunEvent."""

    kind: RunEventKind
    run: VirtualRun
    time_s: float


class VirtualWorker:
    """See Worker. Time passes in `poll` alone: to the next end of a run, or to `halt_s`."""

    def __init__(self) -> None:
        self.limits = WorkerLimits(100_000, 64, 4096, chooses_tokens=True)
        self.shape = ModelShape(1e6, 1.0, 1e-9, 1e-9, 1e-9)
        self.rates: MachineRates | None = MachineRates(1e6 / TOKEN_S, 1e12, 1e12, 1e-9)
        self.now = 1.0
        self.halt_s = math.inf
        self._current: VirtualRun | None = None
        self._events: list[VirtualEvent] = []

    def start(self) -> None:
        """Nothing to start."""

    def stop(self) -> None:
        """Nothing to stop."""

    def now_s(self) -> float:
        """Return the virtual time."""
        return self.now

    def make_run(self, batch: Batch) -> VirtualRun:
        """Make a run of so many tokens."""
        tokens = sum(len(sequence.tokens) for sequence in batch.sequences)
        return VirtualRun(batch.run_id, tokens * TOKEN_S, [TOKEN] * len(batch.sequences))

    def dispatch(self, run: Any) -> bool:
        """Switch at once."""
        if run.state in ("finished", "cancelled", "failed"):
            return False
        if run is not self._current:
            self._pause("suspended")
            if run.state == "ready":
                run.account.first_start_s = self.now
            else:
                run.account.suspended_s += self.now - run.since_s
            run.state, run.since_s, self._current = "running", self.now, run
        return True

    def suspend(self, run: Any) -> bool:
        """Never early: only a dispatch suspends."""
        del run
        return False

    def cancel(self, run: Any) -> bool:
        """End the run at once."""
        if run.state in ("finished", "cancelled", "failed"):
            return False
        if run is self._current:
            self._pause("cancelled")
        run.state = "cancelled"
        self._events.append(VirtualEvent("cancelled", run, self.now))
        return True

    def poll(self, until_s: float) -> list[Any]:
        """Let time pass to what comes first."""
        run = self._current
        end_s = run.since_s + run.left_s if run is not None else math.inf
        if not self._events:
            self.now = min(max(until_s, self.now), self.halt_s, end_s)
            assert self.now < math.inf, "nothing will ever happen"
            if run is not None and self.now == end_s:
                self._pause("finished")
                self._events.append(VirtualEvent("finished", run, self.now))
        events, self._events = self._events, []
        return events

    def wake(self) -> None:
        """Nobody sleeps."""

    def outcomes(self, run: Any) -> list[int]:
        """Return the tokens."""
        chosen: list[int] = run.outcomes
        return chosen

    def zero_blocks(self, blocks: list[int]) -> None:
        """There are none."""

    def set_granularity(self, granularity: Granularity) -> None:
        """Every boundary is near enough."""

    def stats(self) -> WorkerStats:
        """Return zeros."""
        return WorkerStats(0, 0, 0, 0.0)

    def timeline(self) -> list[Any]:
        """Return no segment."""
        return []

    def describe(self) -> dict[str, Any]:
        """Return its name."""
        return {"device": "virtual"}

    def _pause(self, state: RunState) -> None:
        run, self._current = self._current, None
        if run is None:
            return
        passed_s = self.now - run.since_s
        run.left_s -= passed_s
        run.account.running_s += passed_s
        run.account.num_preemptions += state == "suspended"
        run.state, run.since_s = state, self.now
