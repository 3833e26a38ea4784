"""Held requests in the core, in virtual time: they take no step, no memory and no blame."""

from __future__ import annotations

import pytest
from test_gate import GateWorld

from flowprefill.config import ServiceClass
from flowprefill.engine.live_request import LiveRequest
from flowprefill.request import SLO

PLAIN = ServiceClass(SLO())


def talker(world: GateWorld, tokens: int = 10, max_tokens: int = 1000) -> LiveRequest:
    return world.submit(tokens, SLO(tpot=0.05), PLAIN, max_tokens=max_tokens)


def play_for(world: GateWorld, seconds: float) -> None:
    world.play(world.worker.now + seconds)


def hold(world: GateWorld, live: LiveRequest, *, is_held: bool = True) -> None:
    world.core.hold(live, is_held=is_held)


def steps_since(world: GateWorld, seen: int) -> list[list[str]]:
    """Whom each decode step was for that began since so many decisions."""
    decisions = list(world.core.decisions)[seen:]
    return [one["requests"] for one in decisions if one["kind"] == "decode"]


def test_held_one_gets_no_tokens_and_others_have_the_steps_to_themselves() -> None:
    world = GateWorld()
    stalled, other = talker(world), talker(world)
    play_for(world, 0.1)
    hold(world, stalled)
    play_for(world, 0.01)  # the step that had begun
    tokens, seen = len(stalled.tokens), len(world.core.decisions)
    play_for(world, 0.5)
    assert len(stalled.tokens) == tokens
    steps = steps_since(world, seen)
    assert len(steps) > 50
    assert all(step == [other.id] for step in steps)
    assert world.core.counts() == (1, 0, 0, 1)
    assert world.core.story(stalled.id)["state"] == "held"  # type: ignore[index]
    world.core.cancel(other)
    play_for(world, 5.0)
    assert world.core.counts() == (0, 0, 0, 1)
    hold(world, stalled, is_held=False)
    play_for(world, 0.1)
    assert len(stalled.tokens) > tokens + 50
    assert world.core.counts() == (1, 0, 0, 0)


def test_time_held_counts_against_no_objective() -> None:
    world = GateWorld()
    stalled = talker(world, max_tokens=20)
    play_for(world, 0.015)
    hold(world, stalled)
    play_for(world, 60.0)
    hold(world, stalled, is_held=False)
    world.play()
    timings = stalled.handle.timings
    assert timings is not None
    assert timings.mean_itl == pytest.approx(0.001, abs=5e-4)
    assert timings.slo_met
    assert timings.total > 59.0


def test_one_held_before_its_first_token_is_prefilled_and_then_held() -> None:
    world = GateWorld()
    stalled = talker(world, 500)
    hold(world, stalled)
    assert world.core.counts() == (1, 0, 0, 0)
    play_for(world, 2.0)
    assert 1 <= len(stalled.tokens) <= 2, "a step may begin with the prefill's end"
    assert world.core.counts() == (0, 0, 0, 1)
    assert world.ttft_s(stalled) == pytest.approx(0.5, abs=0.01)


def test_admission_counts_held_ones_as_nothing() -> None:
    world = GateWorld()
    for _ in range(20):
        hold(world, talker(world))
    play_for(world, 1.0)
    assert world.core.counts()[3] == 20
    quick = world.request(900, SLO(ttft=1.0))
    assert world.would_admit(quick) == 0.0


def test_cancelled_while_held_frees_its_blocks() -> None:
    world = GateWorld()
    stalled = talker(world)
    play_for(world, 0.1)
    hold(world, stalled)
    play_for(world, 0.2)
    assert world.pool.stats.used > 0
    world.core.cancel(stalled)
    assert stalled.is_ended
    assert world.pool.stats.used == 0
    hold(world, stalled, is_held=False)  # too late, and does nothing
    assert world.core.counts() == (0, 0, 0, 0)


def test_blocks_of_held_ones_go_to_who_waits_and_are_filled_again() -> None:
    world = GateWorld(num_blocks=8)
    size = world.pool.block_tokens
    stalled = talker(world, 5 * size, 40)
    play_for(world, 5 * size * 1e-3 + 0.02)
    assert stalled.tokens
    hold(world, stalled)
    other = talker(world, 5 * size, 3)
    play_for(world, 20 * size * 1e-3)
    assert other.is_ended
    assert stalled.reservation is None
    assert world.core.counts() == (0, 0, 0, 1)
    hold(world, stalled, is_held=False)
    world.play()
    assert len(stalled.handle.result(0).tokens) == 40
    world.pool.check()
    assert world.pool.stats.used == 0


def test_blocks_of_held_ones_stay_where_all_of_them_would_not_do() -> None:
    world = GateWorld(num_blocks=10)
    size = world.pool.block_tokens
    stalled = talker(world, 2 * size, 40)
    play_for(world, 2 * size * 1e-3 + 0.02)
    hold(world, stalled)
    talker(world, 4 * size, 40)  # lives on
    play_for(world, 0.02)
    large = talker(world, 7 * size, 3)
    play_for(world, 0.2)
    assert not large.tokens
    assert stalled.reservation is not None
    assert world.core.counts()[3] == 1


def test_one_that_lost_its_blocks_ends_when_cancelled() -> None:
    world = GateWorld(num_blocks=8)
    size = world.pool.block_tokens
    stalled = talker(world, 5 * size, 400)
    play_for(world, 5 * size * 1e-3 + 0.02)
    hold(world, stalled)
    play_for(world, 0.01)
    talker(world, 5 * size, 3)
    play_for(world, 20 * size * 1e-3)
    assert stalled.reservation is None
    world.core.cancel(stalled)
    assert stalled.is_ended
    assert world.core.counts() == (0, 0, 0, 0)
