"""The core's gate in virtual time: who is admitted keeps what was predicted, others are told."""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
from engines import live_request

from flowprefill import Engine
from flowprefill.config import Granularity, ServiceClass
from flowprefill.engine.core import EngineCore
from flowprefill.engine.gate import backlog_limit
from flowprefill.engine.kv_blocks import BlockPool
from flowprefill.engine.live_request import LiveRequest
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


class SteadyWorker(VirtualWorker):
    """A millisecond for each new token of a batch, a boundary after each.

    Attributes:
        least_s: what a batch takes at least, to read the weights.
    """

    def __init__(self, least_s: float = 0.0) -> None:
        super().__init__(Profile.load("llama-3.1-8b@h100"), Granularity("budget", budget_s=2e-3))
        self.shape = ModelShape(1e6, max(1e12 * least_s, 1.0), 1e-9, 1e-9, 1e-9)
        self.rates: MachineRates = MachineRates(1e9, 1e12, 1e12, 1e-9)
        self.least_s = least_s
        self.slowdown = 1.0

    def make_run(self, batch: Batch) -> WorkerRun:
        rows = sum(len(sequence.tokens) for sequence in batch.sequences)
        bounds = [(row + 1) / rows for row in range(rows)]
        seconds = max(rows * 1e-3, self.least_s) * self.slowdown
        return WorkerRun(batch.run_id, seconds, lambda: bounds, len(batch.sequences))


class GateWorld:
    """A core on a virtual worker; each prompt has tokens of its own."""

    def __init__(
        self,
        limits: AdmissionLimits | None = None,
        policy: str = "slack_edf",
        num_blocks: int = 0,
        least_s: float = 0.0,
    ) -> None:
        self.worker = SteadyWorker(least_s)
        sizes = self.worker.limits
        self.pool = BlockPool(num_blocks or sizes.num_blocks, sizes.block_tokens, True)
        cost_model = CostModel(self.worker.shape, self.worker.rates, is_calibrated=True)
        scheduler = Scheduler(policy, cost_model, SchedulerSettings())
        self.core = EngineCore(scheduler, self.worker, self.pool, limits or AdmissionLimits())
        self.live: list[LiveRequest] = []
        self._numbers = itertools.count()

    def submit(self, *asked: Any, **more: Any) -> LiveRequest:
        live = self.request(*asked, **more)
        self.core.submit(live)
        self.live.append(live)
        return live

    def request(
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
        return live_request(self.core, self.worker.now, request, slo or SLO(), service=service)

    def would_admit(self, live: LiveRequest) -> float:
        """Return 0 if it would be admitted now, else how long to wait by the refusal."""
        try:
            self.core._gate.check(self.worker.now, "", live)
        except Overloaded as error:
            return error.retry_after_s
        return 0.0

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
    with pytest.raises(Overloaded, match=r"predicted in 1\.500 s, due in 1\.400 s, of") as caught:
        world.submit(1000, SLO(ttft=1.4))
    assert caught.value.retry_after_s == pytest.approx(0.1, abs=0.01)
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


def test_one_that_wants_to_be_dropped_is_not_demoted() -> None:
    world = GateWorld()
    world.submit(2000, SLO(ttft=2.2))
    dropped = world.submit(1000, SLO(ttft=2.9, on_miss="drop"), DEMOTE)
    assert (dropped.is_demoted, dropped.is_promised) == (False, False)
    assert dropped.job().ttft_deadline_s < math.inf
    world.play()
    assert not dropped.token_times_s


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
    assert caught.value.retry_after_s == pytest.approx(0.1, rel=0.1)
    with pytest.raises(Overloaded):
        world.core.check_load("")
    world.play()
    assert max(one.token_times_s[0] for one in world.live) - start_s == pytest.approx(5.0, rel=0.01)
    world.core.check_load("")


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (AdmissionLimits(max_waiting=3), "3 requests are waiting"),
        (AdmissionLimits(max_waiting_tokens=2500), "1920 prompt tokens are waiting; with 640 more"),
        (AdmissionLimits(max_backlog_s=2.5), r"2\.6 s of work are waiting"),
    ],
)
def test_bounds_count_what_waits_for_memory(limits: AdmissionLimits, message: str) -> None:
    world = GateWorld(limits, num_blocks=15)  # of 64 tokens: no two fit
    for _ in range(4):
        world.submit(640)
    assert len(world.core._memory) == 3
    with pytest.raises(Overloaded, match=message):
        world.submit(640)


