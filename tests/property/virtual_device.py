"""Drives a Scheduler as the engine does, for property tests: clients that leave, works that fail.

The device is the simulator's. What it reports reaches the scheduler a little later, so that events
cross as they do in life.
"""

from __future__ import annotations

import heapq
import math
import random
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

from scheduler_witness import Witness

from flowprefill.scheduling import (
    Arrival,
    Cancelled,
    CostModel,
    Failed,
    Finished,
    Held,
    MachineRates,
    ModelShape,
    Scheduler,
    TimerFired,
)
from flowprefill.simulation.device import VirtualDevice as Device
from flowprefill.simulation.device import VirtualRun

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from flowprefill.scheduling import Decision, Job, SchedulerEvent, Work


def cost_model(tokens_per_s: float = 10_000.0) -> CostModel:
    """Return a model of a machine with so much prefill, 2 ms per empty step and decode step."""
    return CostModel(
        ModelShape(1e6, 1e6, 1e2, 1.0, 1.0),
        MachineRates(1e6 * tokens_per_s, 1e6 * tokens_per_s, 1e9, 1e-3),
        is_calibrated=True,
    )


@dataclass
class Client:
    """One request as its sender sees it.

    Attributes:
        output_tokens: tokens after which it ends.
        cancel_s: when its sender goes away; inf: never.
        stalls: from when to when its sender reads nothing.
        ends: (how, when) of each end that was reported; must be one in the end.
    """

    job: Job
    output_tokens: int = 1
    cancel_s: float = math.inf
    stalls: tuple[tuple[float, float], ...] = ()
    is_stalled: bool = False
    has_arrived: bool = False
    first_token_s: float = math.inf
    token_times: list[float] = field(default_factory=list)
    ends: list[tuple[str, float]] = field(default_factory=list)

    @property
    def is_on_time(self) -> bool:
        """Whether the first token came by its deadline."""
        return self.first_token_s <= self.job.ttft_deadline_s


class Run(VirtualRun):
    """A work on the device."""

    def __init__(self, work: Work, total_s: float, boundary_s: float) -> None:
        segments = math.ceil(total_s / boundary_s) if boundary_s > 0 else 1000
        super().__init__(work.id, total_s, lambda: [(i + 1) / segments for i in range(segments)])
        self.work = work
        self.first_jobs = tuple(work.jobs)  # some may end early


