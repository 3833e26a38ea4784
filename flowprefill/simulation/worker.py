"""VirtualWorker: a worker on a virtual clock, so that the whole EngineCore runs without a device.

Implements engine/worker.py's Worker with the times of a profile; computes nothing, chooses the same
token each time. `simulate` (simulator.py) is the fast way; this one checks it, and the core.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flowprefill.engine.worker import RunEventKind, WorkerLimits, WorkerStats
from flowprefill.scheduling.cost_model import attention_pairs
from flowprefill.simulation.costs import WorkCosts
from flowprefill.simulation.device import ENDED, VirtualDevice, VirtualRun

if TYPE_CHECKING:
    from flowprefill.config import Granularity
    from flowprefill.engine.worker import Batch
    from flowprefill.scheduling import MachineRates, ModelShape
    from flowprefill.simulation.profile import Profile

TOKEN = 7  # what is chosen each time


@dataclass(frozen=True, slots=True)
class VirtualAccounting:
    """See RunAccounting."""

    first_start_s: float
    running_s: float
    suspended_s: float
    max_blocking_s: float
    num_preemptions: int


class WorkerRun(VirtualRun):
    """See RunHandle; `tokens` are what its sequences have chosen."""

    __slots__ = ("error", "tokens")

    def __init__(self, run_id: int, total_s: float, bounds: Any, sequences: int) -> None:
        super().__init__(run_id, total_s, bounds)
        self.error = ""
        self.tokens = [TOKEN] * sequences

    def accounting(self) -> VirtualAccounting:
        """Return where its time went, up to its last boundary."""
        started_s = self.start_s if self.start_s < math.inf else 0.0
        return VirtualAccounting(
            started_s, self.executed_s, self.suspended_s, self.blocking_s, self.preemptions
        )


@dataclass(frozen=True, slots=True)
class WorkerEvent:
    """See RunEvent."""

    kind: RunEventKind
    run: WorkerRun
    time_s: float


class VirtualWorker:
    """See Worker. One thread. Time passes in `poll` alone.

    Attributes:
        now: the virtual time, seconds; starts at 1, as 0 means never in a run's account.
        halt_s: `poll` lets no more time pass than to here.
    """

    def __init__(self, profile: Profile, granularity: Granularity) -> None:
        """Make a worker of this profile, with memory for ten million tokens."""
        self.limits = WorkerLimits(1_000_000, 64, 160_000, chooses_tokens=True)
        self.shape: ModelShape = profile.shape
        self.rates: MachineRates | None = profile.rates
        self.now = 1.0
        self.halt_s = math.inf
        self._profile = profile
        self.granularity = granularity
        self._costs = WorkCosts(profile, granularity)
        self._device = VirtualDevice(profile.segments_in_flight)
        self._events: list[WorkerEvent] = []

    def start(self) -> None:
        """Nothing to start."""

    def stop(self) -> None:
        """Nothing to stop."""

    def now_s(self) -> float:
        """Return the virtual time."""
        return self.now

    def make_run(self, batch: Batch) -> WorkerRun:
        """Make a run that takes the profile's time for the batch."""
        costs, sequences = self._costs, batch.sequences
        rows = sum(len(sequence.tokens) for sequence in sequences)
        pairs = sum(attention_pairs(len(s.tokens), s.context) for s in sequences)
        is_decode = all(len(s.tokens) == 1 and s.context > 0 for s in sequences)
        total_s = costs.decode_s(rows, int(pairs)) if is_decode else costs.prefill_s(rows, pairs)
        return WorkerRun(batch.run_id, total_s, lambda: costs.bounds(rows, pairs), len(sequences))

    def dispatch(self, run: Any) -> bool:
        """Go on with this run from the next boundary on."""
        return self._device.dispatch(run, self.now)

    def suspend(self, run: Any) -> bool:
        """Have the run stop at its next boundary."""
        return self._device.suspend(run, self.now)

    def cancel(self, run: Any) -> bool:
        """End the run: at its next boundary if it executes, else at once."""
        if not self._device.cancel(run, self.now):
            return False
        if run.state in ENDED:
            self._events.append(WorkerEvent("cancelled", run, self.now))
        return True

    def poll(self, until_s: float) -> list[Any]:
        """Let time pass to what comes first: an event, `until_s` or `halt_s`."""
        if not self._events:
            self.now = min(max(until_s, self.now), self.halt_s, self._device.next_s)
            if self.now == math.inf:
                raise RuntimeError("no run executes and no timer is set: poll would never return")
            event = self._device.advance(self.now)
            if event is not None and isinstance(event.run, WorkerRun):
                self._events.append(WorkerEvent(event.kind, event.run, self.now))
        events, self._events = self._events, []
        return events

    def wake(self) -> None:
        """No thread sleeps here."""

    def logits(self, run: Any) -> Any:
        """Raise: its runs give tokens only."""
        raise NotImplementedError(f"run {run.id}: no logits on a virtual device")

    def chosen(self, run: Any) -> list[int]:
        """Return the tokens."""
        tokens: list[int] = run.tokens
        return tokens

    def scores(self, run: Any) -> Any:
        """Raise: its runs give tokens only."""
        raise NotImplementedError(f"run {run.id}: no scores on a virtual device")

    def embeddings(self, run: Any) -> Any:
        """Raise: its runs give tokens only."""
        raise NotImplementedError(f"run {run.id}: no embeddings on a virtual device")

    def zero_blocks(self, blocks: list[int]) -> None:
        """Do nothing: blocks have no content."""

    def set_granularity(self, granularity: Granularity) -> None:
        """Cut the runs made from now on so."""
        self.granularity = granularity
        self._costs = WorkCosts(self._profile, granularity)

    def stats(self) -> WorkerStats:
        """Return the preemptions and the longest wait; segments are not counted."""
        device = self._device
        return WorkerStats(device.preemptions, 0, 0, max(device.blocking_s, default=0.0))

    def operator_times(self, run: Any) -> list[Any]:  # noqa: ARG002
        """Return none: rates are learnt from whole runs."""
        return []

    def timeline(self, since: int = 0) -> list[Any]:  # noqa: ARG002
        """Return none: segments are not kept."""
        return []

    def describe(self) -> dict[str, Any]:
        """Return profile and granularity."""
        return {
            "device": "virtual",
            "profile": self._profile.name,
            "granularity": str(self._costs.granularity),
        }
