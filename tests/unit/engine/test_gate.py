"""The core's gate in virtual time: who is admitted keeps what was predicted, others are told."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest

from flowprefill.config import Granularity, ServiceClass
from flowprefill.engine.core import EngineCore
from flowprefill.engine.handle import Handle
from flowprefill.engine.kv_blocks import BlockPool
from flowprefill.engine.live_request import LiveRequest, TokenSide
from flowprefill.engine.sampler import Sampler
from flowprefill.engine.stop import StopChecker
from flowprefill.engine.worker import Batch
from flowprefill.errors import Overloaded
from flowprefill.request import SLO, Request, SamplingParams
from flowprefill.scheduling import (
    CostModel,
    MachineRates,
    ModelShape,
    Scheduler,
    SchedulerSettings,
)
from flowprefill.scheduling.admission import AdmissionLimits
from flowprefill.simulation import Profile
from flowprefill.simulation.worker import VirtualWorker, WorkerRun

REJECT, DEMOTE = ServiceClass(SLO(), admission="reject"), ServiceClass(SLO(), admission="demote")


class Letters:
    """A decoder to which every token is one letter."""

    def push(self, token_id: int) -> str:
        return chr(ord("a") + token_id)

    def flush(self) -> str:
        return ""


class SteadyWorker(VirtualWorker):
    """A millisecond for each new token of a batch, a boundary after each."""

    def __init__(self) -> None:
        super().__init__(Profile.load("llama-3.1-8b@h100"), Granularity("budget", budget_s=2e-3))
        self.shape = ModelShape(1e6, 1.0, 1e-9, 1e-9, 1e-9)
        self.rates: MachineRates = MachineRates(1e9, 1e12, 1e12, 1e-9)

    def make_run(self, batch: Batch) -> WorkerRun:
        rows = sum(len(sequence.tokens) for sequence in batch.sequences)
        bounds = [(row + 1) / rows for row in range(rows)]
        return WorkerRun(batch.run_id, rows * 1e-3, lambda: bounds, len(batch.sequences))


class GateWorld:
    """A core on a virtual worker; each prompt has tokens of its own."""

    def __init__(self, limits: AdmissionLimits | None = None, policy: str = "slack_edf") -> None:
        self.worker = SteadyWorker()
        sizes = self.worker.limits
        pool = BlockPool(sizes.num_blocks, sizes.block_tokens, True)
        cost_model = CostModel(self.worker.shape, self.worker.rates, is_calibrated=True)
        scheduler = Scheduler(policy, cost_model, SchedulerSettings())
        self.core = EngineCore(scheduler, self.worker, pool, limits or AdmissionLimits())
        self.live: list[LiveRequest] = []
        self._numbers = itertools.count()

    def submit(
        self,
        tokens: int,
        slo: SLO | None = None,
        service: ServiceClass = REJECT,
        *,
        max_tokens: int = 1,
        tenant: str = "",
        first: int | None = None,
    ) -> LiveRequest:
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        ids = [next(self._numbers) if first is None else first, *[1] * (tokens - 1)]
        request = Request(ids, params, tenant=tenant)
        decoder: Any = Letters()
        live = LiveRequest(
            request=request,
            slo=slo or SLO(),
            handle=Handle(request.id, tokens, lambda: self.core.cancel(live)),
            make_token_side=lambda: TokenSide(
                Sampler(params, 10, [1], 0), StopChecker(params), decoder
            ),
            arrival_s=self.worker.now,
            ids=ids,
            num_prompt=tokens,
            service=service,
        )
        self.core.submit(live)
        self.live.append(live)
        return live

    def play(self, until_s: float = math.inf) -> None:
        """Step until the time has come or every request has ended."""
        self.worker.halt_s = until_s
        while self.worker.now < until_s and any(self.core.counts()):
            self.core.step()
        if until_s < math.inf:
            self.worker.now = until_s

    def ttft_s(self, live: LiveRequest) -> float:
        return live.token_times_s[0] - live.arrival_s


def test_who_would_be_late_is_refused_with_the_predicted_wait() -> None:
    world = GateWorld()
    world.submit(500, SLO(ttft=0.6))
    with pytest.raises(Overloaded, match=r"predicted in 1\.500 s, due in 1\.400 s") as caught:
        world.submit(1000, SLO(ttft=1.4))
    assert caught.value.retry_after_s == pytest.approx(0.5, rel=0.01)
    world.submit(800, SLO(ttft=1.4))
    world.play()
    assert all(one.handle.result(0).timings.slo_met for one in world.live)


def test_who_would_make_an_admitted_one_late_is_refused() -> None:
    world = GateWorld()
    world.submit(2000, SLO(ttft=2.1))
    with pytest.raises(Overloaded, match="1 admitted requests would miss"):
        world.submit(500, SLO(ttft=1.0))
    world.submit(50, SLO(ttft=1.0))


def test_who_would_be_late_on_an_idle_device_is_told_that_it_is_no_use() -> None:
    world = GateWorld()
    with pytest.raises(Overloaded, match="the prefill alone takes 1") as caught:
        world.submit(1000, SLO(ttft=0.5))
    assert caught.value.retry_after_s == math.inf


def test_demoted_request_waits_for_those_that_keep_their_objective() -> None:
    world = GateWorld()
    kept = world.submit(2000, SLO(ttft=2.2))
    demoted = world.submit(1000, SLO(ttft=2.9), DEMOTE)
    assert demoted.job().ttft_deadline_s == math.inf
    later = world.submit(100, SLO(ttft=2.9), DEMOTE)
    assert not later.is_demoted
    world.play()
    assert kept.handle.result(0).timings.slo_met
    assert later.handle.result(0).timings.slo_met
    assert demoted.handle.result(0).timings.slo_met is False
    assert demoted.token_times_s[0] > later.token_times_s[0]


def test_mode_off_admits_and_best_effort_is_never_late() -> None:
    world = GateWorld()
    world.submit(2000, SLO(ttft=2.1))
    assert not world.submit(2000, SLO(ttft=2.1), ServiceClass(SLO())).is_demoted
    world.submit(2000, SLO(), REJECT)


def test_cached_prefix_counts_in_the_outlook() -> None:
    world = GateWorld()
    world.submit(1000, SLO(), first=5)
    world.play()
    world.submit(1000, SLO(ttft=0.3), first=5)
    with pytest.raises(Overloaded):
        world.submit(1000, SLO(ttft=0.3), first=6)


def test_backlog_counts_all_that_waits_and_empties_as_predicted() -> None:
    world = GateWorld(AdmissionLimits(max_backlog_s=4.9))
    start_s = world.worker.now
    for _ in range(5):
        world.submit(1000)
    with pytest.raises(Overloaded, match=r"s of work are waiting, at most 4\.9 s") as caught:
        world.submit(1000)
    assert caught.value.retry_after_s == pytest.approx(5.0, rel=0.01)
    with pytest.raises(Overloaded):
        world.core.check_load("")
    world.play()
    assert max(one.token_times_s[0] for one in world.live) - start_s == pytest.approx(5.0, rel=0.01)
    world.core.check_load("")


def test_tenant_over_its_share_is_refused_and_others_are_not() -> None:
    world = GateWorld(AdmissionLimits(max_backlog_s=10.0, tenant_share=0.39))
    for _ in range(4):
        world.submit(1000, tenant="greedy")
    with pytest.raises(Overloaded, match="of tenant 'greedy' 4"):
        world.submit(1000, tenant="greedy")
    world.submit(1000, tenant="modest")
    world.submit(1000)
    world.play()
    world.submit(1000, tenant="greedy")


@pytest.mark.parametrize("output_tokens", [1, 4])
@pytest.mark.parametrize("has_classes", [True, False])
def test_ten_times_the_load_leaves_promises_kept_and_refusals_honest(
    has_classes: bool, output_tokens: int
) -> None:
    """Poisson arrivals at ten times what the device can do; all equal, or half with objectives."""

    def lengths(rng: random.Random) -> int:
        return rng.randrange(150, 350) if has_classes else 250

    rng = random.Random(7)
    world = GateWorld(AdmissionLimits(max_backlog_s=5.0))
    refused: list[tuple[float, float, int]] = []  # when, Retry-After, requests admitted by then
    now = world.worker.now
    end_s = now + 40.0
    while (now := now + rng.expovariate(40.0)) < end_s:
        world.play(now)
        slo = SLO()
        if has_classes and rng.random() < 0.5:
            slo = SLO(ttft=rng.choice((1.0, 4.0, 12.0)))
        try:
            world.submit(lengths(rng), slo, max_tokens=output_tokens)
        except Overloaded as error:
            if error.retry_after_s < math.inf:
                refused.append((now, error.retry_after_s, len(world.live)))
    world.play()
    assert len(refused) > 1000
    for one in world.live:
        assert one.handle.predicted_ttft is not None
        limit_s = 1.5 * one.handle.predicted_ttft
        if has_classes:  # who comes later with an earlier deadline passes, up to the objective
            limit_s = max(limit_s, one.slo.ttft or math.inf)
        assert world.ttft_s(one) <= limit_s
    assert_retries_are_honest(world, refused)


def assert_retries_are_honest(world: GateWorld, refused: list[tuple[float, float, int]]) -> None:
    """Nine of ten within a factor of 2 of when so many first tokens were made as were awaited."""
    firsts = sorted(one.token_times_s[0] for one in world.live)
    ratios = sorted(retry_s / (firsts[count - 1] - at) for at, retry_s, count in refused)
    assert ratios[len(ratios) // 20] >= 0.5
    assert ratios[-len(ratios) // 20] <= 2.0
