"""slack_edf: each claim of its docstrings by a small scenario; 10,000 tokens take a second."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hand_made import arrive, make
from hypothesis import given
from hypothesis import strategies as st

from flowprefill.scheduling import (
    Cancelled,
    Finished,
    Job,
    Scheduler,
    SchedulerSettings,
    TimerFired,
    Work,
)
from flowprefill.scheduling.policies.forecast import LULL, MEMORY_S, Forecast
from flowprefill.scheduling.policies.planning import keepable, plan
from flowprefill.scheduling.policies.shares import GuaranteedShares
from flowprefill.scheduling.policies.tenant_clock import COMPACT_AT, TenantClock
from flowprefill.scheduling.reasons import Reason


def end_current(scheduler: Scheduler, at: float) -> Work:
    work = scheduler.current
    assert work is not None
    scheduler.on_event(Finished(work.id, frozenset(work.job_ids)), at)
    assert scheduler.current is not None
    return scheduler.current


def work(
    name: str, seconds: float, deadline: float, serial: int, weight: float = 1.0, at: float = 0.0
) -> Work:
    job = Job(name, at, 1, 0, deadline, weight=weight)
    return Work([job], serial, seconds)


WORKS = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 60)), min_size=1, max_size=7)


@given(WORKS)
def test_plan_equal_weights_keeps_the_most_that_can_be_kept(sizes: list[tuple[int, int]]) -> None:
    works = sorted((work(str(n), s, d, n) for n, (s, d) in enumerate(sizes)), key=_deadline)
    kept = keepable(works, 0.0, [w.deadline_s for w in works])
    assert _all_on_time(kept)
    best = max(
        len(subset)
        for size in range(len(works) + 1)
        for subset in itertools.combinations(works, size)
        if _all_on_time(subset)
    )
    assert len(kept) == best


def _deadline(item: Work) -> float:
    return item.deadline_s


def _all_on_time(works: Any) -> bool:
    at = 0.0
    for item in works:
        at += item.remaining_s
        if at > item.deadline_s:
            return False
    return True


def test_plan_weight_gives_up_the_most_time_per_weight() -> None:
    light, heavy = work("light", 3.0, 5.0, 0), work("heavy", 4.0, 5.0, 1, weight=2.0)
    assert keepable([light, heavy], 0.0, [5.0, 5.0]) == [heavy]
    heavy.weight = 1.0
    assert keepable([light, heavy], 0.0, [5.0, 5.0]) == [light]


@pytest.mark.parametrize("start_s", [0.0, 1000.0])
def test_plan_sets_time_aside_for_arrivals_due_before(start_s: float) -> None:
    def due(name: str, seconds: float, in_s: float, serial: int) -> Work:
        return work(name, seconds, start_s + in_s, serial, at=start_s)

    def limits(*works: Work, at: float = 0.0) -> list[float]:
        """Return them from the start on."""
        return [limit - start_s for limit in forecast.limits(works, start_s + at)]

    def planned(*works: Work) -> list[Work]:
        return list(plan(works, start_s, start_s, forecast))

    forecast = Forecast()
    short, long = due("short", 1.0, 6.0, 0), due("long", 4.5, 6.0, 1)
    assert planned(short, long) == [short, long]
    for number in range(20):  # half of the device's time, each due within two seconds
        forecast.note(due("tight", 0.5 * MEMORY_S / 20, 2.0, 2 + number), start_s)
    soon = due("soon", 0.1, 1.9, 30)
    assert limits(soon, short) == pytest.approx([1.9, 6.0 - 0.5 * (6.0 - 2.0)])
    short.protected = short.jobs[:]
    assert limits(short) == pytest.approx([6.0])
    short.protected.clear()
    assert planned(short, long) == [short]
    later = due("later", 1.0, 8 * MEMORY_S, 40)  # by then they count no more
    assert limits(later, at=7 * MEMORY_S) == pytest.approx([8 * MEMORY_S], abs=0.01)
    assert planned(long) == [long]  # better than none
    for number in range(20):  # a tenth, due within half a second: these are counted first
        forecast.note(due("tighter", 0.1 * MEMORY_S / 20, 0.5, 50 + number), start_s)
    expected = [1.9 - 0.1 * (1.9 - 0.5), 6.0 - 0.5 * (6.0 - 2.0) - 0.1 * (6.0 - 0.5)]
    assert limits(soon, short) == pytest.approx(expected)


def test_plan_keeps_what_it_can_where_arrivals_are_expected_to_take_all_the_time() -> None:
    forecast = Forecast()
    for number in range(20):  # four times what the device can do
        forecast.note(work("tight", 4.0 * MEMORY_S / 20, 1.0, number), 0.0)
    works = [work(name, 1.0, 6.0, 30 + number) for number, name in enumerate("abc")]
    assert max(forecast.limits(works, 0.0)) < 0.0
    assert plan(works, 0.0, 0.0, forecast) == works


def test_plan_sets_no_more_time_aside_for_one_that_asks_for_the_impossible() -> None:
    forecast, long = Forecast(), work("long", 1.0, 6.0, 1)
    forecast.note(work("impossible", 100.0, 1.0, 0), 0.0)  # a second's work by then, of a hundred
    assert forecast.limits([long], 0.0) == pytest.approx([6.0 - (6.0 - 1.0) / MEMORY_S])


def test_plan_sets_less_time_aside_once_a_burst_is_over() -> None:
    forecast = Forecast()
    for number in range(20):
        tight = work("tight", 0.5 * MEMORY_S / 20, 1.0, number)
        forecast.note(tight, 0.0)

    def share(at: float) -> float:
        """Return what is set aside of each second, the decay taken out."""
        long = work("long", 1.0, at + 5.0, 30)
        taken_s = long.deadline_s - forecast.limits([long], at)[0]
        return taken_s / (5.0 - 1.0) / math.exp(-at / MEMORY_S)

    lull_s = LULL * MEMORY_S / 20
    assert share(0.9 * lull_s) == pytest.approx(0.5)
    assert share(4.0 * lull_s) == pytest.approx(0.5 / 4.0)
    forecast.note(work("tight", 1e-3, 1.0, 20), 4.0 * lull_s)  # it goes on
    assert share(4.0 * lull_s) == pytest.approx(0.5, rel=0.01)


def test_plan_sets_as_much_time_aside_after_an_hour_as_after_a_minute() -> None:
    """One arrives every half second, and is due within a second: that never lets up."""

    def taken_s(minutes: int) -> float:
        forecast, now = Forecast(), 0.0
        for number in range(minutes * 120):
            now = 0.5 * number
            forecast.note(work("tight", 0.1, now + 1.0, number, at=now), now)
        now += 0.9 * LULL * 0.5  # the next is a little late
        return now + 6.0 - forecast.limits([work("long", 1.0, now + 6.0, 0)], now)[0]

    assert taken_s(60) == pytest.approx(taken_s(1), rel=1e-3)
    assert taken_s(1) == pytest.approx(0.2 * (6.0 - 1.0), rel=0.3)


def test_running_work_that_the_plan_gives_up_makes_way() -> None:
    scheduler = make(max_batch_tokens=1)
    arrive(scheduler, "running", 5_000, 0.6)
    longer = arrive(scheduler, "longer", 5_500, 0.59, at=0.001)
    assert longer.dispatch is None  # one of the two is lost: the longer
    decision = arrive(scheduler, "shorter", 2_500, 0.5, at=0.05)
    assert decision.preempted is not None
    assert decision.preempted.job_ids == ("running",)
    assert "given up" in decision.reason


def test_on_time_on_a_free_device_needs_no_slack_for_a_segment() -> None:
    scheduler = make(max_blocking_s=0.01)
    arrive(scheduler, "running", 1_000, 0.15)
    arrive(scheduler, "tight", 1_000, 0.205, at=0.002)
    arrive(scheduler, "unhurried", 5_000, 60.0, at=0.003)
    assert end_current(scheduler, 0.101).job_ids == ("tight",)


def test_on_time_running_work_is_not_suspended_for_one_that_a_segment_makes_late() -> None:
    scheduler = make(max_blocking_s=0.01)
    arrive(scheduler, "running", 2_000, 0.205)
    decision = arrive(scheduler, "tight", 1_000, 0.105, at=0.002)
    assert decision.dispatch is None


def test_late_running_work_yields_even_to_one_that_a_segment_makes_late() -> None:
    scheduler = make(max_blocking_s=0.01)
    arrive(scheduler, "late", 1_000, 0.05)
    decision = arrive(scheduler, "tight", 1_000, 0.105, at=0.01)
    assert decision.dispatch is not None
    assert "can be on time" in decision.reason


@pytest.mark.parametrize("start_s", [0.0, 1000.0])
def test_late_running_work_yields_at_once_though_the_newcomer_has_time(start_s: float) -> None:
    scheduler = make()
    arrive(scheduler, "late", 5_000, 0.1, at=start_s)
    decision = arrive(scheduler, "unhurried", 1_000, 60.0, at=start_s + 0.01)
    assert decision.dispatch is not None
    assert decision.dispatch.job_ids == ("unhurried",)
    assert decision.reason == Reason.CAN_BE_ON_TIME


def test_running_work_longer_than_predicted_lately_gives_way_earlier() -> None:
    def preempts(measured: float) -> bool:
        scheduler = make()
        for _ in range(64):
            scheduler.cost_model.observe("prefill", 1.0, 1.0)
        scheduler.cost_model.observe("prefill", 1.0, 1.0)
        for _ in range(16):
            scheduler.cost_model.observe("prefill", 1.0, measured)
        scheduler.cost_model._correction["prefill"] = 1.0
        arrive(scheduler, "running", 1_000, 60.0)
        return arrive(scheduler, "newcomer", 100, 0.55, at=0.0).dispatch is not None

    assert not preempts(1.0)
    assert preempts(1.5)


def test_rest_equal_ones_go_by_arrival_whatever_was_learnt_meanwhile() -> None:
    scheduler = make(max_batch_tokens=1)
    arrive(scheduler, "running", 1_000, 60.0)
    order: list[str] = []
    for number in range(6):
        arrive(scheduler, f"equal{number}", 1_000, at=0.01 * (number + 1))
        measured = 0.9 if number % 2 else 1.2
        for _ in range(5):
            scheduler.cost_model.observe("prefill", 1.0, measured)
    for number in range(6):
        order += end_current(scheduler, 0.1 * (number + 2)).job_ids
    assert order == [f"equal{number}" for number in range(6)]


def test_rest_shorter_one_overtakes_within_sixteen_times_the_time_and_not_after() -> None:
    scheduler = make(max_batch_tokens=1)
    arrive(scheduler, "running", 100_000, 60.0)
    arrive(scheduler, "long", 1_000, at=0.1)  # 0.1 s: overtaken up to 1.6 s - 16 * 0.01 s later
    arrive(scheduler, "soon", 90, at=1.4)
    arrive(scheduler, "later", 90, at=1.8)
    order = [end_current(scheduler, 2.0 + 0.1 * number).job_ids for number in range(3)]
    assert order == [("soon",), ("long",), ("later",)]


def test_rest_a_tenants_backlog_does_not_delay_another_tenant() -> None:
    scheduler = make(max_batch_tokens=1)
    arrive(scheduler, "running", 1_000, 60.0)
    for number in range(20):
        arrive(scheduler, f"heavy{number}", 1_000, at=0.01, tenant="heavy")
    for number in range(2):
        arrive(scheduler, f"light{number}", 1_000, at=0.05 + 0.15 * number, tenant="light")
    arrive(scheduler, "unnamed", 1_000, at=0.06)
    order = [end_current(scheduler, 0.1 * (number + 2)).job_ids[0] for number in range(6)]
    assert order == ["heavy0", "light0", "unnamed", "heavy1", "light1", "heavy2"]


def test_rest_a_tenants_packed_backlog_does_not_delay_another_tenant() -> None:
    scheduler = make(max_batch_tokens=4_000)
    arrive(scheduler, "running", 5_000, 60.0, tenant="heavy")
    for number in range(40):
        arrive(scheduler, f"heavy{number}", 1, at=0.01, tenant="heavy")
    assert len(end_current(scheduler, 0.5).jobs) > 1
    arrive(scheduler, "light", 1, at=0.501, tenant="light")
    arrive(scheduler, "urgent", 1, 0.01, at=0.502)  # suspends those that are packed
    assert end_current(scheduler, 0.504).job_ids == ("light",)


def test_promise_made_anew_holds_when_packed_and_when_one_of_the_packed_leaves() -> None:
    scheduler = make(max_batch_tokens=4_000, max_blocking_s=0.0)
    arrive(scheduler, "running", 1_000, 0.1025, is_promised=True)
    for name in ("late", "later"):
        arrive(scheduler, name, 1, 0.05, is_promised=True, weight=1e-9)
    arrived = scheduler._prefills["late"]
    packed = end_current(scheduler, 0.1)
    assert packed.job_ids == ("late", "later")
    promised = (arrived.deadline_s, arrived.renewals)
    assert promised[0] > 0.1
    assert (packed.deadline_s, packed.renewals) == promised
    scheduler.on_event(Cancelled("later"), 0.1)
    assert (packed.deadline_s, packed.renewals) == promised


def test_packed_one_that_can_be_on_time_is_when_another_of_the_packed_cannot() -> None:
    scheduler = make(max_batch_tokens=4_000, max_blocking_s=0.0)
    arrive(scheduler, "running", 1_000, 0.11)
    arrive(scheduler, "soon", 10, 0.11, weight=1e-6)
    arrive(scheduler, "later", 500, 0.2, weight=1e-6)
    packed = end_current(scheduler, 0.04)
    assert packed.job_ids == ("soon", "later")
    arrive(scheduler, "urgent", 300, 0.031, at=0.05)
    assert end_current(scheduler, 0.1) is packed
    decision = arrive(scheduler, "other", 100, 0.2, at=0.1)
    assert decision.dispatch is None, decision.reason


def test_rest_one_that_turns_late_counts_once_against_its_tenant() -> None:
    scheduler = make(max_batch_tokens=1)
    arrive(scheduler, "running", 20_000, 60.0)
    for number in range(10):  # a second's work
        arrive(scheduler, f"turns late{number}", 1_000, 0.5, at=0.01, tenant="a", weight=1e-6)
    arrive(scheduler, "its next", 1_000, at=1.0, tenant="a")
    arrive(scheduler, "another's", 1_000, at=1.2, tenant="b")
    order: list[str] = []
    for number in range(12):
        order += end_current(scheduler, 2.0 + 0.1 * number).job_ids
    assert order[-2:] == ["its next", "another's"]


def test_rest_tenants_that_ask_for_less_than_a_device_go_by_arrival() -> None:
    clock, now = TenantClock(), 0.0
    for number in range(2 * COMPACT_AT):
        item = work(str(number), 0.5, math.inf, number)
        item.jobs[0].tenant, item.arrival_s, item.nominal_s = f"tenant{number % 400}", now, 0.5
        item.fair_arrival_s = now
        clock.note(item, now)
        assert item.fair_arrival_s == now
        now += 0.5


def test_rest_a_tenants_backlog_counts_however_many_other_tenants_come() -> None:
    clock, now = TenantClock(), 0.0

    def comes(tenant: str, seconds: float) -> float:
        item = work(tenant, seconds, math.inf, 0, at=now)
        item.jobs[0].tenant, item.nominal_s = tenant, seconds
        clock.note(item, now)
        return item.fair_arrival_s

    comes("heavy", 1e4)
    for number in range(5 * COMPACT_AT):
        now += 1.0
        assert comes(f"tenant{number}", 0.5) == now
    assert comes("heavy", 1.0) == 1e4
    assert len(clock._ends) <= COMPACT_AT, "who has no backlog is forgotten"


def test_plan_of_equal_ones_gives_up_the_tenant_with_the_longest_backlog() -> None:
    works = [work(str(number), 1.0, 3.0, number, at=-number) for number in range(4)]
    works[1].fair_arrival_s += 2.0
    assert keepable(works, 0.0, [3.0] * 4) == [works[0], *works[2:]]
    works = [work(str(number), 1.0, 3.0, number, at=number) for number in range(4)]
    works[1].fair_arrival_s += 1.0
    assert keepable(works, 0.0, [3.0] * 4) == [works[0], *works[2:]]


def test_plan_gives_up_no_promised_one_for_one_that_is_not() -> None:
    """Time is set aside before the deadline of the other alone, so its limit is the earlier one."""
    promised, other = work("promised", 1.0, 2.0, 0), work("other", 0.1, 3.0, 1)
    promised.is_promised = True
    assert keepable([promised, other], 0.0, [2.0, 0.5]) == [promised]


def test_rest_impossible_deadline_is_no_more_urgent_than_none() -> None:
    scheduler = make(max_batch_tokens=1)
    arrive(scheduler, "running", 10_000, 60.0)
    arrive(scheduler, "honest", 1_000, at=0.1)
    arrive(scheduler, "gaming", 1_000, 1e-6, at=0.2)
    assert end_current(scheduler, 1.2).job_ids == ("honest",)


def test_deadline_passed_is_never_before_one_that_can_be_met() -> None:
    scheduler = make(max_batch_tokens=1)
    arrive(scheduler, "running", 10_000, 60.0)
    arrive(scheduler, "passed", 100, 0.001, at=0.1)
    arrive(scheduler, "can be met", 10_000, 50.0, at=0.2)
    assert end_current(scheduler, 1.2).job_ids == ("can be met",)


def test_one_that_turns_late_while_it_waits_is_behind_one_that_can_be_met() -> None:
    scheduler = make(max_batch_tokens=1)
    arrive(scheduler, "running", 1_000, 0.11)
    arrive(scheduler, "turns late", 2_000, 0.25, at=0.01)
    arrive(scheduler, "can be met", 1_000, 50.0, at=0.02)
    assert end_current(scheduler, 0.1).job_ids == ("can be met",)


def test_rest_one_that_was_cancelled_holds_up_no_slice_of_the_next() -> None:
    scheduler = make(late_patience_s=0.5)
    arrive(scheduler, "running", 100_000, 60.0)
    arrive(scheduler, "gone", 1_000, at=0.1)
    arrive(scheduler, "next", 1_000, at=0.2)
    decision = scheduler.on_event(Cancelled("gone"), 0.3)
    assert decision.wake_at == pytest.approx(0.7)
    granted = scheduler.on_event(TimerFired(), 0.7).dispatch
    assert granted is not None
    assert granted.job_ids == ("next",)


def test_rest_late_ones_have_their_slices_in_turn_and_one_that_comes_to_no_line_at_once() -> None:
    scheduler = make(late_patience_s=0.5, late_share=0.1, late_slice_s=0.05, max_batch_tokens=1)
    arrive(scheduler, "running", 100_000, 60.0)
    for name in ("first", "second"):
        arrive(scheduler, name, 10, at=0.1)

    def granted(at: float) -> float | None:
        """Let the slice come that is due, and its work end; returns when the next is due."""
        work = scheduler.on_event(TimerFired(), at).dispatch
        assert work is not None
        ended = scheduler.on_event(Finished(work.id, frozenset(work.job_ids)), at + 0.002)
        return ended.wake_at

    assert granted(0.6) == pytest.approx(0.6 + 0.05 / 0.1)
    assert granted(1.1) is None
    assert arrive(scheduler, "third", 10, at=1.2).wake_at == pytest.approx(1.2 + 0.5)


def test_rest_late_ones_that_are_packed_and_suspended_keep_their_place() -> None:
    scheduler = make(max_batch_tokens=4_000)
    arrive(scheduler, "running", 10_000, 60.0)
    for name in ("late", "later"):
        arrive(scheduler, name, 10, 1e-6, at=0.1)
    arrive(scheduler, "latest", 3_000, 1e-6, at=0.2)
    packed = end_current(scheduler, 1.01)
    assert packed.job_ids == ("late", "later")
    assert arrive(scheduler, "urgent", 1_000, 0.15, at=1.011).preempted is packed
    arrive(scheduler, "long", 90_000, 60.0, at=1.05)
    assert end_current(scheduler, 1.12).job_ids == ("long",)
    patience_s = scheduler.settings.late_patience_s
    assert scheduler.on_event(TimerFired(), 0.1 + patience_s).dispatch is packed


def test_rest_one_that_is_packed_with_others_keeps_its_place_in_the_line_of_its_class() -> None:
    """Its share has a slice for it soon; in the line of all others a long one is before it."""
    scheduler = make(class_shares={"batch": 0.3}, max_batch_tokens=4_000)
    arrive(scheduler, "running", 1_500, 60.0)
    arrive(scheduler, "hog", 50_000, at=0.05)
    first = arrive(scheduler, "first", 10, at=0.06, service_class="batch").dispatch
    assert first is not None
    scheduler.on_event(Finished(first.id, frozenset({"first"})), 0.062)
    arrive(scheduler, "head", 10, at=0.1)
    arrive(scheduler, "batch", 10, at=0.11, service_class="batch")
    packed = end_current(scheduler, 0.16)
    assert packed.job_ids == ("head", "batch")
    assert arrive(scheduler, "urgent", 90_000, 9.2, at=0.161).preempted is packed
    slice_s = scheduler.settings.late_slice_s
    due = scheduler.on_event(TimerFired(), 0.06 + slice_s / 0.3)
    assert due.dispatch is packed, due.reason


def test_rest_first_of_one_line_that_runs_holds_up_no_slice_of_another() -> None:
    scheduler = make(class_shares={"batch": 0.3}, max_batch_tokens=1)
    arrive(scheduler, "running", 100_000, service_class="batch")
    arrive(scheduler, "other", 90_000, at=0.1)
    due_s = 0.1 + scheduler.settings.late_patience_s
    decision = scheduler.on_event(TimerFired(), 3.0)
    assert (decision.dispatch, decision.wake_at) == (None, pytest.approx(due_s))
    granted = scheduler.on_event(TimerFired(), due_s).dispatch
    assert granted is not None
    assert granted.job_ids == ("other",)


def test_background_runs_last_is_preempted_at_once_and_packed_apart() -> None:
    scheduler = make()
    arrive(scheduler, "background", 100_000, service_class="background")
    decision = arrive(scheduler, "best effort", 90_000, at=0.1)
    assert decision.preempted is not None
    assert decision.preempted.job_ids == ("background",)
    arrive(scheduler, "background 2", 20, 5.0, at=0.2, service_class="background")
    arrive(scheduler, "late", 20, 0.001, at=0.3)
    arrive(scheduler, "late 2", 20, 0.001, at=0.3)
    late = scheduler.current
    assert late is not None
    assert set(late.job_ids) <= {"late", "late 2"}


def test_packing_stops_where_the_device_is_saturated() -> None:
    """With weights to read for 1 ms a prefill under 10 tokens is not worth a pass of its own."""
    scheduler = make(max_batch_tokens=100_000)
    arrive(scheduler, "running", 10_000, 60.0)
    for number in range(4):
        arrive(scheduler, f"long{number}", 2_000, 30.0, at=0.01)
    assert len(end_current(scheduler, 1.0).job_ids) == 1
    for number in range(4):
        arrive(scheduler, f"short{number}", 10, 20.0, at=1.01)
    packed = end_current(scheduler, 1.2)
    assert len(packed.job_ids) == 4


@pytest.mark.parametrize(("tokens", "packs"), [(35, True), (45, False)])
def test_packing_saves_a_fifth_of_the_added_prompts_time(tokens: int, packs: bool) -> None:
    """It saves the millisecond that a run costs besides."""
    scheduler = make(max_batch_tokens=100_000)
    arrive(scheduler, "running", 1_000, 60.0)
    for name in ("head", "added"):
        arrive(scheduler, name, tokens, 30.0, at=0.01)
    assert len(end_current(scheduler, 0.1).jobs) == 1 + packs


@pytest.mark.parametrize(("ttft", "packs"), [(0.0145, False), (0.0155, True)])
def test_packing_leaves_the_head_on_time_a_segment_included(ttft: float, packs: bool) -> None:
    scheduler = make()  # segments of 2 ms
    arrive(scheduler, "running", 100, 0.012)
    arrive(scheduler, "head", 10, ttft)  # of 2 ms, 3 ms for both
    arrive(scheduler, "added", 10, 1.0)
    assert len(end_current(scheduler, 0.01).jobs) == 1 + packs


@pytest.mark.parametrize(("ttft", "packed"), [(0.116, 2), (0.118, 3)])
def test_packing_makes_no_one_late_who_goes_after_it(ttft: float, packed: int) -> None:
    scheduler = make(max_batch_tokens=100)
    arrive(scheduler, "running", 100, 0.012)
    for name, due in (("head", 0.05), ("added", 0.06), ("patient", 1.0)):
        arrive(scheduler, name, 10, due)
    arrive(scheduler, "after", 1_000, ttft)  # of 101 ms, too long to be packed
    assert len(end_current(scheduler, 0.01).jobs) == packed


def test_free_device_goes_to_the_first_that_the_plan_keeps() -> None:
    scheduler = make(max_batch_tokens=1)
    arrive(scheduler, "running", 100, 0.012)
    for name, tokens, due in (("long", 5_000, 0.62), ("a", 1_000, 0.63), ("b", 1_000, 0.64)):
        arrive(scheduler, name, tokens, due)
    order = [end_current(scheduler, at).job_ids[0] for at in (0.011, 0.112, 0.213)]
    assert order == ["a", "b", "long"]


@pytest.mark.parametrize(("tokens", "preempts"), [(4_900, True), (5_500, False)])
def test_rest_running_one_gives_way_to_half_of_what_it_still_needs(
    tokens: int, preempts: bool
) -> None:
    scheduler = make()
    arrive(scheduler, "running", 10_000)
    assert (arrive(scheduler, "newcomer", tokens).preempted is not None) == preempts


def test_promised_one_that_turns_late_is_put_off_by_a_quarter_of_its_objective() -> None:
    scheduler = make(max_batch_tokens=1, max_blocking_s=0.0)
    arrive(scheduler, "running", 10_000, 1.002, at=5.0, is_promised=True)
    arrive(scheduler, "late", 1_000, 0.4, at=5.0, is_promised=True, weight=1e-9)
    scheduler.on_event(TimerFired(), 5.31)
    assert scheduler._prefills["late"].deadline_s == pytest.approx(5.5)


def test_packing_does_not_make_the_one_late_that_gives_way() -> None:
    scheduler = make()
    arrive(scheduler, "running", 5_000, 0.512)
    for number in range(30):
        arrive(scheduler, f"patient{number}", 10, 10.0)
    packed = arrive(scheduler, "urgent", 10, 0.04, at=0.1).dispatch
    victim = scheduler._prefills["running"]
    assert packed is not None
    assert packed.job_ids[0] == "urgent"
    assert 0.1 + packed.predicted_s + victim.remaining_s <= victim.deadline_s


def test_timer_is_asked_for_when_a_deadline_rests_on_a_prediction() -> None:
    scheduler = make(max_batch_tokens=1)
    arrive(scheduler, "running", 1_000, 60.0)
    assert arrive(scheduler, "second", 100, 1.0, at=0.01).dispatch is None
    decision = arrive(scheduler, "third", 100, 30.0, at=0.02)
    assert decision.dispatch is None
    assert decision.wake_at is not None
    assert decision.wake_at < 1.0
    later = scheduler.on_event(TimerFired(), decision.wake_at)  # it overran
    assert later.dispatch is not None
    assert later.dispatch.job_ids == ("second",)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"a": 0.0}, "'a'"),
        ({"a": 1.0}, "'a'"),
        ({"background": 0.1}, "background"),
        ({"a": 0.6, "b": 0.4}, "less than 1"),
    ],
)
def test_class_shares_that_cannot_be_kept_are_refused(
    shares: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SchedulerSettings(class_shares=shares)


def test_protected_one_is_not_given_up_for_many_short_ones() -> None:
    def order(**shares: float) -> list[str]:
        scheduler = make(max_batch_tokens=1, class_shares=shares)
        arrive(scheduler, "running", 1_000, 60.0)
        arrive(scheduler, "long", 8_000, 4.0, at=0.01, service_class="search")
        for number in range(75):
            arrive(scheduler, f"short{number}", 500, 3.9, at=0.02)
        at, ended = 0.1, []
        for _ in range(76):
            at += work.predicted_s if (work := scheduler.current) is not None else 0.0
            ended += end_current(scheduler, at).job_ids if at < 4.0 else ()
        return ended

    assert "long" not in order()
    assert "long" in order(search=0.3)


def test_packing_leaves_protected_ones_what_is_spare_besides_what_is_packed() -> None:
    """A packed prefill is to end by the earliest deadline of its protected ones."""
    settings = SchedulerSettings(
        class_shares={"api": 0.3}, late_share=0.1, late_slice_s=0.02, max_blocking_s=0.002
    )
    shares = GuaranteedShares(settings)
    soon, later, other = work("soon", 0.1, 2.0, 0), work("later", 0.5, 5.0, 1), work("x", 9.0, 9, 2)
    for one in (soon, later):
        one.jobs[0].service_class = "api"
        shares.note(one, 0.0)
    end_s = (0.1 + 0.5 + 4 * 0.002) / 0.3  # on the class's own device
    spare_s = {2.0: 0.88 * (2.0 - 0.022) - 0.1}  # 0.88: less late_share, twice a segment a slice
    spare_s[5.0] = 0.88 * (5.0 - 0.022) - 0.6 - 0.3 * (5.0 - 0.022 - end_s)

    def room_s(*members: Work) -> float:
        """Return how long a prefill of them may take, to a millisecond."""
        return sum(shares.have_room(members, number / 1000) for number in range(8000)) / 1000

    assert shares.spare_s(0.0) == pytest.approx(spare_s[2.0])
    assert room_s(soon, other) == pytest.approx(0.1 + spare_s[2.0], abs=2e-3)
    assert room_s(later, other) == pytest.approx(0.5 + spare_s[5.0], abs=2e-3)
    assert room_s(other, later, soon) == pytest.approx(0.1 + spare_s[2.0], abs=2e-3)
    assert room_s(other) == 8.0, "it may be suspended"
    assert shares.spare_s(1.9) < 0.0
    assert room_s(soon) == pytest.approx(0.1, abs=2e-3)
    assert room_s(later, other) > 1.0
