"""EngineCore on a VirtualWorker: the protocol is all it needs, and `simulate` says the same."""

from __future__ import annotations

import math
import random

import pytest
from engines import live_request

from flowprefill.config import Granularity
from flowprefill.engine.core import EngineCore
from flowprefill.engine.handle import Handle
from flowprefill.engine.kv_blocks import BlockPool
from flowprefill.errors import DeadlinePassed, RequestCancelled
from flowprefill.request import SLO, Request, SamplingParams
from flowprefill.scheduling.admission import AdmissionLimits
from flowprefill.simulation import Configuration, Profile, WorkCosts, simulate
from flowprefill.simulation.worker import TOKEN, VirtualWorker
from flowprefill.traces import TraceRequest

PROFILE = Profile.load("llama-3.1-8b@h100")
BUDGET = Granularity("budget", budget_s=2e-3)
COSTS = WorkCosts(PROFILE, BUDGET)


def prefill_s(tokens: int) -> float:
    return COSTS.prefill_s(tokens, tokens * (tokens + 1) / 2)


class World:
    """A core on a virtual worker, stepped by the test."""

    def __init__(self, policy: str = "slack_edf", granularity: Granularity = BUDGET) -> None:
        self.worker = VirtualWorker(PROFILE, granularity)
        limits = self.worker.limits
        self.pool = BlockPool(limits.num_blocks, limits.block_tokens, False)
        scheduler = Configuration(policy, granularity).scheduler(PROFILE)
        self.core = EngineCore(scheduler, self.worker, self.pool, AdmissionLimits())

    def submit(self, tokens: int, slo: SLO, max_tokens: int = 1) -> Handle:
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        request = Request([1] * tokens, params)
        live = live_request(self.core, self.worker.now, request, slo)
        self.core.submit(live)
        return live.handle

    def play(self, halt_s: float = math.inf, *handles: Handle) -> None:
        """Step until the time has come or the requests have ended."""
        self.worker.halt_s = halt_s
        while self.worker.now < halt_s and not (handles and all(h.done for h in handles)):
            self.core.step()


def test_core_urgent_request_overtakes_within_one_segment() -> None:
    world = World()
    start_s = world.worker.now
    long = world.submit(50_000, SLO(ttft=600.0))
    world.play(start_s + 0.5)
    short = world.submit(100, SLO(ttft=0.1), max_tokens=3)
    world.play(math.inf, long, short)
    done = short.result(0)
    assert done.token_ids == [TOKEN] * 3
    timings = done.timings
    assert timings.queue < 4e-3
    assert timings.ttft == pytest.approx(timings.queue + prefill_s(100))
    timings = long.result(0).timings
    assert timings.preemptions >= 1
    assert timings.prefill_run == pytest.approx(prefill_s(50_000))
    assert timings.suspended == pytest.approx(prefill_s(100), rel=2.0)
    assert timings.ttft == pytest.approx(timings.prefill_run + timings.suspended)
    assert world.pool.stats.used == 0
    assert world.worker.stats().preemptions >= 1


def test_core_cancel_of_a_running_request_is_told_by_poll() -> None:
    world = World()
    handle = world.submit(50_000, SLO())
    world.play(world.worker.now + 0.5)
    handle.cancel()
    assert not handle.done, "its blocks are the run's until the run's end is told"
    world.play(math.inf, handle)
    with pytest.raises(RequestCancelled):
        handle.result(0)
    assert world.pool.stats.used == 0


def test_core_timer_of_the_scheduler_is_kept_on_the_workers_clock() -> None:
    world = World("fcfs")
    start_s = world.worker.now
    own_s = prefill_s(30_000)
    running = world.submit(30_000, SLO(ttft=60.0))
    hopeless = world.submit(30_000, SLO(ttft=1.2 * own_s, on_miss="drop"))
    world.play(math.inf, hopeless)
    assert not running.done
    assert 0.0 < world.worker.now - start_s < 1.2 * own_s, "as soon as no prediction reaches it"
    with pytest.raises(DeadlinePassed):
        hopeless.result(0)
    world.play(math.inf, running)
    assert world.worker.now - start_s == pytest.approx(own_s)


def test_worker_with_nothing_to_do_refuses_to_wait_for_ever() -> None:
    with pytest.raises(RuntimeError, match="poll would never return"):
        VirtualWorker(PROFILE, BUDGET).poll(math.inf)


def mixed_trace(seed: int, most_output: int) -> list[TraceRequest]:
    """Return 60 requests that keep an H100 busy, short urgent ones among long ones."""
    rng = random.Random(seed)
    at_s, trace = 1.0, []
    for _ in range(60):
        at_s += rng.expovariate(12.0)
        tokens, ttft_s = rng.choice(((120, 0.1), (700, 0.25), (6_000, 2.0), (14_000, math.inf)))
        output = rng.randint(1, most_output)
        tpot_s = rng.choice((0.03, math.inf))
        trace.append(TraceRequest(at_s, tokens, output, "", ttft_s, tpot_s))
    return trace


@pytest.mark.parametrize("granularity", ["none", "operator", "chunk:512", "budget:2"])
@pytest.mark.parametrize("policy", ["slack_edf", "s_edf_paper", "fcfs"])
@pytest.mark.parametrize("most_output", [1, 30])
def test_core_and_simulate_give_the_same_first_tokens(
    policy: str, granularity: str, most_output: int
) -> None:
    trace = mixed_trace(3, most_output)
    cut = Granularity.parse(granularity)
    result = simulate(trace, Configuration(policy, cut), PROFILE, role="mixed")
    world = World(policy, cut)
    handles = []
    for request in trace:
        world.play(request.at_s)
        tpot = None if request.tpot_s == math.inf else request.tpot_s
        ttft = None if request.ttft_s == math.inf else request.ttft_s
        slo = SLO(ttft=ttft, tpot=tpot)
        handles.append(world.submit(request.prompt_tokens, slo, request.output_tokens))
    world.play(math.inf, *handles)
    timings = [handle.result(0).timings for handle in handles]
    assert [t.ttft for t in timings] == pytest.approx([o.ttft_s for o in result.outcomes])
    assert [t.mean_itl or 0.0 for t in timings] == pytest.approx(
        [o.mean_itl_s for o in result.outcomes]
    )
    assert [t.preemptions for t in timings] == [o.preemptions for o in result.outcomes]
    is_preemptive = policy != "fcfs" and granularity != "none"
    assert (result.preemptions > 0) == is_preemptive
