"""Admission: each bound, what the refusal says, and how far predictions are stretched."""

from __future__ import annotations

import math

import hand_made
import pytest

from flowprefill.scheduling import CostModel, Job, MachineRates, ModelShape, Scheduler, Work
from flowprefill.scheduling.admission import (
    AdmissionLimits,
    PrefillShare,
    Queued,
    TenantBook,
    lateness_of,
    overload_of,
    tenant_overload_of,
)
from flowprefill.scheduling.interface import Arrival, TimerFired
from flowprefill.scheduling.outlook import Outlook, work_s

BUSY = Queued(5, 500, 10.0)


def test_nothing_waiting_is_never_overload() -> None:
    limits = AdmissionLimits(max_waiting=1, max_waiting_tokens=50, max_backlog_s=1.0)
    assert overload_of(Queued(), limits, 100) is None
    assert overload_of(Queued(5, 5_000_000, 1e6), AdmissionLimits(), 100) is None, "no such bounds"


@pytest.mark.parametrize(
    ("limits", "reason", "message", "retry_s"),
    [
        (AdmissionLimits(max_waiting=5), "waiting", "5 requests are waiting, at most 5", 2.0),
        (AdmissionLimits(max_waiting=3), "waiting", "5 requests are waiting, at most 3", 6.0),
        (AdmissionLimits(max_waiting_tokens=550), "tokens", "over 550", 1.0),
        (AdmissionLimits(max_waiting_tokens=50), "tokens", "over 50", 10.0),
        (AdmissionLimits(max_backlog_s=9.0), "backlog", "10.0 s of work", 1.0),
    ],
)
def test_overload_names_the_bound_and_says_when_there_is_room(
    limits: AdmissionLimits, reason: str, message: str, retry_s: float
) -> None:
    refusal = overload_of(BUSY, limits, 100)
    assert refusal is not None
    assert (refusal.reason, refusal.retry_after_s) == (reason, pytest.approx(retry_s))
    assert message in refusal.message


def test_tenant_may_use_its_share_of_each_bound() -> None:
    limits = AdmissionLimits(100, 1000, 20.0, tenant_share=0.4)
    assert tenant_overload_of(Queued(39, 399, 7.9), limits, "a", 1) is None
    for queued in (Queued(40, 1, 1.0), Queued(1, 400, 1.0), Queued(1, 1, 8.1)):
        refusal = tenant_overload_of(queued, limits, "a", 1)
        assert refusal is not None
        assert refusal.reason == "tenant"
        assert "of tenant 'a'" in refusal.message


def test_tenant_may_have_one_waiting_however_small_its_share() -> None:
    limits = AdmissionLimits(20, tenant_share=0.01)
    assert tenant_overload_of(Queued(), limits, "a", 1) is None
    assert tenant_overload_of(Queued(1, 1, 0.1), limits, "a", 1) is not None


def test_late_job_is_told_its_wait_or_that_it_is_no_use() -> None:
    job = Job("a", 10.0, 100, 0, 10.5)
    assert lateness_of(job, Outlook(0.5, 0.1, 0), 10.0) is None
    late = lateness_of(job, Outlook(0.6, 0.1, 0), 10.0)
    assert late is not None
    assert "predicted in 0.600 s, due in 0.500 s" in late.message
    assert late.retry_after_s == pytest.approx(0.1)
    kept_free = Outlook(0.45, 0.1, 0, margin_s=0.1)
    close = lateness_of(job, kept_free, 10.0)
    assert close is not None
    assert "due in 0.500 s, of which 0.100 s are kept free" in close.message
    assert close.retry_after_s == pytest.approx(0.05)
    harm = lateness_of(job, Outlook(0.2, 0.1, 2, 0.7), 10.0)
    assert harm is not None
    assert "2 admitted requests" in harm.message
    assert harm.retry_after_s == 0.7
    hopeless = lateness_of(job, Outlook(9.0, 0.7, 0), 10.0)
    assert hopeless is not None
    assert hopeless.retry_after_s == math.inf


def test_limits_bad_value_names_field() -> None:
    with pytest.raises(ValueError, match="max_waiting: got 0"):
        AdmissionLimits(max_waiting=0)
    with pytest.raises(ValueError, match="tenant_share: got 0"):
        AdmissionLimits(tenant_share=0)


def test_stretch_follows_the_time_that_others_take_while_prefills_wait() -> None:
    share = PrefillShare()
    assert share.stretch == 1.0
    now = 0.0
    for _ in range(400):  # 30 ms of prefill, then 70 ms of decode, over and over
        share.note(now := now + 0.03, is_prefilling=True, is_waiting=True)
        share.note(now := now + 0.07, is_prefilling=False, is_waiting=True)
    assert share.stretch == pytest.approx(1 / 0.3, rel=0.05)
    share.note(now + 1000, is_prefilling=False, is_waiting=False)
    assert share.stretch == pytest.approx(1 / 0.3, rel=0.05), "nothing waited: nothing was learnt"
    share.note(now + 1040, is_prefilling=True, is_waiting=False)
    assert share.stretch == pytest.approx(1.0, abs=0.05)


