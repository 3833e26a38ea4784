"""The core in virtual time with too little memory: clients cancel, stop reading and read on at any
moment, and every request ends, with all blocks free."""

from __future__ import annotations

import random

import pytest
from test_gate import GateWorld

from flowprefill.config import ServiceClass
from flowprefill.engine.live_request import LiveRequest
from flowprefill.request import SLO

EVENTS = 400
OBJECTIVES = (SLO(), SLO(ttft=0.3), SLO(ttft=2.0, tpot=0.05))


def submitted(world: GateWorld, rng: random.Random) -> LiveRequest:
    return world.submit(
        rng.choice((5, 100, 600)), rng.choice(OBJECTIVES), ServiceClass(SLO()),
        max_tokens=rng.choice((1, 5, 60)), tenant=rng.choice(("", "a")),
    )  # fmt: skip


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
    for one in world.live:
        world.core.hold(one, is_held=False)
    world.play()
    assert [one.id for one in world.live if not one.is_ended] == []
    assert world.core.counts() == (0, 0, 0, 0)
    assert world.pool.available == free
    assert not world.core.has_failed
