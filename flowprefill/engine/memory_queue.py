"""MemoryQueue: requests that wait for KV blocks, by deadline; the engine's core drains it.

A request that does not fit lets later ones that do pass it, until it has waited for PATIENCE_S:
from then on no request passes it, so that a large prompt gets its blocks in the end.
"""

from __future__ import annotations

import bisect
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from flowprefill.engine.kv_blocks import BlockPool
    from flowprefill.engine.live_request import LiveRequest

PATIENCE_S = 5.0
LATEST_S = 60.0  # a request counts as due this long after its arrival at the latest
MAX_MISSES = 16  # failed tries at once: each hashes a prompt


class MemoryQueue:
    """Sequences without a reservation. Not thread-safe; the engine's lock guards it."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._waiting: list[LiveRequest] = []
        self._tokens = 0
        self._seconds = 0.0
        self._is_dirty = False

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def tokens(self) -> int:
        """The tokens that wait to be computed."""
        return self._tokens

    @property
    def seconds(self) -> float:
        """The predicted time that their prefills take."""
        return self._seconds

    def push(self, request: LiveRequest) -> None:
        """Queue a request; PromptTooLong must have been ruled out."""
        bisect.insort(self._waiting, request, key=_urgency)
        self._tokens += len(request.ids)
        self._seconds += request.predicted_s
        self._is_dirty = True

    def remove(self, request: LiveRequest) -> None:
        """Take a request out wherever it is; no effect if it is not here."""
        if request in self._waiting:
            self._take(request)
            self._is_dirty = True

    def blocks_freed(self) -> None:
        """Note that trying again may succeed."""
        self._is_dirty = True

    def admit(self, now: float) -> Iterator[LiveRequest]:
        """Reserve blocks for as many as fit, most urgent first; yields each that got them."""
        if not self._is_dirty:
            return
        self._is_dirty = False
        misses = 0
        for request in tuple(self._waiting):
            reservation = self._pool.reserve(
                request.ids,
                extra_tokens=request.extra_tokens,
                finds_prefix=request.finds_prefix,
            )
            if reservation is None:
                misses += 1
                if now - request.arrival_s > PATIENCE_S or misses >= MAX_MISSES:
                    return
                continue
            request.reservation = reservation
            request.computed = reservation.cached_tokens
            self._take(request)
            yield request

    def make_room(
        self, decoding: list[LiveRequest], live: Iterable[LiveRequest]
    ) -> tuple[list[LiveRequest], list[LiveRequest]]:
        """Give each decoding request a block for its next token, taken from others if need be.

        The least urgent give theirs up: first requests that hold blocks but have not started, then
        decoding ones. They wait here again and compute their tokens anew.

        Returns:
            The requests that have room now, and those that lost their blocks.
        """
        kept = sorted(decoding, key=lambda s: (s.slo.tpot or math.inf, s.arrival_s))
        evicted: list[LiveRequest] = []
        idle: list[LiveRequest] | None = None
        index = 0
        while index < len(kept):
            request = kept[index]
            assert request.reservation is not None
            if self._pool.grow(request.reservation, len(request.ids)):
                index += 1
                continue
            if idle is None:
                idle = sorted((s for s in live if _is_idle(s)), key=_urgency)
            victim = idle.pop() if idle else kept.pop()
            assert victim.reservation is not None
            self._pool.release(victim.reservation)
            victim.reservation, victim.computed = None, 0
            self.push(victim)
            evicted.append(victim)
        return kept, evicted

    def _take(self, request: LiveRequest) -> None:
        self._waiting.remove(request)
        self._tokens -= len(request.ids)
        self._seconds = self._seconds - request.predicted_s if self._waiting else 0.0


def _is_idle(request: LiveRequest) -> bool:
    """Whether it holds blocks though its prefill has not started."""
    has_blocks = request.reservation is not None and request.is_scheduled
    return has_blocks and request.work_id is None and not request.tokens


def _urgency(request: LiveRequest) -> tuple[float, float]:
    return min(request.deadline_s, request.arrival_s + LATEST_S), request.arrival_s
