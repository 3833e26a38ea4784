"""Telemetry: hands each ended generating request to OpenTelemetry, from a thread of its own.

Off unless open_telemetry.py finds that it is wanted; then neither the event loop nor the engine's
threads do more than append to a queue. otel.py makes the spans and metrics.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from aiohttp import web
from aiohttp.typedefs import Handler

from flowprefill.engine.records import RequestRecord
from flowprefill.server.http.access_log import answered
from flowprefill.server.openai.endpoint import GENERATION, Generation

logger = logging.getLogger(__name__)

MAX_QUEUED = 4096  # calls and records; what comes while so many wait is left out
KEPT_RECORDS = 4096
RECORD_WAIT_S = 5.0  # for the end of a request whose client has gone
FLUSH_S = 2.0
OPERATIONS = {
    "/v1/completions": "text_completion",
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
}


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request to generate, when its reply has ended.

    Attributes:
        trace_headers: ``traceparent`` and ``tracestate`` of the caller.
        start_ns: arrival, nanoseconds since the epoch.
        start_s: arrival on the monotonic clock, like all times of the engine.
        end_s: end of the reply.
        generation: None if it was refused before it was submitted.
    """

    route: str
    trace_headers: Mapping[str, str]
    start_ns: int
    start_s: float
    end_s: float
    status: int
    generation: Generation | None

    @property
    def operation(self) -> str:
        """What the semantic conventions call it."""
        return OPERATIONS[self.route]

    @property
    def request_ids(self) -> list[str]:
        """The engine's requests, in choice order."""
        return (
            [] if self.generation is None else [one.request_id for one in self.generation.handles]
        )


class Sink(Protocol):
    """Where calls go; used from the telemetry thread only."""

    def write(self, call: Call, records: list[RequestRecord]) -> None:
        """Export a call and what the engine told of its choices."""
        ...

    def close(self) -> None:
        """Send what is left, and stop."""
        ...


class Telemetry:
    """Joins calls and the engine's records; `add` and `on_end` from any thread, neither waits."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        # It has no bound, so that a put never waits; `_put` keeps it short.
        self._queue: queue.SimpleQueue[Call | RequestRecord | None] = queue.SimpleQueue()
        self._records: OrderedDict[str, RequestRecord] = OrderedDict()
        self._waiting: list[Call] = []
        self.left_out = 0
        self._thread = threading.Thread(target=self._run, name="fp-telemetry", daemon=True)
        self._thread.start()

    def add(self, call: Call) -> None:
        """Take a call whose reply has ended."""
        self._put(call)

    def on_end(self, record: RequestRecord) -> None:
        """Take what the engine tells of one choice; it comes before its reply ends."""
        self._put(record)

    def on_preemption(self, reason: str, ack_s: float) -> None:
        """Nothing: the record tells when its request was suspended."""

    def on_decision(self, seconds: float) -> None:
        """Nothing."""

    def close(self, timeout_s: float = FLUSH_S) -> None:
        """Send what is left, for so long; a collector that does not answer holds nothing up."""
        self._queue.put(None)
        self._thread.join(timeout_s)

    def _put(self, item: Call | RequestRecord) -> None:
        if self._queue.qsize() < MAX_QUEUED:
            self._queue.put(item)
            return
        if self.left_out == 0:
            logger.warning("telemetry: %d entries wait, some are left out", MAX_QUEUED)
        self.left_out += 1

    # ---- the telemetry thread --------------------------------------------------------------------

    def _run(self) -> None:
        is_open = True
        while is_open:
            is_open = self._take()
            now_s = time.monotonic()
            for call in [one for one in self._waiting if self._is_due(one, now_s)]:
                self._waiting.remove(call)
                self._write(call)
        for call in self._waiting:
            self._write(call)
        self._sink.close()

    def _take(self) -> bool:
        """Wait for the next item; returns False at the end."""
        try:
            item = self._queue.get(timeout=RECORD_WAIT_S if self._waiting else None)
        except queue.Empty:
            return True
        if isinstance(item, Call):
            self._waiting.append(item)
        elif item is not None:
            self._records[item.request_id] = item
            if len(self._records) > KEPT_RECORDS:
                self._records.popitem(last=False)
        return item is not None

    def _is_due(self, call: Call, now_s: float) -> bool:
        has_all = all(one in self._records for one in call.request_ids)
        return has_all or now_s - call.end_s > RECORD_WAIT_S

    def _write(self, call: Call) -> None:
        found = [self._records.pop(one, None) for one in call.request_ids]
        try:
            self._sink.write(call, [record for record in found if record is not None])
        except Exception:  # whatever it is: the next call may go better
            logger.exception("telemetry: a request could not be exported")


@web.middleware
async def telemetry_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Tell the telemetry of every generating request, however it ends; outermost."""
    telemetry: Telemetry | None = request.app.get(TELEMETRY)
    if telemetry is None or request.path not in OPERATIONS or request.method != "POST":
        return await handler(request)
    start_ns, start_s = time.time_ns(), time.monotonic()

    def tell(status: int) -> None:
        names = ("traceparent", "tracestate")
        headers = {name: request.headers[name] for name in names if name in request.headers}
        generation = request.get(GENERATION)
        end_s = time.monotonic()
        telemetry.add(Call(request.path, headers, start_ns, start_s, end_s, status, generation))

    return await answered(request, handler, tell)


TELEMETRY = web.AppKey("telemetry", Telemetry)
