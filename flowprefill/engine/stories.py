"""Stories: what happened to each of the last requests, when and why; the core writes them.

Written under the core's lock, at a cost that does not grow with what waits: an arrival and an end
cost one entry, a decision one for each request of the prefill that it starts, resumes or suspends.
A request that waits gets no entry while others run: whom it waited for is looked up when asked.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from flowprefill.scheduling import Arrival

if TYPE_CHECKING:
    from flowprefill.engine.live_request import LiveRequest
    from flowprefill.request import Timings
    from flowprefill.scheduling import Decision, SchedulerEvent, Work

KEPT_STORIES = 4096
KEPT_PREFILLS = 8192
MAX_ENTRIES = 32  # of one story; what comes after is counted
MAX_NAMES = 8  # of the requests that one entry names
MAX_LISTED = 100

What = Literal["demoted", "waits", "got_memory", "lost_memory", "started", "suspended", "resumed"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that happened to a request.

    Attributes:
        at_s: on the worker's clock.
        reason: the scheduler's words.
        kind: of the work it is about: whom it waited for or gave way to, or what it ran in.
        others: ids of that work's requests, itself left out, MAX_NAMES at most.
        count: how many those are.
        preempted: ids of the requests that were suspended for it.
    """

    at_s: float
    what: What
    reason: str = ""
    kind: str = ""
    others: tuple[str, ...] = ()
    count: int = 0
    preempted: tuple[str, ...] = ()

    def as_json(self, start_s: float) -> dict[str, Any]:
        """Return the entry with its time since start_s."""
        entry: dict[str, Any] = {"at_ms": _ms(self.at_s - start_s), "what": self.what}
        if self.reason:
            entry["reason"] = self.reason
        if self.kind:
            entry |= {"kind": self.kind, "count": self.count, "requests": list(self.others)}
        if self.preempted:
            entry["preempted"] = list(self.preempted)
        return entry


@dataclass(frozen=True, slots=True)
class End:
    """What is left of a request that has ended."""

    at_s: float
    timings: Timings
    finish_reason: str
    error: str
    output_tokens: int
    blocking_s: float | None


@dataclass(slots=True)
class Story:
    """One request's; `live` until its end, `end` from then on."""

    live: LiveRequest | None
    about: dict[str, Any]
    arrival_s: float
    entries: list[Entry] = field(default_factory=list)
    left_out: int = 0
    end: End | None = None

    def add(self, entry: Entry) -> None:
        """Append an entry while there is room."""
        if len(self.entries) < MAX_ENTRIES:
            self.entries.append(entry)
        else:
            self.left_out += 1

    @property
    def state(self) -> str:
        """What it does now."""
        live = self.live
        if live is None:
            return "ended"
        if live.tokens:
            return "held" if live.is_held else "decoding"
        if live.reservation is None:
            return "waiting for memory"
        last = self.entries[-1].what if self.entries else "waits"
        if last == "suspended":
            return "suspended"
        return "running" if last in ("started", "resumed") else "waiting"


