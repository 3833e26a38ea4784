"""The default policy: slack-aware EDF that preempts only where it changes who is on time."""

from __future__ import annotations

import heapq
import math
from itertools import count
from typing import TYPE_CHECKING

from flowprefill.scheduling.policies.base import BasePolicy, Packing
from flowprefill.scheduling.work import Rank, Verdict, Work

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from flowprefill.scheduling.cost_model import CostModel
    from flowprefill.scheduling.interface import SchedulerSettings

ON_TIME, LATE, BEST_EFFORT = 0.0, 1.0, 2.0  # bands, served in this order
SLACK_TO_SPEND = 0.25  # waiting for a running work may cost this share of the slack, not all
PACKING_GAIN = 0.2  # share of its own time that packing must save
MUCH_SHORTER = 0.5  # without deadlines at stake, preempt for at most this share of what is left


class SlackEdf(BasePolicy):
    """On time first, by deadline; then late ones, then best effort, the shortest first.

    *On time* is who can still meet its deadline by prediction if it ran now. Among those, when
    not all can be kept, the choice that keeps most of them (Moore-Hodgson on the first waiting).

    No starvation. Late and best-effort works that have waited for late_patience_s also form a
    line, in the order in which they turned late (best effort: arrived). However busy the device
    is with works on time, the first in line is granted a slice of late_slice_s in every
    late_slice_s / late_share; in it no prefill preempts it. A grant that must wait for the
    running work is made up for afterwards. So, decode steps aside, who turns late at t has
    finished by

        t + late_patience_s + (predicted time of all in line up to itself) / late_share
          + one slice for each of those + the longest work that is granted no slice

    Preemption. Only for works strictly before the running one; for one that is on time only if
    waiting for the running work to end would take more than a quarter of its slack (those before it
    counted; a quarter, as predictions err and others arrive) and it meets its deadline if not, and
    only if more are saved so than victims lost (or as many, by less work than what the running one
    still needs). Without deadlines at stake, only for one that needs at most half of what the
    running one still needs. A work suspended for other prefills max_suspensions times, or
    max_suspended_s in all, is not suspended for one again.

    Source: own, after the paper's S-EDF.
    """

    name = "slack_edf"

    def __init__(self, cost_model: CostModel, settings: SchedulerSettings) -> None:
        super().__init__(cost_model, settings)
        self._line: list[tuple[float, int, Work]] = []  # heap of (late since, number, work)
        self._records = count()
        self._compact_at = 64
        self._next_grant_s = -math.inf
        self._granted = -1  # serial of the work whose slice has come
        self._slice_left_from_s: float | None = None  # its executed_s at which the slice ends

    def rank(self, work: Work, now: float) -> Rank:
        """Order by band, then deadline or remaining time."""
        if self._is_on_time(work, now):
            latest = work.latest_start_s(self.settings.max_blocking_s)
            return Rank((ON_TIME, work.deadline_s), latest)
        if not work.is_in_line and work.serial >= 0:
            work.is_in_line = True
            if work.late_since_s is None:
                work.late_since_s = now
            heapq.heappush(self._line, (work.late_since_s, next(self._records), work))
            self._compact_line()
        band = LATE if work.deadline_s < math.inf else BEST_EFFORT
        return Rank((band, work.remaining_s))

    def pick(self, waiting: Sequence[Work], now: float) -> Work:
        """Return who is granted a slice, or the first of those that can be kept on time."""
        first = self._first_in_line()
        if first is not None and self._grant_at(first) <= now and first.version >= 0:
            self._granted, self._slice_left_from_s = first.serial, None
            return first
        kept = self._keepable(waiting, now)
        return kept[0] if kept else waiting[0]

    def should_preempt(self, current: Work, waiting: Sequence[Work], now: float) -> Verdict:
        """Weigh what waiting costs against what preempting costs."""
        if self._is_settled(current):
            return Verdict(False, "the running work was suspended as often or long as it may be")
        slice_end = self._slice_end(current, now)
        if slice_end > now:
            return Verdict(False, "the running work was granted a slice", slice_end)
        mine = self._current_key(current, now)
        ahead = [e for e in waiting if (e.rank.key, e.priority) < (mine, current.priority)]
        verdict = self._weigh_all(current, ahead, mine, now)
        return self._weigh_grant(current, verdict, now)

    def batch(self, head: Work, waiting: Iterable[Work], now: float) -> list[Work]:
        """Pack while all members meet their deadlines and it saves time; the late apart."""
        packing = Packing(head, self.cost_model, self.settings)
        on_time = self._is_on_time(head, now)
        end_by = head.deadline_s if on_time else math.inf
        for work in waiting:
            if packing.is_full:
                break
            if work.rank.key[0] > head.rank.key[0]:
                break
            if work is head or self._is_on_time(work, now) != on_time:
                continue
            if packing.fits(work):
                seconds = packing.seconds_with(work)
                gain = packing.seconds + work.remaining_s - seconds
                deadline = min(end_by, work.deadline_s) if on_time else math.inf
                in_time = now + seconds + self.settings.max_blocking_s <= deadline
                if in_time and gain >= PACKING_GAIN * work.remaining_s:
                    end_by = deadline
                    packing.add(work)
                    continue
            latest = work.deadline_s - work.remaining_s
            if on_time and now + packing.seconds <= latest:
                end_by = min(end_by, latest)  # it goes after this prefill: don't make it miss
        return packing.members

    def _weigh_all(
        self, current: Work, ahead: Sequence[Work], mine: tuple[float, ...], now: float
    ) -> Verdict:
        if not ahead:
            return Verdict(False, "nothing waiting is more urgent")
        group = self._keepable(ahead, now)
        if group:
            return self._weigh(current, group, now)
        if mine[0] == ON_TIME or ahead[0].remaining_s > MUCH_SHORTER * current.remaining_s:
            return Verdict(False, "no deadline is at stake")
        return Verdict(True, "is much shorter", by=ahead[0])

    def _weigh_grant(self, current: Work, verdict: Verdict, now: float) -> Verdict:
        """Give way to the first in line when its slice has come; else look again when it has."""
        first = self._first_in_line()
        if first is None or first.version < 0:  # none in line, or it is the one that runs
            return verdict
        grant_at = self._grant_at(first)
        if grant_at > now:
            return verdict._replace(again_at=min(verdict.again_at, grant_at))
        needed = min(first.remaining_s, self.settings.late_slice_s)
        if verdict.preempt or not (current.is_decode or self._lost(current, now + needed, now)):
            self._granted, self._slice_left_from_s = first.serial, None
            return Verdict(True, "is granted a slice, late for long", by=first)
        return verdict

    def _slice_end(self, current: Work, now: float) -> float:
        """Return when the running work's slice ends; -inf if it has none. Starts it if need be."""
        if current.serial != self._granted or current.is_decode:
            return -math.inf
        slice_s = self.settings.late_slice_s
        if self._slice_left_from_s is None:
            self._slice_left_from_s = current.executed_s + slice_s
            self._next_grant_s += slice_s / self.settings.late_share
        return now + self._slice_left_from_s - current.executed_s

    def _first_in_line(self) -> Work | None:
        while self._line and self._line[0][2].has_ended:
            heapq.heappop(self._line)
        if not self._line:
            self._next_grant_s = -math.inf
            return None
        return self._line[0][2]

    def _compact_line(self) -> None:
        if len(self._line) > self._compact_at:
            self._line = [record for record in self._line if not record[2].has_ended]
            heapq.heapify(self._line)
            self._compact_at = 2 * len(self._line) + 64

    def _grant_at(self, first: Work) -> float:
        assert first.late_since_s is not None
        eligible = first.late_since_s + self.settings.late_patience_s
        if self._next_grant_s == -math.inf:
            self._next_grant_s = eligible
        return max(self._next_grant_s, eligible)

    def _weigh(self, current: Work, group: Sequence[Work], now: float) -> Verdict:
        """Preempt if more of the group are saved than jobs of the running work are lost."""
        at = now
        saved = 0
        blocking = max(self.settings.max_blocking_s, 1e-3)
        again_at = math.inf
        for work in group:
            at += work.remaining_s
            slack = work.deadline_s - at
            misses = current.remaining_s > SLACK_TO_SPEND * slack
            saved += misses and slack >= 0.0
            # The running work may take longer than predicted: look again in time.
            again_at = min(again_at, work.deadline_s - (at - now) - 3 * blocking)
        again_at = max(again_at, now + blocking)
        if not saved:
            return Verdict(False, "the running work ends before anyone's slack runs out", again_at)
        lost = self._lost(current, at, now)
        is_quick = at - now < current.remaining_s
        if lost > saved or (lost == saved and not is_quick):
            return Verdict(False, f"would save {saved} and make {lost} late", again_at)
        return Verdict(True, f"saves {saved} deadlines, costs {lost}", by=group[0])

    def _lost(self, current: Work, resumed_at: float, now: float) -> int:
        """Return how many jobs of the running work miss if it is resumed only then."""
        if current.is_decode:
            deadline = current.deadline_s
            dated = sum(job.tpot_s < math.inf for job in current.jobs)
            ends_late = now + current.remaining_s <= deadline < resumed_at + current.remaining_s
            return dated if ends_late else 0
        ends = now + current.remaining_s
        then = resumed_at + current.remaining_s
        return sum(ends <= job.ttft_deadline_s < then for job in current.jobs)

    def _keepable(self, waiting: Sequence[Work], now: float) -> list[Work]:
        """Return the largest subset of the leading on-time works that can all be kept.

        Moore-Hodgson: go by deadline; when one ends late, give up the longest so far.
        """
        kept: list[Work] = []
        longest: list[tuple[float, int]] = []
        given_up: set[int] = set()
        at = now
        for work in waiting:
            if not self._is_on_time(work, now):
                break
            kept.append(work)
            heapq.heappush(longest, (-work.remaining_s, work.serial))
            at += work.remaining_s
            if at > work.deadline_s:
                seconds, serial = heapq.heappop(longest)
                at += seconds
                given_up.add(serial)
        return [work for work in kept if work.serial not in given_up]

    def _is_on_time(self, work: Work, now: float) -> bool:
        return now < work.latest_start_s(self.settings.max_blocking_s) < math.inf

    def _is_settled(self, current: Work) -> bool:
        return (
            current.prefill_suspensions >= self.settings.max_suspensions
            or current.suspended_s >= self.settings.max_suspended_s
        )

    def _current_key(self, current: Work, now: float) -> tuple[float, ...]:
        if current.is_decode:
            return (ON_TIME, current.deadline_s)
        return self.rank(current, now).key
