"""TraceSlices: slices of a Chrome trace that no viewer drops, for debug_routes.py and the demo."""

from __future__ import annotations

from typing import Any

TICKS_PER_US = 8


class TraceSlices:
    """Slices in rows, in each row one after another.

    Viewers add start and duration, after rounding each for itself to nanoseconds, and drop a slice
    that then overlaps the one before. So both are whole eighths of a microsecond, which no rounding
    changes, and a slice that would begin before the last one's end, by the clock's error, begins
    there.
    """

    def __init__(self, zero_s: float = 0.0) -> None:
        """Count times from ``zero_s``: near the slices they are exact, whatever the clock shows."""
        self._zero_s = zero_s
        self._ends: dict[tuple[int, int], int] = {}  # of each row's last slice, in ticks

    def slice(
        self, place: tuple[int, int], name: str, times_s: tuple[float, float], args: Any
    ) -> dict[str, Any]:
        """Return the event of the next slice of a row.

        Args:
            place: process and row.
            name: what the viewer writes into it.
            times_s: begin and end; not before those of the row's earlier slices.
            args: what the viewer shows of a slice that is chosen.
        """
        begin, end = (round((at_s - self._zero_s) * 1e6 * TICKS_PER_US) for at_s in times_s)
        begin = max(begin, self._ends.get(place, begin))
        end = self._ends[place] = max(begin, end)
        return {
            "name": name,
            "ph": "X",
            "ts": begin / TICKS_PER_US,
            "dur": (end - begin) / TICKS_PER_US,
            "pid": place[0],
            "tid": place[1],
            "args": args,
        }


def row_name(kind: str, name: str, process: int, row: int) -> dict[str, Any]:
    """Return the event that names a row (``thread_name``) or a process (``process_name``)."""
    return {"name": kind, "ph": "M", "pid": process, "tid": row, "args": {"name": name}}