class VirtualDevice:
    """One scheduler, one device, one clock."""

    def __init__(
        self,
        scheduler: Scheduler,
        clients: Iterable[Client],
        *,
        seed: int = 0,
        noise: float = 0.0,
        fail_share: float = 0.0,
        report_s: float = 0.0,
        slowness: float = 1.0,
        on_decision: Callable[[SchedulerEvent, float, Decision], None] | None = None,
    ) -> None:
        self.scheduler = scheduler
        Witness(scheduler)
        self.clients = {client.job.id: client for client in clients}
        self.runs: dict[int, Run] = {}
        self.log: list[tuple[float, SchedulerEvent, Decision]] = []
        self.now = 0.0
        self._truth = CostModel(scheduler.cost_model.shape, scheduler.cost_model.rates)
        self._random = random.Random(seed)
        self._noise, self._fail_share, self._report_s = noise, fail_share, report_s
        self._slowness = slowness
        self._on_decision = on_decision
        self._happenings: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._device = Device()
        self._timer = 0
        for client in self.clients.values():
            self._at(client.job.arrival_s, self._bind(self._arrive, client))
            if client.cancel_s < math.inf:
                self._at(client.cancel_s, self._bind(self._leave, client))
            for from_s, to_s in client.stalls:
                self._at(from_s, self._bind(self._stall, client, True))
                self._at(to_s, self._bind(self._stall, client, False))

    def play(self, limit: int = 50_000) -> None:
        """Let everything happen until nothing is left to happen."""
        for _ in range(limit):
            next_s = self._happenings[0][0] if self._happenings else math.inf
            if min(next_s, self._device.next_s) == math.inf:
                return
            at = min(next_s, self._device.next_s)
            assert at >= self.now
            self.now = at
            if self._device.next_s <= next_s:
                self._advance()
            else:
                heapq.heappop(self._happenings)[2]()
        raise AssertionError(f"still busy after {limit} happenings: the scheduler goes in circles")

    # -- clients ---------------------------------------------------------------------------

    def _arrive(self, client: Client) -> None:
        if not client.ends:
            client.has_arrived = True
            self._tell(Arrival(client.job))

    def _leave(self, client: Client) -> None:
        if client.ends:
            return
        client.ends.append(("cancelled", self.now))
        if client.has_arrived:
            self._tell(Cancelled(client.job.id))

    def _stall(self, client: Client, is_stalled: bool) -> None:
        client.is_stalled = is_stalled
        if client.has_arrived and not client.ends:
            self._tell(Held(client.job.id, client.is_stalled))

    # -- the engine's part -----------------------------------------------------------------

    def _tell(self, event: SchedulerEvent) -> None:
        decision = self.scheduler.on_event(event, self.now)
        self.log.append((self.now, event, decision))
        for work in decision.cancel:
            self._device.cancel(self.runs[work.id], self.now)
        for job_id, _ in decision.dropped:
            self.clients[job_id].ends.append(("dropped", self.now))
        if decision.dispatch is not None:
            self._dispatch(decision.dispatch)
        self._timer += 1
        if decision.wake_at is not None:
            self._at(decision.wake_at, self._bind(self._wake, self._timer))
        if self._on_decision is not None:
            self._on_decision(event, self.now, decision)

    def _wake(self, timer: int) -> None:
        if timer == self._timer:
            self._tell(TimerFired())

    def _report(self, run: Run, failed: bool) -> None:
        works_clients = [self.clients[job_id] for job_id in run.work.job_ids]
        alive = [client for client in works_clients if not client.ends]
        if failed:
            for client in alive:
                client.ends.append(("failed", self.now))
            self._tell(Failed(run.id))
            return
        ends = set()
        for client in alive:
            client.first_token_s = min(client.first_token_s, self.now)
            client.token_times.append(self.now)
            if len(client.token_times) == client.output_tokens:
                client.ends.append(("finished", self.now))
                ends.add(client.job.id)
        self._tell(Finished(run.id, frozenset(ends), run.executed_s))
        for client in alive:
            if run.work.kind == "prefill" and client.is_stalled and not client.ends:
                self._tell(Held(client.job.id, is_held=True))

    # -- the device's part -----------------------------------------------------------------

    def _dispatch(self, work: Work) -> None:
        run = self.runs.get(work.id)
        if run is None:
            assert work.shape is not None
            rows, context, _ = work.shape
            is_decode = work.kind == "decode"
            uncorrected_s = (
                self._truth.decode_s(rows, int(context)) if is_decode else work.nominal_s
            )
            noise = math.exp(self._random.gauss(0.0, self._noise))
            true_s = uncorrected_s * self._slowness * noise
            boundary_s = self.scheduler.settings.max_blocking_s
            run = self.runs[work.id] = Run(work, true_s, boundary_s)
        self._device.dispatch(run, self.now)  # False: it has ended, the report is on its way

    def _advance(self) -> None:
        event = self._device.advance(self.now)
        if event is not None and event.kind == "finished":
            failed = self._random.random() < self._fail_share
            run = self.runs[event.run.id]
            self._at(self.now + self._report_s, self._bind(self._report, run, failed))

    def _at(self, time: float, happening: Callable[[], None]) -> None:
        heapq.heappush(self._happenings, (time, next(self._numbers), happening))

    @staticmethod
    def _bind(method: Callable[..., None], *args: Any) -> Callable[[], None]:
        return lambda: method(*args)