def test_stretch_is_bounded() -> None:
    share = PrefillShare()
    share.note(0.0, is_prefilling=False, is_waiting=True)
    share.note(1e6, is_prefilling=False, is_waiting=True)
    assert share.stretch == 20.0


def test_tenant_book_forgets_who_has_nothing_waiting() -> None:
    book = TenantBook()
    book.enter("a", 100, 2.0)
    book.enter("a", 50, 1.0)
    assert book.of("a", 2.0) == Queued(2, 150, 6.0)
    assert book.of("b", 2.0) == Queued()
    book.leave("a", 100, 2.0)
    assert book.of("a", 1.0) == Queued(1, 50, 1.0)
    book.leave("a", 50, 1.0)
    assert book.of("a", 1.0) == Queued()
    assert book._queued == {}


# 1 ms per token, nothing else.
SHAPE = ModelShape(1e6, 1.0, 1e-9, 1e-9, 1e-9)
RATES = MachineRates(1e9, 1e12, 1e12, 1e-9)


def scheduler(policy: str) -> Scheduler:
    return Scheduler(policy, CostModel(SHAPE, RATES, is_calibrated=True))


def arrive(scheduler: Scheduler, now: float, name: str, tokens: int, due_s: float) -> None:
    scheduler.on_event(Arrival(Job(name, now, tokens, 0, due_s)), now)


def test_outlook_counts_whom_a_newcomer_would_make_late() -> None:
    one = scheduler("edf")
    arrive(one, 0.0, "running", 1000, 2.0)
    arrive(one, 0.0, "tight", 1000, 2.1)
    arrive(one, 0.0, "loose", 1000, 9.0)
    later = one.outlook(Job("new", 0.5, 1000, 0, 5.0), 0.5, 1.0)
    assert later.ttft_s == pytest.approx(2.5, rel=1e-3)
    assert (later.made_late, later.alone_s) == (0, pytest.approx(1.0, rel=1e-3))
    urgent = one.outlook(Job("new", 0.5, 1000, 0, 1.6), 0.5, 1.0)
    assert urgent.ttft_s == pytest.approx(1.0, rel=1e-3)
    assert urgent.made_late == 2, "the running and the tight one"


def test_outlook_keeps_two_segments_free_but_no_more_than_a_tenth_of_the_objective() -> None:
    one = scheduler("slack_edf")
    for objective_s, margin_s in ((1.0, 0.004), (0.01, 0.001)):
        outlook = one.outlook(Job("new", 50.0, 1, 0, 50.0 + objective_s), 50.0, 1.0)
        assert outlook.margin_s == pytest.approx(margin_s)


def test_outlook_keeps_free_what_errors_of_late_ask_for_but_at_most_a_quarter() -> None:
    """One in five took 1.4 times as long; errors of works are independent."""
    one = scheduler("slack_edf")
    for number in range(60):
        one.cost_model.observe("prefill", 1.0, 1.4 if number % 5 == 0 else 1.0)
    arrive(one, 0.0, "running", 900, 3.0)
    arrive(one, 0.0, "second", 900, 3.5)
    ahead_s = [work.predicted_s for work in one._prefills.values()]
    late = one.outlook(Job("new", 0.0, 10, 0, 20.0), 0.0, 1.0)
    assert late.margin_s == pytest.approx(0.004 + 0.4 * math.hypot(*ahead_s))
    early = one.outlook(Job("new", 2.9, 10, 0, 3.6), 0.0, 1.0)
    assert early.margin_s == pytest.approx(0.004 + 0.25 * 0.7)


def test_outlook_counts_what_waits_elsewhere_as_ahead() -> None:
    one = scheduler("slack_edf")
    arrive(one, 0.0, "running", 1000, 3.0)
    outlook = one.outlook(Job("new", 0.0, 1000, 0, 20.0), 0.0, 1.5, 0.7)
    assert outlook.ttft_s == pytest.approx(1.5 * (1.0 + 0.7 + 1.0), rel=1e-3)


@pytest.mark.parametrize(("tokens", "harm"), [(44, 0), (47, 1)])
def test_outlook_leaves_promised_ones_what_is_kept_free_of_them(tokens: int, harm: int) -> None:
    """Two of a second are done 50 ms before the second's deadline, of which 4 ms are kept free."""
    one = scheduler("slack_edf")
    for name, due_s in (("running", 1.9), ("promised", 2.05)):
        one.on_event(Arrival(Job(name, 0.0, 1000, 0, due_s, is_promised=True)), 0.0)
    new = Job("new", 0.0, tokens, 0, 1.5)
    assert one.outlook(new, 0.0, 1.0).made_late == harm


def test_outlook_decides_nothing() -> None:
    one, other = scheduler("slack_edf"), scheduler("slack_edf")
    for each in (one, other):
        arrive(each, 0.0, "running", 1000, 5.0)
        arrive(each, 0.0, "late", 1000, 0.5)
    for tokens in (10, 1000, 5000):
        one.outlook(Job("new", 0.2, tokens, 0, 1.0), 0.2, 1.0)
    assert str(one.on_event(TimerFired(), 1.5)) == str(other.on_event(TimerFired(), 1.5))
    assert one.load().backlog_s == pytest.approx(other.load().backlog_s)
    assert one.load().waiting_jobs == other.load().waiting_jobs == 1


