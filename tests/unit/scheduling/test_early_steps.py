"""How early decode steps go before prefills, by what they would gain from those that wait."""

from __future__ import annotations

from typing import Any

import pytest
from hand_made import arrive, make

from flowprefill.scheduling import (
    Cancelled,
    CostModel,
    Decision,
    Finished,
    Held,
    MachineRates,
    ModelShape,
    Scheduler,
    SchedulerSettings,
)
from flowprefill.scheduling.job import BACKGROUND


def after_step(scheduler: Scheduler, *waiting: dict[str, Any]) -> Decision:
    """Let a step of one end while these long prompts wait, by what is special about each."""
    arrive(scheduler, "talker", 0)
    step = scheduler.current
    assert step is not None
    for number, special in enumerate(waiting):
        arrive(scheduler, f"waiting-{number}", 50_000, **special)
    return scheduler.on_event(Finished(step.id), step.predicted_s)


def pause(scheduler: Scheduler, decision: Decision, since_s: float | None = None) -> float:
    """Return in how many steps' time the next one goes first; `since_s`: the last one's end."""
    assert decision.wake_at is not None
    step_s = scheduler.cost_model.decode_s(1, 1)
    return (decision.wake_at - (step_s if since_s is None else since_s)) / step_s


@pytest.mark.parametrize(("waiting", "steps"), [(1, 7), (2, 11), (3, 15), (9, 15), (200, 15)])
def test_step_of_one_is_the_rarer_the_more_wait_but_no_rarer_than_a_quarter(
    waiting: int, steps: int
) -> None:
    scheduler = make()
    decision = after_step(scheduler, *[{}] * waiting)
    assert pause(scheduler, decision) == pytest.approx(steps, rel=1e-3)


@pytest.mark.parametrize("special", [{"decodes": False}, {"service_class": BACKGROUND}])
def test_those_that_will_not_be_in_the_step_are_not_waited_for(special: dict[str, Any]) -> None:
    scheduler = make()
    decision = after_step(scheduler, *[special] * 9)
    assert pause(scheduler, decision) == pytest.approx(3, rel=1e-3)


def test_only_those_that_fit_into_a_step_are_waited_for() -> None:
    scheduler = make(max_running=2)
    decision = after_step(scheduler, *[{}] * 9)
    assert pause(scheduler, decision) == pytest.approx(7, rel=1e-3)


def test_nothing_is_waited_for_where_each_row_takes_its_time() -> None:
    model = CostModel(ModelShape(1e6, 1, 1e-3, 1, 1), MachineRates(1e9, 1e9, 1e9, 1e-9))
    scheduler = Scheduler("slack_edf", model, SchedulerSettings())
    decision = after_step(scheduler, *[{}] * 9)
    assert pause(scheduler, decision) == pytest.approx(3, rel=1e-3)


def test_whoever_leaves_is_waited_for_no_longer() -> None:
    scheduler = make()
    after_step(scheduler, *[{}] * 3)
    step_s, running = scheduler.cost_model.decode_s(1, 1), scheduler.current
    assert running is not None
    decision = scheduler.on_event(Cancelled("waiting-2"), 2 * step_s)
    assert pause(scheduler, decision) == pytest.approx(11, rel=1e-3)
    ends = Finished(running.id, frozenset(running.job_ids), running.predicted_s)
    decision = scheduler.on_event(ends, 3 * step_s)
    assert pause(scheduler, decision) == pytest.approx(7, rel=1e-3)
    scheduler.on_event(Cancelled("waiting-1"), 3.5 * step_s)
    step = scheduler.current
    assert step is not None
    assert step.is_decode, "nothing else is left"
    arrive(scheduler, "later", 50_000, at=3.6 * step_s)
    decision = scheduler.on_event(Finished(step.id), 4.5 * step_s)
    assert pause(scheduler, decision, 4.5 * step_s) == pytest.approx(7, rel=0.1)


def test_packed_prompts_count_one_by_one() -> None:
    scheduler = make()
    arrive(scheduler, "talker", 0)
    step = scheduler.current
    assert step is not None
    for name in ("a", "b"):
        arrive(scheduler, name, 4)
    arrive(scheduler, "long", 50_000)
    step_s = step.predicted_s
    scheduler.on_event(Finished(step.id), step_s)
    packed = scheduler.current
    assert packed is not None
    assert packed.job_ids == ("a", "b")
    ends = Finished(packed.id, frozenset({"b"}), packed.predicted_s)
    decision = scheduler.on_event(ends, 2 * step_s)
    assert pause(scheduler, decision) == pytest.approx(4 * 3 / 2 - 1, rel=1e-2), "two of three"


def test_share_of_the_time_is_that_of_the_steps_until_all_have_been_prefilled() -> None:
    scheduler = make()
    assert scheduler.decode_share() == 0.0
    after_step(scheduler)
    assert scheduler.decode_share() == pytest.approx(1 / 4), "of a prefill that does not decode"
    arrive(scheduler, "waiting-0", 50_000, at=0.01)
    assert scheduler.decode_share() == pytest.approx(1 / 8, rel=1e-2)
    for number in range(1, 4):
        arrive(scheduler, f"waiting-{number}", 50_000, at=0.01)
    assert scheduler.decode_share() == pytest.approx(1 / 4 * 3 / 5, rel=1e-2), "halfway: 3 of 5"


@pytest.mark.parametrize(("step_s", "wait_s"), [(0.02, 0.32), (0.04, 0.64), (0.2, 2.0)])
def test_streams_keep_a_sixteenth_of_the_time_or_have_a_token_every_2_s(
    step_s: float, wait_s: float
) -> None:
    model = CostModel(ModelShape(1e6, step_s * 1e9, 1e-3, 1, 1), MachineRates(1e9, 1e9, 1e9, 1e-9))
    scheduler = Scheduler("slack_edf", model, SchedulerSettings())
    decision = after_step(scheduler, *[{}] * 9)
    assert decision.wake_at == pytest.approx(wait_s, rel=0.02)


@pytest.mark.parametrize("leaves", [Held("first", is_held=True), Cancelled("first")])
def test_suspended_step_is_due_with_the_first_of_those_that_still_wait_for_it(
    leaves: Held | Cancelled,
) -> None:
    scheduler = make()
    arrive(scheduler, "first", 0, tpot_s=0.1)
    arrive(scheduler, "second", 0, tpot_s=0.3)
    step = scheduler.current
    assert step is not None
    scheduler.on_event(Finished(step.id), step.predicted_s)
    step = scheduler.current
    assert step is not None
    assert set(step.job_ids) == {"first", "second"}
    assert step.deadline_s < 0.2
    scheduler.on_event(leaves, step.predicted_s)
    assert step.deadline_s == pytest.approx(0.3)  # its last token came at 0
    scheduler.on_event(Held("first", is_held=False), 0.05)
    if isinstance(leaves, Held):
        assert step.deadline_s == pytest.approx(0.05 + 0.1)


def test_step_is_learnt_with_the_rows_that_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, rows = make(), []
    monkeypatch.setattr(
        scheduler._decoding._step_time, "observe", lambda *seen: rows.append(seen[1])
    )
    arrive(scheduler, "one", 0)
    arrive(scheduler, "two", 0)
    for leaves in ((), ("one",)):
        step = scheduler.current
        assert step is not None
        for name in leaves:
            scheduler.on_event(Cancelled(name), 0.0)
        scheduler.on_event(Finished(step.id), step.predicted_s)
    assert rows == [1, 2]
