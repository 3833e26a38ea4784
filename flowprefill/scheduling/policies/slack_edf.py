"""The default policy: slack-aware EDF that preempts only where it changes who is on time."""

from __future__ import annotations

import heapq
import math
from typing import TYPE_CHECKING

from flowprefill.scheduling.entry import Entry, Rank, Verdict
from flowprefill.scheduling.policies.base import BasePolicy, Packing

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from flowprefill.scheduling.cost_model import CostModel
    from flowprefill.scheduling.interface import SchedulerSettings

ON_TIME, LATE, BEST_EFFORT = 0.0, 1.0, 2.0  # bands, served in this order
MUCH_SHORTER = 0.5  # without deadlines at stake, preempt for at most this share of what is left


class SlackEdf(BasePolicy):
    """On time first, by deadline; then late ones, then best effort, the shortest first.

    *On time* is who can still meet its deadline by prediction if it ran now. Among those, when
    not all can be kept, the choice that keeps most of them (Moore-Hodgson on the first waiting).

    No starvation. Who turns late (or arrives as best effort) at time t gets a turn at

        turn = t + late_patience_s + (L + own) / late_share - own

    with L the predicted time of all that is late or best effort at t: as if these had a device of
    their own, late_share as fast. From its turn on an entry goes before all but earlier turns, and
    is not preempted. So it ends by

        turn + (what runs then + earlier turns still waiting + own) / (1 - decode_share)

    A suspended work whose suspensions add up to max_suspended_s has its turn at that time.

    Preemption. Only for entries strictly before the running one; for one that is on time only if it
    would miss by waiting for the running work to end and meets its deadline if not (those waiting
    before it counted), and only if more are saved so than victims lost. Without deadlines at
    stake, only for one that needs at most half of what the running one still needs.

    Source: own, after the paper's S-EDF.
    """

    name = "slack_edf"

    def __init__(self, cost_model: CostModel, settings: SchedulerSettings) -> None:
        super().__init__(cost_model, settings)
        self._late: dict[int, float] = {}  # serial -> predicted time, of those without a turn yet
        self._late_total_s = 0.0

    def rank(self, entry: Entry, now: float) -> Rank:
        """Order by band, then deadline or remaining time."""
        turn, end_of_patience = self._suspension_turn(entry)
        latest = entry.latest_start_s(self.settings.max_blocking_s)
        if turn <= now:
            return Rank((ON_TIME, turn))
        if now < latest < math.inf:
            return Rank((ON_TIME, entry.deadline_s), min(latest, end_of_patience))
        if entry.turn_s is None:
            own = entry.remaining_s
            share = self.settings.late_share
            wait = (self._late_total_s + own) / share - own
            entry.turn_s = now + self.settings.late_patience_s + wait
        self._note_late(entry)
        if entry.turn_s <= now:
            return Rank((ON_TIME, entry.turn_s))
        band = LATE if entry.deadline_s < math.inf else BEST_EFFORT
        return Rank((band, entry.remaining_s), min(entry.turn_s, end_of_patience))

    def left(self, entry: Entry) -> None:
        """Take it off the time that late ones wait for."""
        self._late_total_s -= self._late.pop(entry.serial, 0.0)
        if not self._late:
            self._late_total_s = 0.0

    def pick(self, waiting: Sequence[Entry], now: float) -> Entry:
        """Return the first one, or the first of the largest set that can be kept on time."""
        kept = self._keepable(waiting, now)
        return kept[0] if kept else waiting[0]

    def should_preempt(self, current: Entry, waiting: Sequence[Entry], now: float) -> Verdict:
        """Weigh what waiting costs against what preempting costs."""
        if self._is_settled(current):
            return Verdict(False, "the running work was suspended as often or long as it may be")
        mine = self._current_key(current, now)
        if mine[0] == ON_TIME and mine[1] <= now and not current.is_decode:
            return Verdict(False, "it is the running work's turn")
        ahead = [e for e in waiting if (e.rank.key, e.priority) < (mine, current.priority)]
        if not ahead:
            return Verdict(False, "nothing waiting is more urgent")
        no_deadline = mine[0] != ON_TIME and not self._is_on_time(ahead[0], now)
        if no_deadline and ahead[0].remaining_s <= MUCH_SHORTER * current.remaining_s:
            return Verdict(True, "is much shorter", by=ahead[0])
        group = self._keepable(ahead, now, has_turns=True)
        if not group:
            return Verdict(False, "waiting is not worth a preemption: no deadline is at stake")
        verdict = self._weigh(current, group, now)
        # Whatever suspends the running work: those whose turn has come go first, else no bound.
        return verdict if self._is_on_time(ahead[0], now) else verdict._replace(by=ahead[0])

    def batch(self, head: Entry, waiting: Iterable[Entry], now: float) -> list[Entry]:
        """Pack while all members meet their deadlines; late ones and others are not mixed."""
        packing = Packing(head, self.cost_model, self.settings)
        on_time = self._is_on_time(head, now)
        end_by = head.deadline_s if on_time else math.inf
        for entry in waiting:
            if packing.is_full:
                break
            if entry.rank.key[0] > head.rank.key[0]:
                break
            if entry is head or self._is_on_time(entry, now) != on_time:
                continue
            ends = now + packing.seconds_with(entry) + self.settings.max_blocking_s
            deadline = min(end_by, entry.deadline_s) if on_time else math.inf
            if packing.fits(entry) and ends <= deadline:
                end_by = deadline
                packing.add(entry)
            elif on_time and now + packing.seconds + entry.remaining_s <= entry.deadline_s:
                end_by = min(end_by, entry.deadline_s - entry.remaining_s)  # stays behind: no miss
        return packing.members

    def _weigh(self, current: Entry, group: Sequence[Entry], now: float) -> Verdict:
        """Preempt if more of the group are saved than jobs of the running work are lost."""
        at = now
        saved = 0
        blocking = max(self.settings.max_blocking_s, 1e-3)
        again_at = math.inf
        for entry in group:
            at += entry.remaining_s
            misses = at + current.remaining_s > entry.deadline_s
            saved += misses and at <= entry.deadline_s
            # The running work may take longer than predicted: look again in time.
            again_at = min(again_at, entry.deadline_s - (at - now) - 3 * blocking)
        again_at = max(again_at, now + blocking)
        if not saved:
            return Verdict(False, "the running work ends before anyone's slack runs out", again_at)
        lost = self._lost(current, at, now)
        if lost >= saved:
            return Verdict(False, f"would save {saved} and make {lost} late", again_at)
        return Verdict(True, f"saves {saved} deadlines, costs {lost}", by=group[0])

    def _lost(self, current: Entry, resumed_at: float, now: float) -> int:
        """Return how many jobs of the running work miss if it is resumed only then."""
        if current.is_decode:
            assert current.work is not None
            deadline = current.work.deadline_s
            dated = sum(job.tpot_s < math.inf for job in current.jobs)
            ends_late = now + current.remaining_s <= deadline < resumed_at + current.remaining_s
            return dated if ends_late else 0
        ends = now + current.remaining_s
        then = resumed_at + current.remaining_s
        return sum(ends <= job.ttft_deadline_s < then for job in current.jobs)

    def _keepable(
        self, waiting: Sequence[Entry], now: float, *, has_turns: bool = False
    ) -> list[Entry]:
        """Return the largest subset of the leading on-time entries that can all be kept.

        Moore-Hodgson: go by deadline; when one ends late, give up the longest so far. Entries whose
        turn it is are ahead of all others: skipped, but nothing is picked past them.
        """
        kept: list[Entry] = []
        longest: list[tuple[float, int]] = []
        given_up: set[int] = set()
        at = now
        for entry in waiting:
            if not self._is_on_time(entry, now):
                if has_turns and entry.rank.key[0] == ON_TIME:
                    continue
                break
            kept.append(entry)
            heapq.heappush(longest, (-entry.remaining_s, entry.serial))
            at += entry.remaining_s
            if at > entry.deadline_s:
                seconds, serial = heapq.heappop(longest)
                at += seconds
                given_up.add(serial)
        return [entry for entry in kept if entry.serial not in given_up]

    def _is_on_time(self, entry: Entry, now: float) -> bool:
        return now < entry.latest_start_s(self.settings.max_blocking_s) < math.inf

    def _is_settled(self, current: Entry) -> bool:
        work = current.work
        assert work is not None
        return (
            current.yields >= self.settings.max_suspensions
            or work.suspended_s >= self.settings.max_suspended_s
        )

    def _current_key(self, current: Entry, now: float) -> tuple[float, ...]:
        if current.is_decode:
            assert current.work is not None
            return (ON_TIME, current.work.deadline_s)
        return self.rank(current, now).key

    def _suspension_turn(self, entry: Entry) -> tuple[float, float]:
        """Return (turn by suspension or inf, when that comes about if it stays suspended)."""
        if entry.work is None or not entry.is_suspended:
            return math.inf, math.inf
        at = entry.since_s + max(self.settings.max_suspended_s - entry.work.suspended_s, 0.0)
        return at, at

    def _note_late(self, entry: Entry) -> None:
        self._late_total_s += entry.remaining_s - self._late.get(entry.serial, 0.0)
        self._late[entry.serial] = entry.remaining_s
