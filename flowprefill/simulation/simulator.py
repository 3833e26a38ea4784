"""simulate: one worker serves a trace in virtual time under the engine's own scheduler.

Called by `flowprefill simulate`, `flowprefill bench goodput` and users. No memory limit is
modelled, nor the time of decisions; the device is that of device.py.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from flowprefill.config import Granularity
from flowprefill.errors import ConfigError
from flowprefill.scheduling import CostModel, MachineRates, Scheduler, SchedulerSettings
from flowprefill.simulation.costs import WorkCosts
from flowprefill.simulation.node import ROLES, Node, Role
from flowprefill.simulation.result import Outcome, Result

if TYPE_CHECKING:
    from flowprefill.request import OnMiss
    from flowprefill.scheduling.policies import Policy
    from flowprefill.simulation.profile import Profile
    from flowprefill.traces import TraceRequest

    PolicyMaker = Callable[[CostModel, SchedulerSettings], Policy]


@dataclass(frozen=True)
class Configuration:
    """How a worker schedules and cuts.

    Attributes:
        policy: a configured name, or what makes a policy of one's own, as `Engine` takes it.
        settings: None: the engine's, `max_blocking_s` by the granularity. Given ones are taken as
            they are.
    """

    policy: str | PolicyMaker = "slack_edf"
    granularity: Granularity = field(default_factory=lambda: Granularity("budget", budget_s=2e-3))
    settings: SchedulerSettings | None = None

    @property
    def name(self) -> str:
        """The policy's and the granularity's names."""
        policy = self.policy if isinstance(self.policy, str) else self.policy.__name__
        return f"{policy}+{self.granularity}"

    def scheduler(self, profile: Profile, bias: float = 1.0) -> Scheduler:
        """Make a scheduler that predicts by the profile, times bias."""
        given = self.settings
        if given is None:
            given = SchedulerSettings(max_blocking_s=self.granularity.max_blocking_s)
        settings = replace(given)
        model = CostModel(profile.shape, _biased(profile.rates, bias), is_calibrated=True)
        policy = self.policy
        if isinstance(policy, str):
            return Scheduler(policy, model, settings)
        return Scheduler(policy(model, settings), model, settings)


def _biased(rates: MachineRates, bias: float) -> MachineRates:
    return MachineRates(
        rates.gemm_flops_per_s / bias,
        rates.attention_flops_per_s / bias,
        rates.weight_bytes_per_s / bias,
        rates.run_overhead_s * bias,
    )


def noises(seed: int, sigma: float) -> Iterator[float]:
    """Yield for each request how much slower than predicted it is: log-normal, mean 1.

    The n-th request has the same noise whatever is simulated, so that pairs can be compared.
    """
    if not sigma:
        while True:
            yield 1.0
    source = random.Random(seed)
    while True:
        yield math.exp(source.gauss(0.0, sigma) - sigma**2 / 2)


def arrivals(
    requests: Iterable[TraceRequest], seed: int, sigma: float
) -> Iterator[tuple[int, TraceRequest, float]]:
    """Yield each request with its number and its noise.

    Raises:
        ConfigError: requests are not in order of arrival.
    """
    last_s = -math.inf
    for number, (request, slower) in enumerate(zip(requests, noises(seed, sigma), strict=False)):
        if request.at_s < last_s:
            raise ConfigError(f"requests: one at {request.at_s} s comes after one at {last_s} s")
        last_s = request.at_s
        yield number, request, slower


def check_noise(noise: float, bias: float, role: str) -> None:
    """Raise ConfigError for what a simulation cannot take."""
    if not (math.isfinite(noise) and 0 <= noise <= 3):
        raise ConfigError(f"noise: got {noise}, expected a number in [0, 3]", param="noise")
    if not (math.isfinite(bias) and bias > 0):
        raise ConfigError(f"bias: got {bias}, expected a number > 0", param="bias")
    if role not in ROLES:
        raise ConfigError(f"role: got {role!r}, expected one of {', '.join(ROLES)}", param="role")


def simulate(
    requests: Iterable[TraceRequest],
    configuration: Configuration,
    profile: Profile,
    *,
    seed: int = 0,
    noise: float = 0.0,
    bias: float = 1.0,
    role: Role = "prefill",
    on_miss: OnMiss = "demote",
    costs: WorkCosts | None = None,
    keep_decisions: int = 0,
    keep_stretches: bool = False,
) -> Result:
    """Serve the requests and tell how each fared.

    Args:
        requests: in order of arrival.
        noise: sigma of the logarithm of true over predicted time, each request's own; the mean of
            the ratio is 1, so the load does not change.
        bias: predictions are this many times as long as the truth; the scheduler may learn better.
        role: `prefill`: a request ends with its first token. `decode`: it comes with its first
            token and a full cache. `mixed`: the worker does both.
        on_miss: of all requests, see `Job`.
        costs: of this profile and granularity, to be used again; None: made here.
        keep_decisions: how many of the last decisions the result holds.
        keep_stretches: whether the result says when which run was executing.

    Raises:
        ConfigError: a value out of range, or arrivals out of order.
    """
    check_noise(noise, bias, role)
    outcomes: list[Outcome] = []
    if costs is None:
        costs = WorkCosts(profile, configuration.granularity)
    scheduler = configuration.scheduler(profile, bias)
    node = Node(
        scheduler, costs, outcomes.append, role=role, on_miss=on_miss, seed=seed, noise=noise
    )
    if keep_decisions:
        node.decisions = deque(maxlen=keep_decisions)
    if keep_stretches:
        node.device.stretches = []
    first_s = math.inf
    for number, request, slower in arrivals(requests, seed, noise):
        first_s = min(first_s, request.at_s)
        while node.next_s <= request.at_s:
            node.step()
        node.arrive(number, request, node.job_of(number, request), slower)
    while node.next_s < math.inf:
        node.step()
    return _result(node, outcomes, first_s)


def _result(node: Node, outcomes: list[Outcome], first_s: float) -> Result:
    outcomes.sort(key=lambda outcome: outcome.number)
    device = node.device
    span_s = max((outcome.finished_s for outcome in outcomes), default=first_s) - first_s
    return Result(
        outcomes=outcomes,
        events=node.events,
        preemptions=device.preemptions,
        blocking_s=device.blocking_s,
        busy_s=device.busy_s,
        span_s=span_s if outcomes else 0.0,
        decisions=node.decisions if node.decisions is not None else deque(),
        stretches=device.stretches or [],
    )
