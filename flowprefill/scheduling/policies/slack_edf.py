"""The default policy: keeps as many prefills on time as can be, and preempts only for that."""

from __future__ import annotations

import math
from operator import attrgetter
from typing import TYPE_CHECKING

from flowprefill.scheduling.policies.base import BasePolicy, Packing
from flowprefill.scheduling.policies.forecast import Forecast
from flowprefill.scheduling.policies.late_line import LateLines
from flowprefill.scheduling.policies.planning import keepable, plan
from flowprefill.scheduling.policies.shares import NO_TIME_S, GuaranteedShares
from flowprefill.scheduling.policies.tenant_clock import TenantClock
from flowprefill.scheduling.reasons import Reason
from flowprefill.scheduling.work import UNRANKED, Rank, Verdict, Work

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from flowprefill.scheduling.cost_model import CostModel
    from flowprefill.scheduling.interface import SchedulerSettings

ON_TIME, REST, BEHIND = 0.0, 1.0, 2.0  # bands, served in this order; BEHIND is background
OVERTAKING = 16.0  # the rest go by arrival + this many times their own time
SLACK_TO_SPEND = 0.25  # waiting for a running work may cost this share of the slack, not all
MUCH_SHORTER = 0.5  # without deadlines at stake, preempt for at most this share of what is left
PACKING_GAIN = 0.2  # share of its own time that packing must save
RENEWAL = 1.25  # a promise that cannot be kept is made anew for so many times its objective
MIN_LOOK_S = 1e-3  # how soon a verdict that rests on a prediction is looked at again
DEADLINE = attrgetter("deadline_s")


