"""EngineCore on a worker without device, thread or clock: the protocol is all that it needs."""

from __future__ import annotations

import math
from typing import Any

import pytest
from virtual_worker import TOKEN, TOKEN_S, VirtualWorker

from flowprefill.engine.core import EngineCore
from flowprefill.engine.handle import Handle
from flowprefill.engine.kv_blocks import BlockPool
from flowprefill.engine.live_request import LiveRequest, TokenSide
from flowprefill.engine.sampler import Sampler
from flowprefill.engine.stop import StopChecker
from flowprefill.errors import DeadlinePassed, RequestCancelled
from flowprefill.request import SLO, Request, SamplingParams
from flowprefill.scheduling import CostModel, Scheduler, SchedulerSettings
from flowprefill.scheduling.admission import AdmissionLimits


class Letters:
    """A decoder to which every token is one letter."""

    def push(self, token_id: int) -> str:
        return chr(ord("a") + token_id)

    def flush(self) -> str:
        return ""


class World:
    """A core on a virtual worker, stepped by the test."""

    def __init__(self, policy: str = "slack_edf") -> None:
        self.worker = VirtualWorker()
        limits = self.worker.limits
        self.pool = BlockPool(limits.num_blocks, limits.block_tokens, False)
        cost_model = CostModel(self.worker.shape, self.worker.rates, is_calibrated=True)
        scheduler = Scheduler(policy, cost_model, SchedulerSettings())
        self.core = EngineCore(scheduler, self.worker, self.pool, AdmissionLimits())

    def submit(self, tokens: int, slo: SLO, max_tokens: int = 1) -> Handle:
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        request = Request([1] * tokens, params)
        decoder: Any = Letters()
        handle = Handle(request.id, tokens, lambda: self.core.cancel(live))
        live = LiveRequest(
            request=request,
            slo=slo,
            handle=handle,
            make_token_side=lambda: TokenSide(
                Sampler(params, 10, [1], 0), StopChecker(params), decoder
            ),
            arrival_s=self.worker.now,
            ids=[1] * tokens,
            num_prompt=tokens,
        )
        self.core.submit(live)
        return handle

    def play(self, halt_s: float = math.inf, *handles: Handle) -> None:
        """Step until the time has come or the requests have ended."""
        self.worker.halt_s = halt_s
        while self.worker.now < halt_s and not (handles and all(h.done for h in handles)):
            self.core.step()


def test_core_urgent_request_overtakes_in_virtual_time_exactly() -> None:
    world = World()
    start_s = world.worker.now
    long = world.submit(50_000, SLO(ttft=600.0))
    world.play(start_s + 2.0)
    short = world.submit(100, SLO(ttft=1.0), max_tokens=3)
    world.play(math.inf, long, short)
    done = short.result(0)
    assert (done.text, done.token_ids) == ("hhh", [TOKEN] * 3)
    assert done.timings.ttft == pytest.approx(100 * TOKEN_S)
    timings = long.result(0).timings
    assert timings.preemptions >= 1
    assert timings.prefill_run == pytest.approx(50_000 * TOKEN_S)
    assert timings.suspended == pytest.approx(102 * TOKEN_S)
    assert timings.ttft == pytest.approx(50_102 * TOKEN_S)
    assert world.pool.stats.used == 0


def test_core_cancel_of_a_running_request_is_told_by_poll() -> None:
    world = World()
    handle = world.submit(50_000, SLO())
    world.play(world.worker.now + 1.0)
    handle.cancel()
    assert not handle.done, "its blocks are the run's until the run's end is told"
    world.play(math.inf, handle)
    with pytest.raises(RequestCancelled):
        handle.result(0)
    assert world.pool.stats.used == 0


def test_core_timer_of_the_scheduler_is_kept_on_the_workers_clock() -> None:
    world = World("fcfs")
    start_s = world.worker.now
    running = world.submit(10_000, SLO(ttft=60.0))
    hopeless = world.submit(10_000, SLO(ttft=12.0, on_miss="drop"))
    world.play(math.inf, hopeless)
    assert not running.done
    assert 0.0 < world.worker.now - start_s < 12.0, "as soon as no prediction reaches it"
    with pytest.raises(DeadlinePassed):
        hopeless.result(0)
    world.play(math.inf, running)
    assert world.worker.now - start_s == pytest.approx(10_000 * TOKEN_S)