def test_predicted_wait_is_from_the_arrival_on() -> None:
    """Its prompt was tokenised meanwhile."""
    world = GateWorld()
    live = world.request(500)
    world.play(world.worker.now + 0.3)
    world.core.submit(live)
    world.play()
    assert live.handle.predicted_ttft == pytest.approx(0.8, rel=0.01)
    assert world.ttft_s(live) == pytest.approx(0.8, rel=0.01)


def test_backlog_has_no_bound_where_the_machine_was_not_measured_or_none_is_set() -> None:
    assert backlog_limit(30.0, is_calibrated=True) == 30.0
    assert backlog_limit(30.0, is_calibrated=False) == math.inf
    assert backlog_limit(0.0, is_calibrated=True) == math.inf


def test_backlog_gets_smaller_while_a_prefill_runs_and_no_event_comes() -> None:
    world = GateWorld(AdmissionLimits(max_backlog_s=3.0))
    start_s = world.worker.now
    world.submit(4000)
    with pytest.raises(Overloaded) as caught:
        world.core.check_load("")
    assert caught.value.retry_after_s == pytest.approx(1.0, rel=1e-3)
    world.play(start_s + 0.5)
    with pytest.raises(Overloaded) as caught:
        world.core.check_load("")
    assert caught.value.retry_after_s == pytest.approx(0.5, rel=1e-3)
    world.play(start_s + 1.5)
    assert world.core._gate._queued(world.worker.now).backlog_s == pytest.approx(2.5, rel=1e-3)
    world.core.check_load("")


@pytest.mark.parametrize("decoding", [0, 2, 16, 60])
@pytest.mark.parametrize("tpot", [None, 0.1])
def test_wait_behind_decode_steps_is_predicted_from_the_first_request_on(
    tpot: float | None, decoding: int
) -> None:
    """Sequences have decoded for seconds without a prefill, of which nothing could be measured."""
    service = ServiceClass(SLO())
    world = GateWorld()
    streams = [world.submit(10, SLO(tpot=tpot), service, max_tokens=10**5) for _ in range(decoding)]
    world.play(world.worker.now + 3.0)
    start_s = world.worker.now
    prompts = [world.submit(500, SLO(), service) for _ in range(8)]
    backlog_s = world.core._gate._queued(world.worker.now).backlog_s
    while not prompts[-1].token_times_s:
        world.play(world.worker.now + 0.5)
    for one in prompts:
        assert world.ttft_s(one) == pytest.approx(one.handle.predicted_ttft, rel=0.1)
    assert backlog_s == pytest.approx(prompts[-1].token_times_s[0] - start_s, rel=0.1)
    if decoding and tpot:
        assert backlog_s == pytest.approx(4.0 / (1 - decoding * 1e-3 / tpot), rel=0.1)
    for live in streams:
        live.handle.cancel()
    world.play()
    assert world.core._scheduler.decode_share() == 0.0


@pytest.mark.parametrize("decoding", [1, 2, 8, 16, 60])
@pytest.mark.parametrize("prompts", [1, 8, 40])
def test_wait_beside_steps_that_wait_for_others_is_predicted(prompts: int, decoding: int) -> None:
    """A step of one takes as long as one of 20: it is put off for prompts that will decode."""
    service = ServiceClass(SLO())
    world = GateWorld(least_s=0.02)
    for _ in range(decoding):
        world.submit(10, SLO(), service, max_tokens=10**5)
    world.play(world.worker.now + 3.0)
    start_s = world.worker.now
    several = [world.submit(500, SLO(), service, max_tokens=200) for _ in range(prompts)]
    backlog_s = world.core._gate._queued(world.worker.now).backlog_s
    while not several[-1].token_times_s:
        world.play(world.worker.now + 0.5)
    for one in several:  # sooner where others came after it, that its steps wait for
        assert one.handle.predicted_ttft is not None
        assert 0.8 < world.ttft_s(one) / one.handle.predicted_ttft < 1.05
    took_s = several[-1].token_times_s[0] - start_s
    assert backlog_s == pytest.approx(took_s, rel=0.1)
    if (prompts, decoding) == (8, 1):
        assert took_s < 4.0 * 1.2, "a quarter of the time for steps would make it 1.33"


def test_request_of_one_token_or_none_is_not_waited_for_by_decode_steps() -> None:
    world = GateWorld()
    decodes = [world.request(10, max_tokens=most).job().decodes for most in (0, 1, 2)]
    assert decodes == [False, False, True]


