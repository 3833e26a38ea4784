"""VirtualDevice: executes one run at a time in virtual time; suspends it at its next boundary.

What the native executor does, without computing: `dispatch` names the run to go on with, which
starts when the one before it has reached a boundary. Pure: the caller has the clock, asks `next_s`
and calls `advance` at that time.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

RunState = Literal["ready", "running", "suspended", "finished", "cancelled"]
EventKind = Literal["finished", "suspended", "cancelled"]
ENDED = ("finished", "cancelled")
EPSILON = 1e-9  # share of a run; a boundary so near is the one where it stands


class VirtualRun:
    """One work on the device.

    Attributes:
        total_s: time it takes undisturbed.
        bounds: gives its boundaries as shares of that time, rising, the last 1; called only when
            the run is to be suspended.
        executed_s: how long it has been executing, up to the last boundary where it stood.
        suspended_s: how long it stood still after its first start.
        blocking_s: longest time from a dispatch to its start there.
        start_s: when it first ran; inf: it has not.
    """

    __slots__ = (
        "blocking_s", "bounds", "dispatched_s", "executed_s", "id", "preemptions", "since_s",
        "start_s", "state", "suspended_s", "total_s",
    )  # fmt: skip

    def __init__(self, run_id: int, total_s: float, bounds: Callable[[], Sequence[float]]) -> None:
        self.id = run_id
        self.total_s = total_s
        self.bounds = bounds
        self.state: RunState = "ready"
        self.executed_s = 0.0
        self.suspended_s = 0.0
        self.blocking_s = 0.0
        self.preemptions = 0
        self.start_s = math.inf
        self.since_s = 0.0
        self.dispatched_s = 0.0


class DeviceEvent(NamedTuple):
    """What happened to a run."""

    kind: EventKind
    run: VirtualRun


class Stretch(NamedTuple):
    """A time in which a run was executing."""

    run: VirtualRun
    start_s: float
    end_s: float


class VirtualDevice:
    """See the file's head.

    Attributes:
        next_s: when a run ends or stops next; inf: never. Call `advance` then.
        busy_s: how long runs were executing, up to the last boundary.
        blocking_s: each wait of a dispatched run for the one that was executing, seconds; stays
            empty if `on_blocking` takes them.
        stretches: None, or a list to which each stretch is added.
    """

    def __init__(
        self, segments_in_flight: int = 1, on_blocking: Callable[[float], None] | None = None
    ) -> None:
        self.current: VirtualRun | None = None
        self.next_s = math.inf
        self.busy_s = 0.0
        self.preemptions = 0
        self.blocking_s: list[float] = []
        self.stretches: list[Stretch] | None = None
        self._in_flight = segments_in_flight
        self._note_blocking = on_blocking or self.blocking_s.append
        self._following: VirtualRun | None = None
        self._end_s = math.inf
        self._stop_s = math.inf  # the boundary at which the current run gives way
        self._is_cancelled = False

    def dispatch(self, run: VirtualRun, now: float) -> bool:
        """Go on with this run from the next boundary on; dispatching the current one takes it back.

        Returns:
            False: it has ended already.
        """
        if run.state in ENDED:
            return False
        current = self.current
        if current is None:
            run.dispatched_s = now
            self._start(run, now)
        elif run is not current:
            run.dispatched_s = now
            self._following = run
            self._stop_at_boundary(now)
        elif not self._is_cancelled:
            self._following = None
            self._stop_s = math.inf
            self.next_s = self._end_s
        return True

    def suspend(self, run: VirtualRun, now: float) -> bool:
        """Have the run stop at its next boundary. False: it is not the one that executes."""
        if run is not self.current:
            return False
        self._stop_at_boundary(now)
        return True

    def cancel(self, run: VirtualRun, now: float) -> bool:
        """End the run, at its next boundary if it executes. False: it has ended.

        `advance` tells the end of one that executes; of another the caller knows at once.
        """
        if run.state in ENDED:
            return False
        if run is self.current:
            self._is_cancelled = True
            self._stop_at_boundary(now)
            return True
        run.state = "cancelled"
        if run is self._following:
            self._following = None
        return True

    def advance(self, now: float) -> DeviceEvent | None:
        """Do what happens at `next_s`; now is that time.

        Returns:
            What ended or was suspended; None if it was too early.
        """
        run = self.current
        if run is None or now < self.next_s:
            return None
        following = self._following
        ends = self._end_s <= self._stop_s
        kind: EventKind = "finished"
        if not ends:
            kind = "cancelled" if self._is_cancelled else "suspended"
        self._leave(run, now, kind)
        if following is not None and following.state not in ENDED:
            self._note_blocking(now - following.dispatched_s)
            self._start(following, now)
        return DeviceEvent(kind, run)

    def _start(self, run: VirtualRun, now: float) -> None:
        if run.start_s == math.inf:
            run.start_s = now
        else:
            run.suspended_s += now - run.since_s
        run.blocking_s = max(run.blocking_s, now - run.dispatched_s)
        run.state, run.since_s = "running", now
        self.current = run
        self._end_s = self.next_s = now + max(run.total_s - run.executed_s, 0.0)

    def _leave(self, run: VirtualRun, now: float, kind: EventKind) -> None:
        passed = now - run.since_s
        run.executed_s = run.total_s if kind == "finished" else run.executed_s + passed
        run.state = kind
        if kind == "suspended":
            run.preemptions += 1
            self.preemptions += 1
        self.busy_s += passed
        if self.stretches is not None:
            self.stretches.append(Stretch(run, run.since_s, now))
        run.since_s = now
        self.current, self._following, self._is_cancelled = None, None, False
        self._end_s = self._stop_s = self.next_s = math.inf

    def _stop_at_boundary(self, now: float) -> None:
        """Find the boundary where the current run stops; a stop that was planned stays."""
        if self._stop_s < math.inf:
            return
        run = self.current
        assert run is not None
        bounds = run.bounds()
        share = (run.executed_s + now - run.since_s) / run.total_s if run.total_s > 0 else 1.0
        index = bisect_right(bounds, share + EPSILON) + self._in_flight - 1
        if index < len(bounds) - 1:  # the last boundary is the end
            self._stop_s = max(run.since_s + bounds[index] * run.total_s - run.executed_s, now)
        else:
            self._stop_s = self._end_s
        self.next_s = min(self._end_s, self._stop_s)
