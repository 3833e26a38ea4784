"""Guaranteed shares: which prefills are protected, and when they must go first; for slack_edf."""

from __future__ import annotations

import math
from bisect import insort
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from flowprefill.scheduling.interface import SchedulerSettings
    from flowprefill.scheduling.work import Work

MOST = 64  # protected at a time; more would make decisions slow
NO_TIME_S = 1e-4


class GuaranteedShares:
    """Keeps the promise of `SchedulerSettings.class_shares`.

    A class with the share f has, in thought, a device of its own, f times as fast as the real one,
    that serves its *protected* prefills one after another. One that arrives at a is protected if
    that device would end it a margin before its deadline:

        end = max(end of the one before, a) + (its time + 2 * max_blocking_s) / f
        end <= deadline - max_blocking_s - late_slice_s

    The shares and late_share together are less than 1, so by prediction all protected ones can be
    on time on the real device, whatever else arrives: earliest deadline first does it. Others may
    go before them while that leaves enough for them and for all that their classes may still send:

        spare = (d - margin - now) * (1 - late_share * (1 + 2 * max_blocking_s / late_slice_s))
                - time of the protected due by d - sum of f * (d - margin - max(now, end))

    for each protected one's deadline d. Once that is used up, the protected go first, and what
    would suspend one must itself fit into what is spare, as must what is packed with one.

    A packed prefill is due when the first of its protected jobs is that can still be on time.
    """

    def __init__(self, settings: SchedulerSettings) -> None:
        self._settings = settings
        self._shares = {"": settings.late_share, **settings.class_shares}
        self._ends = dict.fromkeys(self._shares, -math.inf)
        self._live: list[tuple[float, int, Work]] = []  # protected, by deadline
        self._spare: list[tuple[float, float]] = []  # (deadline, spare for it), by deadline

    def note(self, work: Work, now: float) -> None:
        """Protect a prefill that arrives, if its class's share allows."""
        name = work.jobs[0].service_class
        if (
            name not in self._settings.class_shares
            or not work.deadline_s < math.inf
            or len(self._live) >= MOST
        ):
            return
        needed_s = work.predicted_s + 2 * self._settings.max_blocking_s
        end = max(self._ends[name], now) + needed_s / self._shares[name]
        if end <= work.deadline_s - self._margin_s:
            self._ends[name] = end
            work.protected = work.jobs[:]
            self.adopt(work)

    def adopt(self, work: Work) -> None:
        """Count a protected prefill, or one that was packed with protected ones."""
        if work.protected and all(entry[2] is not work for entry in self._live):
            insort(self._live, _entry(work), key=_order)

    def spare_s(self, now: float) -> float:
        """Return how long others may run; inf if none is protected. O(n) in the protected."""
        self._spare = []
        if not self._live:
            return math.inf
        works = [entry[2] for entry in self._live if _is_on_time(entry[2], now)]
        self._live = sorted(map(_entry, works), key=_order)
        settings = self._settings
        slice_s = max(settings.late_slice_s, settings.max_blocking_s, NO_TIME_S)
        late_share = settings.late_share * (1.0 + 2.0 * settings.max_blocking_s / slice_s)
        needed_s = 0.0
        for deadline, _, work in self._live:
            needed_s += work.remaining_s
            ahead_s = deadline - self._margin_s - now
            promised_s = sum(
                share * max(min(ahead_s, deadline - self._margin_s - self._ends[name]), 0.0)
                for name, share in settings.class_shares.items()
            )
            spare_s = ahead_s * (1.0 - late_share) - needed_s - promised_s
            self._spare.append((deadline, spare_s))
        return min((spare_s for _, spare_s in self._spare), default=math.inf)

    def have_room(self, members: Iterable[Work], seconds: float) -> bool:
        """Return whether works can be packed, as of the last `spare_s`; O(n) in the protected.

        All of them would be done by the earliest deadline among the protected ones.

        Args:
            seconds: predicted time of the packed prefill.
        """
        due = sorted(
            (work.protected[0].ttft_deadline_s, work.remaining_s)
            for work in members
            if work.protected
        )
        more_s, place = seconds, 0
        for deadline, spare_s in self._spare if due else ():
            while place < len(due) and due[place][0] <= deadline:
                more_s -= due[place][1]  # is counted there already
                place += 1
            if place and more_s > max(spare_s, 0.0) + NO_TIME_S:
                return False
        return True

    def first(self) -> Work | None:
        """Return the protected prefill with the earliest deadline, as of the last `spare_s`."""
        return self._live[0][2] if self._live else None

    def free_at(self, name: str) -> float:
        """Return from when on a class's share is not taken up by its protected prefills."""
        return self._ends[name]

    def count_slice(self, name: str, due_at: float) -> None:
        """Note that a late or best-effort prefill of the class is granted a slice, due at a time.

        The class "" stands for all without a share of their own: late_share.
        """
        slice_s = self._settings.late_slice_s
        self._ends[name] = max(self._ends[name], due_at) + slice_s / self._shares[name]

    def forget_slices(self) -> None:
        """Let the next late one without a share of its own be granted its slice at once."""
        self._ends[""] = -math.inf

    @property
    def _margin_s(self) -> float:
        return self._settings.max_blocking_s + self._settings.late_slice_s


def _is_on_time(work: Work, now: float) -> bool:
    """Whether a protected job of a work can still be on time; the others are let go.

    By the prediction alone: near its end `remaining_s` also has what works take beyond theirs.
    """
    ends = now + max(work.predicted_s - work.executed_s, 0.0)
    while work.protected and ends > work.protected[0].ttft_deadline_s:
        del work.protected[0]
    return bool(work.protected) and not work.has_ended


def _entry(work: Work) -> tuple[float, int, Work]:
    return work.protected[0].ttft_deadline_s, work.serial, work


def _order(entry: tuple[float, int, Work]) -> tuple[float, int]:
    return entry[:2]