def test_held_sequences_take_no_share_of_the_predicted_wait() -> None:
    world = GateWorld()
    streams = [
        world.submit(10, SLO(tpot=0.1), ServiceClass(SLO()), max_tokens=10**5) for _ in range(40)
    ]
    world.play(world.worker.now + 1.0)
    assert world.core._scheduler.decode_share() == pytest.approx(0.4, rel=0.1)
    for live in streams:
        world.core.hold(live, is_held=True)
    assert world.core._scheduler.decode_share() == 0.0
    for live in streams[:20]:
        world.core.hold(live, is_held=False)
    for live in streams[20:]:
        live.handle.cancel()
    world.play(world.worker.now + 1.0)
    assert world.core._scheduler.decode_share() == pytest.approx(0.2, rel=0.1)


def test_shares_of_a_configured_class_and_of_late_ones_reach_the_scheduler(
    open_engine: Callable[..., Engine],
) -> None:
    classes = {"chat": {"ttft_ms": 250, "share": 0.3}, "plain": {}}
    engine = open_engine(classes=classes, late_share=0.2)
    for _ in range(2):
        settings = engine._core._scheduler.settings
        assert (settings.class_shares, settings.late_share) == ({"chat": 0.3}, 0.2)
        engine.set_policy("slack_edf", 64)


def test_wait_behind_the_own_tenants_backlog_is_predicted() -> None:
    world = GateWorld()
    first = [world.submit(100, tenant="one") for _ in range(30)]
    others = [world.submit(100, tenant="two") for _ in range(10)]
    world.play()
    for live in others:
        assert world.ttft_s(live) == pytest.approx(live.handle.predicted_ttft, abs=0.11)
    for live in first:  # the other tenant's come before most of these, later
        assert live.handle.predicted_ttft is not None
        wait_s = world.ttft_s(live)
        assert wait_s - 1.01 <= live.handle.predicted_ttft <= wait_s + 0.01


def test_wait_for_memory_is_predicted() -> None:
    world = GateWorld(num_blocks=64)
    tokens = 40 * world.pool.block_tokens  # no two fit
    several = [world.submit(tokens) for _ in range(6)]
    world.play()
    for live in several:
        assert world.ttft_s(live) == pytest.approx(live.handle.predicted_ttft, rel=0.01)


def test_wait_for_memory_of_a_running_prefill_that_would_be_suspended_is_predicted() -> None:
    world = GateWorld(num_blocks=64)
    long, urgent = 40 * world.pool.block_tokens, 30 * world.pool.block_tokens
    world.submit(long)
    live = world.submit(urgent, SLO(ttft=2.5), ServiceClass(SLO()))  # it would go first
    world.play()
    assert world.ttft_s(live) == pytest.approx(live.handle.predicted_ttft, rel=0.01)


def test_newcomer_before_a_decode_step_makes_no_first_token_late() -> None:
    world = GateWorld(least_s=0.2)
    talker = world.submit(10, SLO(ttft=5.0), max_tokens=50)
    world.play(world.worker.now + 0.45)
    assert talker.tokens
    running = world.core._scheduler.current
    assert running is not None
    assert running.is_decode
    urgent = world.submit(10, SLO(ttft=0.35))
    world.play(world.worker.now + 1.0)
    assert world.ttft_s(urgent) <= 0.35


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


def test_what_of_a_tenant_runs_or_is_suspended_waits_no_longer() -> None:
    """The bounds on all count what has begun by the time that is left; so do a tenant's."""
    world = GateWorld(AdmissionLimits(max_backlog_s=6.0, tenant_share=0.5))
    start_s = world.worker.now
    world.submit(4000, tenant="one")
    with pytest.raises(Overloaded, match="of tenant 'one' 4") as caught:
        world.core.check_load("one")
    assert caught.value.retry_after_s == pytest.approx(1.0, rel=1e-3)
    world.play(start_s + 1.1)
    world.core.check_load("one")
    world.submit(10, SLO(ttft=0.5), tenant="two")  # suspends it
    world.core.check_load("two")
    world.submit(500, tenant="one")
    queued = world.core._gate._queued_of("one", world.worker.now)
    assert (queued.jobs, queued.tokens) == (1, 500)
    assert queued.backlog_s == pytest.approx(2.9 + 0.5, rel=1e-3)
    world.play()
    assert world.core._gate._tenants._queued == {}


