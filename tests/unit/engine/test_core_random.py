"""The core in virtual time with too little memory: clients cancel, stop reading and read on at any
moment, others are refused or dropped, the device is slower or faster than predicted. Every request
ends once, with all blocks free, and what is told of it is what happened."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_witness import Witness
from test_gate import GateWorld

from flowprefill.config import ServiceClass
from flowprefill.engine.live_request import LiveRequest
from flowprefill.engine.records import RequestRecord
from flowprefill.errors import Overloaded
from flowprefill.request import SLO
from flowprefill.scheduling.admission import AdmissionLimits

EVENTS = 400
PLAIN = ServiceClass(SLO())
OBJECTIVES = (SLO(), SLO(ttft=0.3), SLO(ttft=2.0, tpot=0.05))
# With the class of each: admission and the rest are its own.
ASKED = (
    *((slo, PLAIN) for slo in OBJECTIVES),
    (SLO(ttft=0.5, on_miss="drop"), PLAIN),
    (SLO(ttft=1.0), ServiceClass(SLO(), admission="reject")),
    (SLO(ttft=1.0, on_miss="drop"), ServiceClass(SLO(), admission="demote", weight=5.0)),
    (SLO(service_class="bulk"), ServiceClass(SLO(), is_background=True)),
)


def submitted(world: GateWorld, rng: random.Random) -> LiveRequest:
    return world.submit(
        rng.choice((5, 100, 600)), rng.choice(OBJECTIVES), PLAIN,
        max_tokens=rng.choice((1, 5, 60)), tenant=rng.choice(("", "a")),
    )  # fmt: skip


class Told:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.records: dict[str, RequestRecord] = {}
        self.preemptions: Counter[str] = Counter()
        self.decisions = 0

    def on_end(self, record: RequestRecord) -> None:
        assert self.records.setdefault(record.request_id, record) is record, "it ended twice"

    def on_preemption(self, reason: str, ack_s: float) -> None:
        assert reason
        assert 0.0 <= ack_s < math.inf
        self.preemptions[reason] += 1

    def on_decision(self, seconds: float) -> None:
        self.decisions += 1


# The first four failed while a decision could take requests that had lost their blocks, the others
# while a request could be told to have come after it had lost them, or a step have none left.
@pytest.mark.parametrize("seed", [0, 1, 2, 3, 43, 138, 143, 207, 260, 313])
def test_core_goes_on_whatever_loses_its_blocks(seed: int) -> None:
    rng = random.Random(seed)
    world = GateWorld(num_blocks=rng.choice((20, 64)), least_s=0.005)
    free, now = world.pool.available, world.worker.now
    for _ in range(EVENTS):
        now += rng.expovariate(20.0)
        world.play(now)
        kind = rng.random()
        if kind < 0.45 or not world.live:
            submitted(world, rng)
        elif kind < 0.6:
            world.core.cancel(rng.choice(world.live))
        else:
            world.core.hold(rng.choice(world.live), is_held=kind < 0.8)
    finish(world)
    assert world.pool.available == free


def finish(world: GateWorld) -> None:
    for one in world.live:
        world.core.hold(one, is_held=False)
    world.play()
    assert [one.id for one in world.live if not one.is_ended] == []
    assert world.core.counts() == (0, 0, 0, 0)
    assert not world.core.has_failed


def happen(world: GateWorld, rng: random.Random, cancelled: set[str]) -> None:
    kind = rng.random()
    if kind < 0.6 or not world.live:
        slo, service = rng.choice(ASKED)
        asked = world.request(
            rng.choice((5, 100, 600)), slo, service,
            max_tokens=rng.choice((1, 5, 60)), tenant=rng.choice(("", "a", "b")),
        )  # fmt: skip
        try:
            world.core.submit(asked)
        except Overloaded as error:  # it is in no record then
            retry_after_s = error.retry_after_s
        else:
            world.live.append(asked)
            retry_after_s = 0.0
        assert min(retry_after_s, asked.handle.predicted_ttft or 0.0) >= 0.0
    elif kind < 0.7:
        one = rng.choice(world.live)
        cancelled.add(one.id)
        world.core.cancel(one)
    elif kind < 0.95:
        world.core.hold(rng.choice(world.live), is_held=kind < 0.8)
    else:
        world.worker.slowdown = rng.choice((1.0, 0.3, 4.0))


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32), events=st.integers(1, 80))
def test_core_says_of_each_request_what_happened_to_it(seed: int, events: int) -> None:
    rng = random.Random(seed)
    limits = AdmissionLimits(rng.choice((5, 10_000)), rng.choice((0, 2_000)), tenant_share=0.5)
    world = GateWorld(
        limits, rng.choice(("slack_edf", "slack_edf", "edf", "fcfs")),
        num_blocks=rng.choice((20, 64, 1_000)), least_s=rng.choice((0.0, 0.005)),
    )  # fmt: skip
    told, free = Told(), world.pool.available
    witness = Witness(world.core._scheduler)
    world.core.observers.append(told)
    cancelled: set[str] = set()
    now = world.worker.now
    for _ in range(events):
        now += rng.expovariate(rng.choice((5.0, 20.0, 200.0)))
        world.play(now)
        happen(world, rng, cancelled)
    finish(world)
    assert world.pool.available == free
    assert told.records.keys() == {one.id for one in world.live}
    assert told.decisions == witness.events
    assert told.preemptions.total() == world.worker.stats().preemptions
    for one in world.live:
        check(one, told.records[one.id], one.id in cancelled)
        story = world.core.story(one.id)
        assert story is not None
        assert story["finish_reason"] == told.records[one.id].finish_reason
        if one.error is None and not story["events_left_out"]:
            told_of = sum(event["what"] == "suspended" for event in story["events"])
            assert told_of >= story["preemptions"]


def check(one: LiveRequest, record: RequestRecord, is_cancelled: bool) -> None:
    """Compare what is said of a request that has ended with what it asked for."""
    timings, reason = record.timings, record.finish_reason
    if reason == "expired":
        assert one.slo.on_miss == "drop"
        assert one.slo.ttft is not None
        assert not one.tokens
        assert timings.total > 0.0
        assert timings.slo_met is False
    elif reason == "cancelled":
        assert is_cancelled
    else:
        assert reason == "length"
        assert len(one.tokens) == one.request.sampling.max_tokens
    assert record.output_tokens == len(one.tokens)
    first_s = timings.total if timings.ttft is None else timings.ttft
    assert min(timings.queue, timings.prefill_run, timings.suspended, timings.preprocess) >= 0.0
    assert timings.preprocess <= timings.queue + 1e-9
    assert timings.queue + timings.prefill_run + timings.suspended <= first_s + 1e-9
    assert (timings.suspended > 0.0) <= (timings.preemptions > 0)
    assert min(record.token_gaps_s, default=0.0) >= 0.0