class SlackEdf(BasePolicy):
    """On time first, by deadline, as many as can be kept; then the rest; then background.

    *On time* is a prefill that can still meet its deadline by prediction if it runs now; to suspend
    one that is on time, if it runs one segment later. The plan: the running one, if it is on time,
    and those of the first 16 waiting that are, one after another by deadline; where one would end
    late, the one with the most time per weight is given up (`planning.plan`). Time is set aside for
    arrivals that are likely to be due sooner (`Forecast`).

    The rest, late or without a deadline, go by arrival + 16 times their own predicted time, the
    online correction left out: equal ones in order of arrival, shorter ones earlier, and none is
    overtaken by one that arrives more than 16 of its own times later. A late one is no more urgent
    than one without a deadline, so that asking for the impossible gains nothing. Where a tenant
    sends more than one device can serve, its prefills count from when a device of its own would
    come to them (`TenantClock`), and of equally long ones the plan gives up its first.

    A promised one (`Job.is_promised`) that turns late stays among those on time, its objective
    longer by a quarter, and again if need be: others pass it for a while, those admitted later not
    for ever.

    Preemption of a prefill that
      - is on time: if the plan gives it up, or if it would take more than a quarter of the slack of
        one the plan puts before it, were it as late as one in ten was lately;
      - is late or best effort: at once for any that is on time, else only for one that is before
        it and needs at most half of what it still needs;
      - is background: at once for any that is not.
    One suspended for other prefills max_suspensions times goes on for late_slice_s each time
    before it is suspended for one again.

    Promises, decode steps aside, by prediction: what a class's guaranteed share protects is on time
    (`GuaranteedShares`); who is late or best effort, background aside, ends within the bound of
    `LateLines` plus the longest prefill that is granted no slice.

    Source: own, after the paper's S-EDF.
    """

    name = "slack_edf"

    def __init__(self, cost_model: CostModel, settings: SchedulerSettings) -> None:
        super().__init__(cost_model, settings)
        self._forecast = Forecast()
        self._shares = GuaranteedShares(settings)
        self._lines = LateLines(settings, self._shares)
        self._tenants = TenantClock()

    def rank(self, work: Work, now: float) -> Rank:
        """Order by band, then deadline or arrival and length."""
        if work.serial < 0:  # one that is only asked about
            work.fair_arrival_s = self._tenants.start_s(work)
        elif work.rank is UNRANKED and not work.is_started:
            self._note_arrival(work, now)
        elif work.is_started:
            self._shares.adopt(work)
        if work.is_background:
            return Rank((BEHIND, _rest_key(work)))
        self._renew(work, now)
        latest = work.latest_start_s
        if now < latest < math.inf:
            return Rank((ON_TIME, work.deadline_s), latest)
        if not work.is_in_line and work.serial >= 0:
            self._lines.add(work, now)
        return Rank((REST, _rest_key(work)))

    def pick(self, waiting: Sequence[Work], now: float) -> Work:
        """Return who is granted a slice, who must go now, or the first that can be kept on time."""
        first, grant_at = self._lines.next_grant()
        if first is not None and grant_at <= now:
            self._lines.grant(first, grant_at)
            return first
        spare_s, protected = self._shares.spare_s(now), self._shares.first()
        if spare_s <= NO_TIME_S and protected is not None:
            return protected
        on_time = self._on_time(waiting, now)
        return plan(on_time, now, now, self._forecast)[0] if on_time else waiting[0]

    def should_preempt(self, current: Work, waiting: Sequence[Work], now: float) -> Verdict:
        """Weigh what waiting costs against what preempting costs."""
        is_asked = waiting[0].serial < 0  # what it would do, if that one waited
        slice_end = self._slice_end(current, now, begins=not is_asked)
        if slice_end > now:
            return Verdict(False, Reason.HAS_SLICE, slice_end)
        if current.is_decode:
            verdict = self._weigh_step(current, waiting, now)
        else:
            verdict = self._weigh_protected(current, waiting, now)
        verdict, granted_at = self._weigh_grant(current, verdict, now)
        if verdict.by is not None and granted_at < math.inf and not is_asked:
            self._lines.grant(verdict.by, granted_at)
        return verdict

    def batch(self, head: Work, waiting: Iterable[Work], now: float) -> list[Work]:
        """Pack while all members meet their deadlines and it saves time; each band apart."""
        packing = Packing(head, self.cost_model, self.settings)
        self._shares.spare_s(now)  # for have_room
        band = head.rank.key[0]
        on_time = band == ON_TIME
        end_by = head.deadline_s if on_time else math.inf
        for work in waiting:
            if packing.is_full or work.rank.key[0] > band:
                break
            if work is head or work.rank.key[0] < band:
                continue
            if packing.fits(work):
                seconds = packing.seconds_with(work)
                gain = packing.seconds + work.remaining_s - seconds
                deadline = min(end_by, work.deadline_s) if on_time else math.inf
                in_time = now + seconds + self.settings.max_blocking_s <= deadline
                is_gain = in_time and gain >= PACKING_GAIN * work.remaining_s
                if is_gain and self._shares.have_room((*packing.members, work), seconds):
                    end_by = deadline
                    packing.add(work)
                    continue
            latest = work.deadline_s - work.remaining_s
            if on_time and now + packing.seconds <= latest:
                end_by = min(end_by, latest)  # it goes after this prefill: don't make it miss
        return packing.members

    def course(self, waiting: Sequence[Work], now: float) -> Sequence[Work]:
        """Put those first that can all be on time, and promised ones, then the rest.

        As `rank` and `pick` do, but for what only arrivals bring about, and slices for late ones.
        """
        hopeful = [
            work
            for work in waiting
            if now < work.deadline_s - work.remaining_s < math.inf and not work.is_background
        ]
        hopeful.sort(key=DEADLINE)
        kept = keepable(hopeful, now, [work.deadline_s for work in hopeful])
        first = {work: None for work in waiting if work.is_promised} | dict.fromkeys(kept)
        rest = sorted((work for work in waiting if work not in first), key=_order_of_rest)
        return [*sorted(first, key=DEADLINE), *rest]

    def _note_arrival(self, work: Work, now: float) -> None:
        self._tenants.note(work, now)
        if not work.is_background:
            self._forecast.note(work, now)
            self._shares.note(work, now)

    def _weigh_protected(self, current: Work, waiting: Sequence[Work], now: float) -> Verdict:
        self._shares.adopt(current)
        spare_s, protected = self._shares.spare_s(now), self._shares.first()
        if spare_s <= NO_TIME_S and protected is not None and protected is not current:
            return Verdict(True, Reason.GUARANTEED, by=protected)
        verdict = self._weigh(current, waiting, now)
        if protected is current and verdict.by is not None:  # protected too, perhaps, but due later
            if verdict.by.remaining_s + 2 * self.settings.max_blocking_s > spare_s:
                return Verdict(False, Reason.RUNNING_IS_GUARANTEED)
        elif protected is not None and protected is not current:
            again_at = now + max(spare_s, MIN_LOOK_S)
            return verdict._replace(again_at=min(verdict.again_at, again_at))
        return verdict

    def _renew(self, work: Work, now: float) -> None:
        """Move a deadline that cannot be met: to the next job's; a promised one to where it can."""
        if work.serial < 0 or not work.deadline_s < math.inf:
            return
        if not work.is_promised:
            if now >= work.latest_start_s:
                later = (job.ttft_deadline_s for job in work.jobs)
                can_be = [at for at in later if now + work.remaining_s < at < math.inf]
                work.deadline_s = min(can_be, default=work.deadline_s)
            return
        least_s = now + work.remaining_s + self.settings.max_blocking_s
        objective_s = max(work.deadline_s - work.arrival_s, MIN_LOOK_S)
        while work.deadline_s <= least_s:
            objective_s *= RENEWAL
            work.renewals += 1
            work.deadline_s = work.arrival_s + objective_s

    def _weigh(self, current: Work, waiting: Sequence[Work], now: float) -> Verdict:
        if now + current.remaining_s > current.deadline_s:
            self._renew(current, now)
        can_meet = now + current.remaining_s <= current.deadline_s < math.inf
        if current.is_background or not can_meet:
            return self._weigh_rest(current, waiting, now)
        on_time = self._on_time(waiting, now + self.settings.max_blocking_s)
        if not on_time:
            return Verdict(False, Reason.NONE_CAN_BE_ON_TIME)
        place = sum(work.deadline_s < current.deadline_s for work in on_time)
        start_s = now + (self.settings.max_blocking_s if place else 0.0)
        works = [*on_time[:place], current, *on_time[place:]]
        kept = plan(works, start_s, now, self._forecast)
        if current not in kept:
            return Verdict(True, Reason.GIVEN_UP, by=kept[0])
        return self._weigh_kept(current, kept, now)

    def _weigh_kept(self, current: Work, kept: Sequence[Work], now: float) -> Verdict:
        """Preempt if one that is planned before the running work would miss after it."""
        longest_s = current.remaining_s * self.cost_model.overrun("prefill")
        blocking = max(self.settings.max_blocking_s, MIN_LOOK_S)
        slack = math.inf
        before_s = 0.0
        for work in kept:
            if work is current:
                break
            before_s += work.remaining_s
            slack = min(slack, work.deadline_s - before_s - now)
        if longest_s > SLACK_TO_SPEND * slack:
            return Verdict(True, Reason.TAKES_SLACK, by=kept[0])
        # The running work may take longer than predicted: look again in time.
        again_at = now + max(slack - 3 * blocking, blocking)
        return Verdict(False, Reason.ENDS_IN_TIME, again_at)

    def _weigh_rest(self, current: Work, waiting: Sequence[Work], now: float) -> Verdict:
        """Weigh a running work that meets no deadline."""
        on_time = self._on_time(waiting, now)
        if on_time:
            kept = plan(on_time, now + self.settings.max_blocking_s, now, self._forecast)
            return Verdict(True, Reason.CAN_BE_ON_TIME, by=kept[0])
        first, mine = waiting[0], self.rank(current, now).key
        if first.rank.key[0] < mine[0]:
            return Verdict(True, Reason.BACKGROUND_YIELDS, by=first)
        is_before = (first.rank.key, first.priority) < (mine, current.priority)
        if is_before and first.remaining_s <= MUCH_SHORTER * current.remaining_s:
            return Verdict(True, Reason.MUCH_SHORTER, by=first)
        return Verdict(False, Reason.NO_DEADLINE_AT_STAKE)

    def _weigh_step(self, step: Work, waiting: Sequence[Work], now: float) -> Verdict:
        """Suspend a decode step if that saves more deadlines than it costs sequences their pace."""
        start_s = now + self.settings.max_blocking_s
        kept = plan(self._on_time(waiting, start_s), start_s, now, self._forecast)
        at = now
        saved = 0
        for work in kept:
            if work.deadline_s >= step.deadline_s:
                break
            at += work.remaining_s
            saved += step.remaining_s > work.deadline_s - at
        ends_at = now + step.remaining_s
        lost = 0
        if ends_at <= step.deadline_s < at + step.remaining_s:
            lost = sum(job.tpot_s < math.inf for job in step.jobs)
        if saved > lost or (saved == lost > 0 and at < ends_at):
            return Verdict(True, Reason.STEP_COSTS_DEADLINES, by=kept[0])
        return Verdict(False, Reason.STEP_RUNS)

    def _weigh_grant(self, current: Work, verdict: Verdict, now: float) -> tuple[Verdict, float]:
        """Give way to the first in line when its slice has come; else look again when it has.

        Returns:
            What to do, and when the slice came that is granted; inf: none is.
        """
        first, grant_at = self._lines.next_grant()
        if first is None or first is current:
            return verdict, math.inf
        if grant_at > now:
            return verdict._replace(again_at=min(verdict.again_at, grant_at)), math.inf
        needed = min(first.remaining_s, self.settings.late_slice_s)
        ends_at = now + current.remaining_s
        is_lost = any(ends_at <= job.ttft_deadline_s < ends_at + needed for job in current.jobs)
        if verdict.preempt or not (current.is_decode or is_lost):
            return Verdict(True, Reason.GRANTED_SLICE, by=first), grant_at
        return verdict, math.inf

    def _slice_end(self, current: Work, now: float, *, begins: bool) -> float:
        """Return until when no prefill suspends the running work; -inf if one may."""
        end = self._lines.slice_end(current, now, begins=begins)
        if current.prefill_suspensions >= self.settings.max_suspensions:
            end = max(end, now + self.settings.late_slice_s - current.stretch_s)
        return end

    def _on_time(self, waiting: Sequence[Work], start_s: float) -> Sequence[Work]:
        """Return those that meet their deadlines if they begin at `start_s`; they are in order."""
        return [w for w in waiting if w.rank.key[0] == ON_TIME and start_s < w.rank.until]


def _rest_key(work: Work) -> float:
    """Return what a late one, or one without a deadline, goes by."""
    return work.fair_arrival_s + OVERTAKING * work.nominal_s


def _order_of_rest(work: Work) -> tuple[bool, float]:
    return work.is_background, _rest_key(work)