class Stories:
    """The last stories and the last prefills that were started or resumed."""

    def __init__(self) -> None:
        self._stories: OrderedDict[str, Story] = OrderedDict()
        self._prefills: deque[tuple[float, tuple[str, ...], str]] = deque(maxlen=KEPT_PREFILLS)

    # ---- written by the core, under its lock --------------------------------------------------

    def arrived(self, request: LiveRequest, now: float) -> None:
        """Begin the story of a request that is admitted."""
        slo = request.slo
        about = {
            "service_class": slo.service_class,
            "tenant": request.request.tenant,
            "priority": request.request.priority,
            "slo": {
                "ttft_ms": _ms(slo.ttft), "tpot_ms": _ms(slo.tpot), "on_miss": slo.on_miss
            },
            "prompt_tokens": request.num_prompt,
        }  # fmt: skip
        self._stories.pop(request.id, None)  # an id may come again
        story = self._stories[request.id] = Story(request, about, request.arrival_s)
        if request.is_demoted:
            story.add(Entry(now, "demoted"))
        if len(self._stories) > KEPT_STORIES:
            self._stories.popitem(last=False)

    def note(self, request_id: str, at_s: float, what: What) -> None:
        """Add an entry that is about the request alone."""
        self._add(request_id, Entry(at_s, what))

    def decided(
        self, event: SchedulerEvent, decision: Decision, running: Work | None, now: float
    ) -> None:
        """Add what a decision means to those it is about; running: the current work after it."""
        work, old = decision.dispatch, decision.preempted
        if isinstance(event, Arrival) and running is not None:
            arrived = event.job.id
            if work is None or arrived not in work.job_ids:
                entry = _entry(now, "waits", decision.reason, running, "")
                self._add(arrived, entry)
        if work is None:
            return
        if work.kind == "prefill":
            what: What = "resumed" if decision.is_resume else "started"
            ids = work.job_ids
            self._prefills.append((now, ids[:MAX_NAMES], decision.reason))
            is_preempting = old is not None and old.kind == "prefill"
            preempted = old.job_ids[:MAX_NAMES] if old is not None and is_preempting else ()
            for job_id in ids:
                self._add(job_id, _entry(now, what, decision.reason, work, job_id, preempted))
        if old is not None and old.kind == "prefill":
            entry = _entry(now, "suspended", decision.reason, work, "")
            for job_id in old.job_ids:
                self._add(job_id, entry)

    def ended(self, request: LiveRequest, now: float) -> None:
        """End the story; nothing of the request itself is kept."""
        story = self._stories.get(request.id)
        if story is None or story.live is not request:
            return
        request.suspensions = _suspensions(story, now, request.timings(now).ttft)
        story.live = None
        story.end = End(
            now,
            request.timings(now),
            request.finish_reason or "failed",
            "" if request.error is None else request.error.message,
            request.output_tokens,
            request.blocking_s,
        )

    def _add(self, request_id: str, entry: Entry) -> None:
        story = self._stories.get(request_id)
        if story is not None and story.live is not None and not story.live.tokens:
            story.add(entry)

    # ---- read by the core, under its lock -----------------------------------------------------

    def recent(self, reply_id: str, now: float) -> list[dict[str, Any]]:
        """Return the last requests in short, the newest first; MAX_LISTED at most.

        Args:
            reply_id: of a reply with several choices, to see those; empty: all.
        """
        prefix = f"{reply_id}-" if reply_id else ""
        ids = (one for one in reversed(self._stories) if one.startswith(prefix))
        return [self._short(one, now) for one in islice(ids, MAX_LISTED)]

    def _short(self, request_id: str, now: float) -> dict[str, Any]:
        story = self._stories[request_id]
        timings = _timings(story, now)
        return {
            "id": request_id,
            "state": story.state,
            "arrived_s_ago": round(now - story.arrival_s, 3),
            "service_class": story.about["service_class"],
            "prompt_tokens": story.about["prompt_tokens"],
            "ttft_ms": _ms(timings.ttft),
            "predicted_ttft_ms": _ms(timings.predicted_ttft),
        }

    def story(self, request_id: str, now: float) -> dict[str, Any] | None:
        """Return the story of one request, ready for JSON; None if it is not known (any more).

        Times are milliseconds since its arrival. Cost: O(KEPT_PREFILLS).
        """
        story = self._stories.get(request_id)
        if story is None:
            return None
        timings = _timings(story, now)
        live, end = story.live, story.end
        outputs = live.output_tokens if live is not None else end.output_tokens if end else 0
        blocking_s = live.blocking_s if live is not None else end.blocking_s if end else None
        return {
            "id": request_id,
            "state": story.state,
            **story.about,
            "cached_tokens": timings.cached_tokens,
            "output_tokens": outputs,
            "predicted_ttft_ms": _ms(timings.predicted_ttft),
            "ttft_ms": _ms(timings.ttft),
            "queue_ms": _ms(timings.queue),
            "preprocess_ms": _ms(timings.preprocess),
            "waiting_ms": _ms(timings.waiting),
            "prefill_run_ms": _ms(timings.prefill_run),
            "suspended_ms": _ms(timings.suspended),
            "preemptions": timings.preemptions,
            "blocking_ms": _ms(blocking_s),
            "total_ms": _ms(timings.total),
            "slo_met": timings.slo_met,
            "finish_reason": None if end is None else end.finish_reason,
            "error": None if end is None or not end.error else end.error,
            "events": [entry.as_json(story.arrival_s) for entry in story.entries],
            "events_left_out": story.left_out,
            "waited_for": self._waited_for(request_id, story, now),
        }

    def _waited_for(self, request_id: str, story: Story, now: float) -> list[dict[str, Any]]:
        """Return the prefills of others that began between its arrival and its own beginning."""
        starts = (entry.at_s for entry in story.entries if entry.what == "started")
        until_s = next(starts, now if story.end is None else story.end.at_s)
        return [
            {"at_ms": _ms(at_s - story.arrival_s), "requests": list(ids), "reason": reason}
            for at_s, ids, reason in self._prefills
            if story.arrival_s <= at_s < until_s and request_id not in ids
        ]


def _entry(
    now: float, what: What, reason: str, work: Work, own: str, preempted: tuple[str, ...] = ()
) -> Entry:
    if work.kind == "decode":
        return Entry(now, what, reason, "decode", (), len(work.jobs))
    named = [job.id for job in work.jobs[: MAX_NAMES + 1] if job.id != own]
    count = len(work.jobs) - bool(own)
    return Entry(now, what, reason, "prefill", tuple(named[:MAX_NAMES]), count, preempted)


def _suspensions(story: Story, now: float, ttft: float | None) -> tuple[tuple[float, float], ...]:
    """Return when its prefill was suspended, as told in the entries; seconds since the arrival.

    One that would reach beyond the first token never was: the prefill ended where it was to stop.
    """
    found: list[tuple[float, float]] = []
    since: float | None = None
    for entry in story.entries:
        if entry.what == "suspended":
            since = entry.at_s
        elif since is not None and entry.what in ("resumed", "started"):
            found.append((since - story.arrival_s, entry.at_s - story.arrival_s))
            since = None
    if since is not None and not story.left_out:
        found.append((since - story.arrival_s, now - story.arrival_s))
    return tuple(pair for pair in found if ttft is None or pair[1] <= ttft)


def _timings(story: Story, now: float) -> Timings:
    if story.live is not None:
        return story.live.timings(now)
    assert story.end is not None
    return story.end.timings


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)
