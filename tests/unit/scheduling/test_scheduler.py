"""Scheduler: each rule by hand-made events; 10,000 tokens take about a second."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hand_made import arrive, job, make

from flowprefill.errors import ConfigError
from flowprefill.scheduling import (
    Arrival,
    Cancelled,
    Decision,
    Failed,
    Finished,
    Held,
    Job,
    Scheduler,
    SchedulerSettings,
    TimerFired,
    Work,
)
from flowprefill.scheduling.policies.base import BasePolicy
from flowprefill.scheduling.work import Rank, Verdict


def dispatched(decision: Decision) -> Work:
    assert decision.dispatch is not None
    return decision.dispatch


def test_arrival_idle_device_dispatched_at_once() -> None:
    decision = arrive(make(), "a", 100, 1.0)
    assert dispatched(decision).job_ids == ("a",)
    assert not decision.is_resume
    assert decision.preempted is None


def test_arrival_urgent_preempts_long_and_long_resumes() -> None:
    scheduler = make()
    long = dispatched(arrive(scheduler, "long", 50_000, 60.0))
    decision = arrive(scheduler, "short", 100, 0.1, at=1.0)
    assert decision.preempted is long
    short = dispatched(decision)
    after = scheduler.on_event(Finished(short.id, frozenset({"short"})), 1.02)
    assert after.dispatch is long
    assert after.is_resume
    assert long.suspensions == 1
    assert long.suspended_s == pytest.approx(0.02)


def test_arrival_running_work_ends_soon_left_alone() -> None:
    scheduler = make()
    arrive(scheduler, "first", 500, 60.0)
    decision = arrive(scheduler, "second", 100, 1.0, at=0.01)
    assert decision.dispatch is None
    assert decision.wake_at is not None
    assert 0.01 < decision.wake_at < 1.01


def test_timer_running_work_overruns_preempted_after_all() -> None:
    scheduler = make()
    arrive(scheduler, "first", 1_000, 60.0)
    decision = arrive(scheduler, "second", 100, 1.0, at=0.01)
    for _ in range(50):
        assert decision.wake_at is not None
        decision = scheduler.on_event(TimerFired(), decision.wake_at)
        if decision.dispatch is not None:
            break
    assert dispatched(decision).job_ids == ("second",)


def test_arrival_newcomer_hopeless_victim_left_alone() -> None:
    scheduler = make()
    arrive(scheduler, "running", 5_000, 0.6)
    decision = arrive(scheduler, "hopeless", 10_000, 0.2, at=0.01)
    assert decision.dispatch is None


def test_arrival_longer_newcomer_would_make_victim_miss_left_alone() -> None:
    scheduler = make()
    arrive(scheduler, "running", 2_000, 0.58)
    decision = arrive(scheduler, "newcomer", 4_000, 0.42, at=0.15)
    assert decision.dispatch is None  # both can be kept, the newcomer after the running one


def test_slack_edf_feasible_first_then_the_rest_by_arrival_and_length() -> None:
    scheduler = make(max_batch_tokens=1)
    running = dispatched(arrive(scheduler, "running", 1_000, 0.2))
    arrive(scheduler, "best effort", 400, at=0.01)
    arrive(scheduler, "late long", 2_000, 0.01, at=0.01)
    arrive(scheduler, "late short", 500, 0.01, at=0.01)
    arrive(scheduler, "on time", 3_000, 50.0, at=0.01)
    order = []
    now, work = 0.11, running
    for _ in range(5):
        decision = scheduler.on_event(Finished(work.id, frozenset(work.job_ids)), now)
        if decision.dispatch is None:
            break
        work = decision.dispatch
        order += work.job_ids
        now += work.predicted_s
    assert order == ["on time", "best effort", "late short", "late long"]


def test_s_edf_paper_infeasible_latest_deadline_first() -> None:
    scheduler = make("s_edf_paper", max_batch_tokens=1)
    running = dispatched(arrive(scheduler, "running", 1_000, 0.5, at=1.0))
    arrive(scheduler, "late early", 1_000, 0.01, at=1.01)
    arrive(scheduler, "late later", 1_000, 0.05, at=1.01)
    arrive(scheduler, "on time", 1_000, 5.0, at=1.01)
    first = dispatched(scheduler.on_event(Finished(running.id, frozenset({"running"})), 1.1))
    assert first.job_ids == ("on time",)
    second = dispatched(scheduler.on_event(Finished(first.id, frozenset({"on time"})), 1.2))
    assert second.job_ids == ("late later",)


def test_s_edf_paper_preempts_for_earlier_deadline_though_nothing_is_gained() -> None:
    scheduler = make("s_edf_paper")
    running = dispatched(arrive(scheduler, "running", 500, 60.0, at=1.0))
    assert arrive(scheduler, "second", 100, 30.0, at=1.01).preempted is running


def test_s_edf_paper_packs_while_head_keeps_a_tenth_of_its_objective() -> None:
    scheduler = make("s_edf_paper", max_batch_tokens=2048)
    running = dispatched(arrive(scheduler, "running", 500, 0.06, at=1.0))
    for number in range(4):
        arrive(scheduler, f"j{number}", 400, 0.16 + 0.001 * number, at=1.01)
    work = dispatched(scheduler.on_event(Finished(running.id, frozenset({"running"})), 1.05))
    # 1.17 - 0.016 - 1.05 leaves 0.104 s: two take 0.082 s, three 0.122 s.
    assert work.job_ids == ("j0", "j1")


def test_edf_orders_by_deadline_and_preempts_strictly() -> None:
    scheduler = make("edf")
    running = dispatched(arrive(scheduler, "running", 1_000, 1.0))
    assert arrive(scheduler, "equal", 1_000, 1.0).dispatch is None
    assert arrive(scheduler, "earlier", 1_000, 0.5).preempted is running


def test_shortest_first_preempts_for_less_remaining() -> None:
    scheduler = make("shortest_first")
    running = dispatched(arrive(scheduler, "running", 1_000, 1.0))
    assert arrive(scheduler, "longer", 2_000, 0.1).dispatch is None
    assert arrive(scheduler, "shorter", 500).preempted is running


def test_fcfs_packs_in_order_of_arrival_up_to_the_token_bound() -> None:
    scheduler = make("fcfs", max_batch_tokens=250)
    running = dispatched(arrive(scheduler, "running", 1_000))
    for number in range(4):
        assert arrive(scheduler, f"j{number}", 100, 0.001, at=0.01).dispatch is None
    work = dispatched(scheduler.on_event(Finished(running.id, frozenset({"running"})), 0.1))
    assert work.job_ids == ("j0", "j1")


def test_slack_edf_packs_only_members_that_stay_on_time() -> None:
    scheduler = make(max_batch_tokens=2048)
    running = dispatched(arrive(scheduler, "running", 50, 0.0095))
    arrive(scheduler, "tight", 20, 0.010, at=0.001)
    arrive(scheduler, "also", 20, 0.020, at=0.001)
    arrive(scheduler, "large", 2_000, 0.3, at=0.001)
    work = dispatched(scheduler.on_event(Finished(running.id, frozenset({"running"})), 0.003))
    assert work.job_ids == ("tight", "also")


def test_finished_suspended_work_by_race_taken_as_finished() -> None:
    scheduler = make()
    long = dispatched(arrive(scheduler, "long", 50_000, 60.0))
    short = dispatched(arrive(scheduler, "short", 100, 0.1, at=1.0))
    assert scheduler.on_event(Finished(long.id, frozenset({"long"})), 1.001).dispatch is None
    assert scheduler.current is short
    scheduler.on_event(Finished(short.id, frozenset({"short"})), 1.02)
    assert scheduler.current is None
    assert scheduler.on_event(Finished(long.id), 1.03) == Decision(reason="nothing to run")


def test_cancelled_last_job_of_running_work_cancels_it() -> None:
    scheduler = make()
    work = dispatched(arrive(scheduler, "a", 1_000, 1.0))
    arrive(scheduler, "b", 1_000, 1.0)
    decision = scheduler.on_event(Cancelled("a"), 0.01)
    assert decision.cancel == (work,)
    assert dispatched(decision).job_ids == ("b",)
    assert decision.preempted is None


def test_failed_batch_ends_all_its_jobs() -> None:
    scheduler = make("fcfs")
    running = dispatched(arrive(scheduler, "running", 1_000))
    arrive(scheduler, "a", 100)
    arrive(scheduler, "b", 100)
    batch = dispatched(scheduler.on_event(Finished(running.id, frozenset({"running"})), 0.1))
    decision = scheduler.on_event(Failed(batch.id), 0.11)
    assert decision.cancel == ()
    assert scheduler.load().backlog_s == 0.0
    assert dispatched(arrive(scheduler, "a", 100, at=0.2)).job_ids == ("a",)


def test_on_miss_drop_waiting_dropped_when_out_of_reach_and_timer_asked_for() -> None:
    scheduler = make("fcfs")
    arrive(scheduler, "long", 10_000)
    decision = arrive(scheduler, "drop", 1_000, 0.2, on_miss="drop")
    assert decision.wake_at is not None
    assert decision.wake_at <= 0.2
    later = scheduler.on_event(TimerFired(), decision.wake_at)
    assert [name for name, _ in later.dropped] == ["drop"]
    assert scheduler.load().waiting_jobs == 0
    assert scheduler.on_event(Cancelled("drop"), 0.3).dropped == ()


def test_on_miss_drop_goes_by_what_is_known_of_the_machine_by_now() -> None:
    scheduler = make("fcfs")
    arrive(scheduler, "long", 10_000)
    decision = arrive(scheduler, "drop", 1_000, 0.2, on_miss="drop")
    work = scheduler._prefills["drop"]
    for _ in range(5):  # it is ten times as fast as calibrated
        scheduler.cost_model.observe("prefill", work.predicted_s, work.predicted_s / 10, work.shape)
    now = decision.wake_at or 0.0
    assert now + work.predicted_s > 0.2
    later = scheduler.on_event(TimerFired(), now)
    assert later.dropped == ()
    assert later.wake_at is not None
    assert now < later.wake_at < 0.2


def test_decode_step_over_all_sequences_has_earliest_token_deadline() -> None:
    scheduler = make(max_running=2)
    for name, tpot in (("a", 0.5), ("b", 0.2), ("c", 0.3)):
        arrive(scheduler, name, 0, at=1.0, tpot_s=tpot)
    first = scheduler.current
    assert first is not None
    assert first.kind == "decode"
    step = dispatched(scheduler.on_event(Finished(first.id, frozenset({"a"})), 1.01))
    assert step.job_ids == ("b", "c")
    assert step.deadline_s == pytest.approx(1.2)


def test_decode_due_preempts_long_prefill_and_gives_way_again() -> None:
    scheduler = make()
    step = arrive(scheduler, "talker", 0, tpot_s=0.1).dispatch
    assert step is not None
    arrive(scheduler, "long", 50_000, 60.0)
    decision = scheduler.on_event(Finished(step.id), 0.003)
    long = dispatched(decision)
    assert long.job_ids == ("long",)
    assert decision.wake_at == pytest.approx(0.103 - 0.002, abs=0.004)
    due = scheduler.on_event(TimerFired(), decision.wake_at or 0.0)
    assert due.preempted is long
    again = scheduler.on_event(Finished(dispatched(due).id), 0.104)
    assert again.dispatch is long


@pytest.mark.parametrize("extra_s", [0.0, 0.003])
def test_a_stream_next_to_a_long_prefill_keeps_its_pace_though_steps_end_later_than_predicted(
    extra_s: float,
) -> None:
    scheduler = make()
    decision = arrive(scheduler, "talker", 0, tpot_s=0.1)
    arrive(scheduler, "long", 500_000)
    ends = [0.01]
    for _ in range(30):
        decision = scheduler.on_event(Finished(dispatched(decision).id), ends[-1])
        while decision.dispatch is None or not decision.dispatch.is_decode:
            assert decision.wake_at is not None
            now = decision.wake_at
            decision = scheduler.on_event(TimerFired(), now)
        blocking_s = scheduler.settings.max_blocking_s / 2
        ends.append(now + blocking_s + decision.dispatch.remaining_s + extra_s)
    gap_s = (ends[-1] - ends[0]) / (len(ends) - 1)
    assert 0.095 < gap_s < 0.1


@pytest.mark.parametrize(
    ("shares", "tpot_s", "steps"),
    [
        ({"idle_share": 0.25}, math.inf, 3.0),
        ({"idle_share": 0.1}, math.inf, 9.0),
        ({"decode_share": 0.5}, 1e-4, 1.0),
        ({"decode_share": 0.25}, 1e-4, 3.0),
    ],
)
def test_decode_leaves_prefills_their_share(
    shares: dict[str, float], tpot_s: float, steps: float
) -> None:
    scheduler = make(**shares)
    step = dispatched(arrive(scheduler, "talker", 0, tpot_s=tpot_s))
    arrive(scheduler, "long", 50_000, decodes=False)
    decision = scheduler.on_event(Finished(step.id), step.predicted_s)
    assert decision.wake_at == pytest.approx((1.0 + steps) * step.predicted_s, rel=1e-3)


def test_decode_due_waits_for_a_prefill_with_an_earlier_deadline_that_would_miss_it() -> None:
    scheduler = make()
    step = dispatched(arrive(scheduler, "talker", 0, tpot_s=0.05))  # of 2 ms
    arrive(scheduler, "prefill", 460, 0.0515)  # of 47 ms
    decision = scheduler.on_event(Finished(step.id), 0.002)
    assert dispatched(decision).job_ids == ("prefill",)
    assert decision.wake_at == pytest.approx(0.048, abs=1e-6)
    later = scheduler.on_event(TimerFired(), 0.048)
    assert (later.dispatch, later.wake_at) == (None, pytest.approx(0.052))


def test_decode_due_waits_for_no_prefill_whose_deadline_is_later_though_it_would_miss_it() -> None:
    scheduler = make()
    step = dispatched(arrive(scheduler, "talker", 0, tpot_s=0.05))
    arrive(scheduler, "prefill", 460, 0.0525)  # the token is due at 0.052
    scheduler.on_event(Finished(step.id), 0.002)
    assert dispatched(scheduler.on_event(TimerFired(), 0.048)).is_decode


def test_decode_starts_as_early_as_all_that_is_in_the_cache_needs() -> None:
    scheduler = make()
    for name in ("a", "b"):
        scheduler.on_event(Arrival(Job(name, 0.0, 0, 10**10, tpot_s=0.5)), 0.0)  # a is stepped
    arrive(scheduler, "long", 50_000)
    step = scheduler.current
    assert step is not None
    decision = scheduler.on_event(Finished(step.id), step.predicted_s)
    assert dispatched(decision).job_ids == ("long",)
    both_s = scheduler.cost_model.decode_s(2, 2 * 10**10)
    assert decision.wake_at == pytest.approx(0.5 - both_s - 0.002, abs=1e-5)


def test_held_sequence_is_in_no_further_step_until_it_goes_on() -> None:
    scheduler = make()
    first = dispatched(arrive(scheduler, "a", 0, at=1.0, tpot_s=0.1))
    arrive(scheduler, "b", 0, at=1.0, tpot_s=0.1)
    assert scheduler.on_event(Held("a", True), 1.001).dispatch is None, "its step goes on"
    second = dispatched(scheduler.on_event(Finished(first.id), 1.01))
    assert second.job_ids == ("b",)
    assert (scheduler.load().decoding, scheduler.load().held) == (1, 1)
    last = scheduler.on_event(Finished(second.id, frozenset({"b"})), 1.02)
    assert (last.dispatch, last.wake_at, last.reason) == (None, None, "nothing to run")
    assert scheduler.on_event(Held("a", True), 2.0).dispatch is None
    step = dispatched(scheduler.on_event(Held("a", False), 9.0))
    assert step.job_ids == ("a",)
    assert step.deadline_s == pytest.approx(9.1), "it is not late for the time it was held"
    assert (scheduler.load().decoding, scheduler.load().held) == (1, 0)


def test_held_and_let_go_on_within_one_step_is_in_the_next_once() -> None:
    scheduler = make()
    step = dispatched(arrive(scheduler, "a", 0, at=1.0))
    scheduler.on_event(Held("a", True), 1.001)
    scheduler.on_event(Held("a", False), 1.002)
    step = dispatched(scheduler.on_event(Finished(step.id), 1.01))
    assert step.job_ids == ("a",)
    assert step.shape is not None
    assert step.shape.pairs == 1, "the step before made a token"
    scheduler.on_event(Finished(step.id, frozenset({"a"})), 1.02)
    assert scheduler.decode_share() == 0.0, "nothing decodes any more"


def test_held_sequence_hurries_no_prefill_and_ends_when_cancelled() -> None:
    scheduler = make()
    step = dispatched(arrive(scheduler, "talker", 0, tpot_s=0.05))
    scheduler.on_event(Held("talker", True), 0.001)
    scheduler.on_event(Finished(step.id), 0.003)
    decision = arrive(scheduler, "long", 50_000, 60.0, at=0.01)
    assert (dispatched(decision).job_ids, decision.wake_at) == (("long",), None)
    assert scheduler.on_event(Cancelled("talker"), 0.02).cancel == ()
    assert scheduler.load().held == 0
    assert scheduler.on_event(Held("talker", False), 0.03).dispatch is None


def test_held_job_that_does_not_decode_is_prefilled() -> None:
    scheduler = make()
    work = dispatched(arrive(scheduler, "a", 100))
    scheduler.on_event(Held("a", True), 0.001)
    step = dispatched(scheduler.on_event(Finished(work.id), 0.01))
    assert (step.kind, step.job_ids) == ("decode", ("a",))


def test_often_suspended_work_goes_on_for_a_slice_before_the_next_time() -> None:
    scheduler = make(max_suspensions=2)
    long = dispatched(arrive(scheduler, "long", 100_000, 60.0))
    for number in range(2):
        now = 1.0 + number
        short = dispatched(arrive(scheduler, f"short{number}", 100, 0.1, at=now))
        scheduler.on_event(Finished(short.id, frozenset(short.job_ids)), now + 0.02)
    decision = arrive(scheduler, "third", 100, 0.1, at=2.03)
    assert decision.dispatch is None
    assert decision.wake_at == pytest.approx(2.02 + scheduler.settings.late_slice_s)
    assert scheduler.on_event(TimerFired(), decision.wake_at or 0.0).preempted is long


def test_arrival_live_id_refused_and_nothing_changed() -> None:
    scheduler = make()
    arrive(scheduler, "a", 100)
    with pytest.raises(ValueError, match="job a"):
        arrive(scheduler, "a", 100)
    assert scheduler.load().waiting_jobs == 0


def test_priority_breaks_ties_between_equally_urgent() -> None:
    scheduler = make("edf", max_batch_tokens=1)
    running = dispatched(arrive(scheduler, "running", 100, 0.5))
    arrive(scheduler, "later", 100, 1.0, priority=1)
    arrive(scheduler, "sooner", 100, 1.0, priority=0)
    work = dispatched(scheduler.on_event(Finished(running.id, frozenset({"running"})), 0.1))
    assert work.job_ids == ("sooner",)


def test_priority_policy_preempts_for_a_smaller_number_and_never_for_an_equal_one() -> None:
    scheduler = make("priority")
    running = dispatched(arrive(scheduler, "running", 1_000, priority=5))
    assert arrive(scheduler, "equal", 10, 0.1, priority=5).dispatch is None
    assert arrive(scheduler, "smaller", 5_000, priority=1).preempted is running


def test_predicted_ttft_counts_what_is_ahead_and_changes_nothing() -> None:
    scheduler = make("fcfs")
    arrive(scheduler, "a", 10_000)
    arrive(scheduler, "b", 10_000)
    before = scheduler.load()
    assert (before.waiting_jobs, before.waiting_tokens) == (1, 10_000)
    assert scheduler.predicted_ttft_s(job("c", 10_000), 0.0) == pytest.approx(3.0, rel=0.02)
    assert scheduler.predicted_ttft_s(job("a", 10_000), 0.5) == pytest.approx(0.5, rel=0.02)
    assert scheduler.load() == before


def test_backlog_is_what_has_not_left_and_exactly_nothing_once_all_has() -> None:
    scheduler, left = make("edf"), {}
    for number in (0, 3, 1, 5, 2, 4):  # they leave in another order
        name, tokens = f"job{number}", 137 * (number + 1)
        arrive(scheduler, name, tokens, 60.0 + number)
        left[name] = scheduler.cost_model.prefill_s(tokens)
    assert scheduler.load().backlog_s == pytest.approx(sum(left.values()))
    for name in sorted(left, reverse=True):
        scheduler.on_event(Cancelled(name), 0.0)
        del left[name]
        assert scheduler.load().backlog_s == pytest.approx(sum(left.values()))
    assert scheduler.load().backlog_s == 0.0, "or it would count as waiting"


def test_predicted_ttft_counts_no_one_who_goes_later() -> None:
    scheduler = make("edf")
    arrive(scheduler, "running", 10_000, 5.0)
    arrive(scheduler, "later", 10_000, 9.0)
    assert scheduler.predicted_ttft_s(job("new", 1_000, 7.0), 0.0) == pytest.approx(1.1, rel=0.02)


def test_finished_work_that_took_longer_corrects_the_next_prediction() -> None:
    scheduler = make()
    work = dispatched(arrive(scheduler, "a", 1_000))
    before_s = scheduler.predicted_ttft_s(job("b", 1_000), 1.0)
    scheduler.on_event(Finished(work.id, frozenset({"a"}), 2 * work.predicted_s), 1.0)
    assert scheduler.predicted_ttft_s(job("b", 1_000), 1.0) > 1.01 * before_s


def test_unknown_policy_names_the_known() -> None:
    with pytest.raises(ConfigError, match="slack_edf"):
        make("fastest")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_running": 0}, "max_running: got 0, expected an integer >= 1"),
        ({"idle_share": 1.0}, "idle_share: got 1.0, expected a share in"),
        ({"max_stall_s": -1.0}, "max_stall_s: got -1.0, expected a number >= 0"),
        ({"late_slice_s": 0.0}, "late_slice_s: got 0.0, expected a number > 0"),
        ({"late_patience_s": math.nan}, "late_patience_s: got nan"),
        ({"class_shares": {"background": 0.1}}, "class_shares: got 0.1 for 'background'"),
        ({"class_shares": {"a": 0.6, "b": 0.4}}, "class_shares: .* less than 1 in all"),
    ],
)
def test_settings_out_of_bounds_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SchedulerSettings(**settings)


NEVER_WAITED = Work([job("x", 10)], 99, 1.0)


class Nonsense(BasePolicy):
    """In order of arrival, but for one answer."""

    name = "nonsense"

    def __init__(self, scheduler: Scheduler, **answers: Callable[..., Any]) -> None:
        super().__init__(scheduler.cost_model, scheduler.settings)
        for name, answer in answers.items():
            setattr(self, name, answer)

    def rank(self, work: Work, now: float) -> Rank:
        return Rank((work.arrival_s,))


@pytest.mark.parametrize(
    ("answers", "named"),
    [
        ({"rank": lambda work, now: Rank((1.0,), now)}, "rank until"),
        ({"rank": lambda work, now: Rank((1.0,), math.nan)}, "rank until nan"),
        (
            {
                "rank": lambda work, now: Rank((float("nan"),)),
                "pick": lambda waiting, now: waiting[-1],
            },
            "by NaN",
        ),
        ({"batch": lambda head, waiting, now: []}, "batch"),
        (
            {"batch": lambda head, waiting, now: [one for one in waiting if one is not head]},
            "batch",
        ),
        ({"batch": lambda head, waiting, now: [head, head]}, "does not wait"),
        (
            {"should_preempt": lambda current, waiting, now: Verdict(True, "", by=current)},
            "does not wait",
        ),
        ({"pick": lambda waiting, now: NEVER_WAITED}, "does not wait"),
    ],
)
def test_policy_that_answers_nonsense_is_told_and_loses_no_job(
    answers: dict[str, Callable[..., Any]], named: str
) -> None:
    """The engine ends its requests with that error; before, some waited for ever, or all did."""
    plain = make()
    scheduler = Scheduler(Nonsense(plain, **answers), plain.cost_model, plain.settings)

    def play() -> None:
        first = dispatched(arrive(scheduler, "a", 100, at=1.0))
        for number in range(5):
            arrive(scheduler, f"b{number}", 100, at=2.0 + number)
        dispatched(scheduler.on_event(Finished(first.id, frozenset("a")), 9.0))

    with pytest.raises(ValueError, match=f"policy 'nonsense': .*{named}"):
        play()