@pytest.mark.parametrize("output_tokens", [1, 4])
@pytest.mark.parametrize("has_classes", [True, False])
def test_ten_times_the_load_leaves_promises_kept(has_classes: bool, output_tokens: int) -> None:
    """Poisson arrivals at ten times what the device can do; all equal, or half with objectives."""

    def lengths(rng: random.Random) -> int:
        return rng.randrange(150, 350) if has_classes else 250

    rng = random.Random(7)
    world = GateWorld(AdmissionLimits(max_backlog_s=5.0))
    refused = 0
    now = world.worker.now
    end_s = now + 40.0
    while (now := now + rng.expovariate(40.0)) < end_s:
        world.play(now)
        slo = SLO()
        if has_classes and rng.random() < 0.5:
            slo = SLO(ttft=rng.choice((1.0, 4.0, 12.0)))
        try:
            world.submit(lengths(rng), slo, max_tokens=output_tokens)
        except Overloaded:
            refused += 1
    world.play()
    assert refused > 1000
    for one in world.live:
        assert one.handle.predicted_ttft is not None
        limit_s = 1.5 * one.handle.predicted_ttft
        if has_classes:  # who comes later with an earlier deadline passes, up to the objective
            limit_s = max(limit_s, one.slo.ttft or math.inf)
        assert world.ttft_s(one) <= limit_s


class Overload:
    """Random worlds with several times the load that the device can do, all of it with objectives.

    Objectives of one, or of three lengths; prompts alike, or short and long; one token, or some.
    """

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.objectives = rng.choice([(2.0,), (0.5,), (1.0, 2.0, 4.0)])
        self.lengths = rng.choice([(100, 101), (40, 200)])
        self.output_tokens = rng.choice([1, 4, 32])
        self.times = rng.choice([2.0, 10.0])
        self.world = GateWorld(policy="slack_edf")

    def kind(self) -> tuple[int, SLO]:
        return self.rng.randrange(*self.lengths), SLO(ttft=self.rng.choice(self.objectives))

    def play(self, seconds: float) -> None:
        """Let so much time pass, with arrivals."""
        world, rate = self.world, self.times * 1000 / sum(self.lengths) * 2
        now = world.worker.now
        end_s = now + seconds
        while (now := now + self.rng.expovariate(rate)) < end_s:
            world.play(now)
            tokens, slo = self.kind()
            with contextlib.suppress(Overloaded):
                world.submit(tokens, slo, max_tokens=self.output_tokens)


@pytest.mark.parametrize("seed", range(12))
def test_admitted_requests_meet_their_objectives_however_many_come(seed: int) -> None:
    overload = Overload(seed)
    overload.play(10.0)
    world = overload.world
    world.play()
    assert len(world.live) > 40
    met = 0
    for one in world.live:
        ttft_s, predicted_s = world.ttft_s(one), one.handle.predicted_ttft
        assert predicted_s is not None
        assert one.slo.ttft is not None
        met += ttft_s <= one.slo.ttft
        if len(overload.objectives) == 1:  # else sooner deadlines pass, up to the objective
            assert ttft_s <= 1.5 * predicted_s + 0.1
        assert ttft_s <= 1.5 * one.slo.ttft
    assert met >= 0.99 * len(world.live)


def test_device_slower_than_predicted_makes_no_admitted_request_wait_for_later_ones() -> None:
    """Twice as slow for a while: who has become late is not passed by all that come after."""
    overload = Overload(0)
    overload.objectives, overload.lengths, overload.times = (2.0,), (100, 101), 10.0
    overload.play(6.0)
    overload.world.worker.slowdown = 2.0
    overload.play(4.0)
    overload.world.worker.slowdown = 1.0
    overload.play(6.0)
    overload.world.play()
    ttfts = [overload.world.ttft_s(one) for one in overload.world.live]
    assert max(ttfts) > 2.5
    assert max(ttfts) < 2 * 2.0 * 1.25, "twice as slow, and once put off"


def test_retry_after_is_when_one_like_it_is_admitted() -> None:
    """Kinds of requests are asked about, then nothing comes any more, and they are asked again."""
    ratios = []
    for seed in range(12):
        overload = Overload(seed)
        overload.play(4.0)
        world, tokens_out = overload.world, overload.output_tokens
        since_s = world.worker.now
        waiting: dict[tuple[int, float], float] = {}
        for _ in range(8):
            tokens, slo = overload.kind()
            wait_s = world.would_admit(world.request(tokens, slo, max_tokens=tokens_out))
            if 0.02 < wait_s < math.inf:
                waiting[tokens, slo.ttft or 0.0] = wait_s
        while waiting:
            world.play(world.worker.now + 5e-3)
            for tokens, ttft_s in tuple(waiting):
                probe = world.request(tokens, SLO(ttft=ttft_s), max_tokens=tokens_out)
                if not world.would_admit(probe):
                    predicted_s = waiting.pop((tokens, ttft_s))
                    ratios.append(predicted_s / (world.worker.now - since_s))
    assert len(ratios) > 30
    assert sum(0.5 <= ratio <= 2.0 for ratio in ratios) >= 0.9 * len(ratios), sorted(ratios)
