"""simulate_cluster: many equal workers behind a router, in bounded memory.

Each worker has a scheduler and a device of its own (node.py); all are on one clock. Requests are
taken one by one from an iterator, and what ended is counted, not kept.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flowprefill.errors import ConfigError
from flowprefill.simulation.costs import WorkCosts
from flowprefill.simulation.digest import Digest
from flowprefill.simulation.node import Node, Role
from flowprefill.simulation.routers import ROUTERS, Router, check_router
from flowprefill.simulation.simulator import Configuration, arrivals, check_noise

if TYPE_CHECKING:
    from flowprefill.simulation.profile import Profile
    from flowprefill.simulation.result import Outcome
    from flowprefill.traces import TraceRequest

MAX_WORKERS = 100_000


@dataclass
class ClassCounts:
    """What happened to the requests of one class."""

    requests: int = 0
    on_time: int = 0
    ttft: Digest = field(default_factory=Digest)

    @property
    def attainment(self) -> float:
        """Share that met its objectives; NaN of none."""
        return self.on_time / self.requests if self.requests else math.nan


@dataclass
class ClusterResult:
    """What a simulation of a cluster found.

    Attributes:
        workers: how many there were.
        classes: counts by service class, in the order of their first end.
        whole: counts of all requests.
        blocking: waits of dispatched runs for the segment that was executing, seconds.
        preemptions: how many times a run was suspended.
        events: how many events the schedulers were told.
        busy_s: how long each device was executing.
        span_s: from the first arrival to the last end.
    """

    workers: int
    classes: dict[str, ClassCounts] = field(default_factory=dict)
    whole: ClassCounts = field(default_factory=ClassCounts)
    blocking: Digest = field(default_factory=Digest)
    preemptions: int = 0
    events: int = 0
    busy_s: list[float] = field(default_factory=list)
    span_s: float = 0.0

    @property
    def utilisation(self) -> float:
        """Mean share of the span in which the devices were executing."""
        return sum(self.busy_s) / (self.workers * self.span_s) if self.span_s > 0 else 0.0

    def count(self, outcome: Outcome) -> None:
        """Count a request that has ended."""
        counts = self.classes.setdefault(outcome.request.service_class, ClassCounts())
        on_time = outcome.is_on_time
        for each in (counts, self.whole):
            each.requests += 1
            each.on_time += on_time
            each.ttft.add(outcome.ttft_s)


class _Cluster:
    """The workers, and which of them has something to do next."""

    def __init__(self, nodes: list[Node], router: Router) -> None:
        self.nodes = nodes
        self._router = router
        self._due: list[tuple[float, int]] = []  # heap of (time, worker); stale ones are skipped

    def run_until(self, time_s: float) -> None:
        """Let everything happen that is due up to this time, in order."""
        due, nodes = self._due, self.nodes
        while due and due[0][0] <= time_s:
            at_s, worker = heapq.heappop(due)
            node = nodes[worker]
            if node.next_s == at_s:
                node.step()
                self._note(worker, at_s)

    def arrive(self, number: int, request: TraceRequest, noise: float) -> None:
        """Send a request to the worker that the router chooses."""
        job = self.nodes[0].job_of(number, request)
        worker = self._router.choose(job, request.at_s)
        self.nodes[worker].arrive(number, request, job, noise)
        self._note(worker, request.at_s)

    def _note(self, worker: int, now: float) -> None:
        self._router.changed(worker, now)
        next_s = self.nodes[worker].next_s
        if next_s < math.inf:
            heapq.heappush(self._due, (next_s, worker))
        if len(self._due) > 8 * len(self.nodes) + 1000:
            self._due = [(n.next_s, i) for i, n in enumerate(self.nodes) if n.next_s < math.inf]
            heapq.heapify(self._due)


def simulate_cluster(
    requests: Iterable[TraceRequest],
    workers: int,
    router: str,
    configuration: Configuration,
    profile: Profile,
    *,
    seed: int = 0,
    noise: float = 0.0,
    bias: float = 1.0,
    role: Role = "prefill",
    on_end: Callable[[Outcome], None] | None = None,
) -> ClusterResult:
    """Serve the requests on so many workers of one profile.

    Memory is bounded by the workers and the requests that live at one time.

    Args:
        requests: in order of arrival; read one by one.
        router: a name of ROUTERS.
        seed, noise, bias, role: as `simulate` takes them; the router draws by the seed.
        on_end: told of each request that ends, after it was counted.

    Raises:
        ConfigError: a value out of range, or arrivals out of order.
    """
    check_noise(noise, bias, role)
    check_router(router, role)
    if not 1 <= workers <= MAX_WORKERS:
        raise ConfigError(f"workers: got {workers}, expected 1..{MAX_WORKERS}", param="workers")
    result = ClusterResult(workers)
    last_end_s = -math.inf

    def end(outcome: Outcome) -> None:
        nonlocal last_end_s
        last_end_s = max(last_end_s, outcome.finished_s)
        result.count(outcome)
        if on_end is not None:
            on_end(outcome)

    costs = WorkCosts(profile, configuration.granularity)
    nodes = [
        Node(
            configuration.scheduler(profile, bias), costs, end, role=role, worker=worker,
            seed=seed + worker, noise=noise, on_blocking=result.blocking.add,
        )
        for worker in range(workers)
    ]  # fmt: skip
    cluster = _Cluster(nodes, ROUTERS[router](nodes, seed))
    first_s = math.inf
    for number, request, slower in arrivals(requests, seed, noise):
        first_s = min(first_s, request.at_s)
        cluster.run_until(request.at_s)
        cluster.arrive(number, request, slower)
    cluster.run_until(math.inf)
    result.busy_s = [node.device.busy_s for node in nodes]
    result.preemptions = sum(node.device.preemptions for node in nodes)
    result.events = sum(node.events for node in nodes)
    result.span_s = max(last_end_s - first_s, 0.0) if result.whole.requests else 0.0
    return result