def test_questions_grant_no_slice() -> None:
    """The first in line is due a slice when one asks: it gets it at the next event, as without."""
    one, other = scheduler("slack_edf"), scheduler("slack_edf")
    for each in (one, other):
        arrive(each, 0.0, "running", 9000, 20.0)
        arrive(each, 0.0, "late", 1000, math.inf)
    late, at = one._prefills["late"].jobs[0], 5.5  # its patience ends at 5 s
    one.outlook(Job("new", at, 10, 0, math.inf), at, 1.0)
    one.predicted_ttft_s(Job("new", at, 10, 0, math.inf), at)
    one.predicted_ttft_s(late, at)
    policies = [each.policy for each in (one, other)]
    granted = [policy._lines._granted for policy in policies]  # type: ignore[attr-defined]
    assert granted == [-1, -1]
    assert str(one.on_event(TimerFired(), at)) == str(other.on_event(TimerFired(), at))


def test_questions_begin_no_slice() -> None:
    """Of one that was granted it while nothing else waited; it has all of it when others come."""
    one, other = (hand_made.make(class_shares={"batch": 0.3}) for _ in range(2))
    for each in (one, other):
        hand_made.arrive(each, "granted", 10_000, service_class="batch")
    one.outlook(hand_made.job("new", 10, at=0.01), 0.01, 1.0)
    decisions = [str(hand_made.arrive(each, "urgent", 100, 0.2, at=0.02)) for each in (one, other)]
    assert decisions[0] == decisions[1]
    assert "wake_at=0.07" in decisions[0]


def test_outlook_of_best_effort_in_a_long_queue_counts_all_of_it() -> None:
    one = scheduler("slack_edf")
    for index in range(1500):
        arrive(one, 0.0, f"r{index}", 10, 1000.0 + index)
    outlook = one.outlook(Job("new", 0.0, 10), 0.0, 2.0)
    assert outlook.ttft_s == pytest.approx(2 * 15.01, rel=0.01)


def given_up_for_four() -> Scheduler:
    """Half a second runs; one of a second cannot be on time together with four of 0.2 s."""
    one = hand_made.make()
    hand_made.arrive(one, "running", 5_000, 1.0)
    hand_made.arrive(one, "long", 10_000, 1.6)
    for number in range(4):
        hand_made.arrive(one, f"short{number}", 2_000, 1.7)
    return one


def test_prediction_puts_what_the_plan_gives_up_behind_what_it_keeps() -> None:
    one = given_up_for_four()
    jobs = one._jobs
    wait_s = {name: one.predicted_ttft_s(jobs[name], 0.0) for name in jobs}
    assert wait_s["short3"] == pytest.approx(1.3, rel=0.02)
    assert wait_s["long"] == pytest.approx(2.3, rel=0.02)
    new = Job("new", 0.0, 1_000, 0, 1.75)
    assert one.predicted_ttft_s(new, 0.0) == pytest.approx(1.4, rel=0.02)
    assert one.predicted_ttft_s(Job("none", 0.0, 100), 0.0) == pytest.approx(1.31, rel=0.02)


def test_outlook_counts_no_harm_to_one_that_is_given_up_already() -> None:
    one = given_up_for_four()
    new = Job("new", 0.0, 1_000, 0, 1.8, is_promised=True)
    outlook = one.outlook(new, 0.0, 1.0)
    assert outlook.ttft_s == pytest.approx(1.4, rel=0.02)
    assert outlook.made_late == 0
    much = one.outlook(Job("new", 0.0, 5_200, 0, 1.8, is_promised=True), 0.0, 1.0)
    assert much.ttft_s == pytest.approx(1.62, rel=0.02)
    assert much.made_late == 1, "one of the four makes room"


def test_course_puts_background_last_and_late_promised_ones_by_their_deadlines() -> None:
    policy = hand_made.make().policy
    names = ("late", "background", "kept", "promised")
    late, background, kept, promised = (
        Work([Job(name, 0.0, 1, 0, deadline)], serial, 1.0)
        for serial, (name, deadline) in enumerate(zip(names, (0.5, 9.0, 9.0, 0.9), strict=True))
    )
    background.is_background = promised.is_promised = True
    course = policy.course([late, background, kept, promised], 0.0)
    assert course == [promised, kept, late, background]


def test_work_of_many_choices_is_their_prompts_and_full_decode_steps() -> None:
    model = CostModel(SHAPE, RATES, is_calibrated=True)
    # A step of 4 rows takes 4 ms: 100 + 200 tokens of prompt, then 8 choices of 50 tokens.
    seconds = work_s(model, [100, 200], [50] * 8, 4)
    assert seconds == pytest.approx(0.3 + 100 * 0.004, rel=1e-3)
