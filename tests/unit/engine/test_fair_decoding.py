"""Who decodes where more want to than fit, in virtual time: a row of a step takes a millisecond."""

from __future__ import annotations

import pytest
from test_gate import GateWorld

from flowprefill.config import ServiceClass
from flowprefill.engine.live_request import LiveRequest
from flowprefill.request import SLO

PLAIN, BACKGROUND = ServiceClass(SLO()), ServiceClass(SLO(), is_background=True)
MANY, MOST = 150, 64  # streams, and rows of a step
FOR_S = 2.0


class Crowd(GateWorld):
    """A core at which many streams decode that never end."""

    def __init__(self, tpot: float | None = None) -> None:
        super().__init__()
        self.crowd = [self.talker(tpot, "crowd") for _ in range(MANY)]
        while not all(live.tokens for live in self.crowd):
            self.play(self.worker.now + 0.1)

    def talker(
        self, tpot: float | None = None, client: str = "", service: ServiceClass = PLAIN
    ) -> LiveRequest:
        return self.submit(1, SLO(tpot=tpot), service, max_tokens=20_000, tenant=client)

    def paces(self, *some: LiveRequest) -> tuple[list[float], float]:
        """Tokens per second that each of these gets in the next seconds, and that all others do."""
        others = [live for live in self.live if live not in some]
        before = [len(live.tokens) for live in some]
        before_others = sum(len(live.tokens) for live in others)
        self.play(self.worker.now + FOR_S)
        gained = [len(live.tokens) - count for live, count in zip(some, before, strict=True)]
        gained_others = sum(len(live.tokens) for live in others) - before_others
        return [count / FOR_S for count in gained], gained_others / FOR_S


def test_all_of_one_client_without_objectives_take_turns() -> None:
    world = Crowd()
    (own,), others = world.paces(world.talker(client="crowd"))
    assert own == pytest.approx(1000 / MANY, abs=1.0)
    assert others == pytest.approx(1000, rel=0.05)


def test_objective_is_met_beside_a_crowd_without_one_which_gets_the_rest() -> None:
    world = Crowd()
    (own,), others = world.paces(world.talker(0.02, "crowd"))
    assert own >= 1 / 0.02
    assert own + others == pytest.approx(1000, rel=0.05)
    gained, _ = world.paces(*world.crowd)
    assert (max(gained) - min(gained)) * FOR_S <= 2


def test_objective_that_cannot_be_met_makes_no_step_narrower() -> None:
    world = Crowd()
    seen = len(world.core.decisions)
    (own,), _ = world.paces(world.talker(1e-4, "crowd"))
    assert own <= 1000 / MOST * 1.1
    steps = [d["requests"] for d in list(world.core.decisions)[seen:] if d["kind"] == "decode"]
    assert all(len(step) == MOST for step in steps)


def test_client_with_one_stream_gets_half_its_pace_beside_another_with_hundreds() -> None:
    world = Crowd()
    (own,), others = world.paces(world.talker(client="one"))
    assert own >= 0.5 * 1000 * 0.95
    assert others >= 0.5 * 1000 * 0.9


def test_each_of_three_clients_gets_a_third() -> None:
    world = Crowd()
    first, second = world.talker(client="one"), world.talker(client="two")
    (one, two), others = world.paces(first, second)
    assert min(one, two) >= 1000 / 3 * 0.95
    assert others >= 1000 / 3 * 0.9


def test_objective_of_one_client_is_met_beside_hundreds_of_another() -> None:
    world = Crowd(tpot=0.07)
    (own,), others = world.paces(world.talker(0.07, "one"))
    assert own >= 1 / 0.07
    assert others >= 1000 * 0.9


def test_one_without_an_objective_is_not_starved_by_objectives() -> None:
    world = Crowd(tpot=0.07)
    (own,), others = world.paces(world.talker(client="crowd"))
    assert own >= 1 / (0.5 + 2 * MOST * 1e-3)
    assert others >= 1000 * 0.9


def test_background_takes_no_row_that_another_waits_for() -> None:
    world = Crowd()
    behind = world.talker(client="one", service=BACKGROUND)
    (own,), others = world.paces(behind)
    assert own <= 1 / FOR_S, "its first token, of the prefill"
    assert others == pytest.approx(1000, rel=0.05)
