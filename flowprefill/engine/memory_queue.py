"""MemoryQueue: requests that wait for KV blocks, by deadline; the engine's core drains it.

A request that does not fit lets later ones that do pass it, until it has waited for PATIENCE_S:
from then on no request passes it, so that a large prompt gets its blocks in the end.

Held requests, whose clients do not read, are the first to give their blocks up: no other waits for
blocks that a held one has. One that lost them waits for others only once it is let go on.
"""

from __future__ import annotations

import bisect
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from flowprefill.engine.kv_blocks import BlockPool, Reservation
    from flowprefill.engine.live_request import LiveRequest

PATIENCE_S = 5.0
LATEST_S = 60.0  # a request counts as due this long after its arrival at the latest
MAX_MISSES = 16  # failed tries at once: each hashes a prompt


class MemoryQueue:
    """Sequences without a reservation. Not thread-safe; the engine's lock guards it."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._waiting: list[LiveRequest] = []
        self._held: dict[str, LiveRequest] = {}  # who has been held the longest comes first
        self._evicted: list[LiveRequest] = []
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

    def seconds_before(self, request: LiveRequest) -> float:
        """Return the predicted time of the prefills before a request that waits here, else 0."""
        if request.reservation is not None:
            return 0.0
        seconds = self._seconds
        for other in reversed(self._waiting):  # who came last is mostly the last
            seconds -= other.predicted_s
            if other is request:
                return max(seconds, 0.0)
        return 0.0

    @property
    def held(self) -> list[LiveRequest]:
        """The held requests that have a token; until then one is prefilled as any."""
        return [request for request in self._held.values() if request.tokens]

    def push(self, request: LiveRequest) -> None:
        """Queue a request; PromptTooLong must have been ruled out."""
        bisect.insort(self._waiting, request, key=_urgency)
        self._tokens += len(request.ids)
        self._seconds += request.predicted_s
        self._is_dirty = True

    def remove(self, request: LiveRequest) -> None:
        """Take a request out wherever it is; no effect if it is not here."""
        self._held.pop(request.id, None)
        if request.reservation is None and request in self._waiting:
            self._take(request)
            self._is_dirty = True

    def hold(self, request: LiveRequest) -> None:
        """Let others have a request's blocks, and let it wait for none once it has a token."""
        self._held[request.id] = request
        if request.tokens and request in self._waiting:
            self._take(request)
        self._is_dirty = True

    def resume(self, request: LiveRequest) -> None:
        """End that; it waits for the blocks that it has lost."""
        del self._held[request.id]
        if request.reservation is None and request not in self._waiting:
            self.push(request)

    def take_evicted(self) -> list[LiveRequest]:
        """Return the requests that lost their blocks since the last call; for the core to note."""
        evicted, self._evicted = self._evicted, []
        return evicted

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
            reservation = self._reserve(request)
            if reservation is None:
                reservation = self._reserve_of_held(request)
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
    ) -> list[LiveRequest]:
        """Give each decoding request a block for its next token, taken from others if need be.

        The least urgent give theirs up: first held requests, then those that have blocks but have
        not started, then decoding ones. They wait here again and compute their tokens anew.

        Returns:
            The requests that have room now; `take_evicted` has those that lost their blocks.
        """
        kept = sorted(decoding, key=lambda s: (s.slo.tpot or math.inf, s.arrival_s))
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
                idle += (s for s in reversed(self._held.values()) if _is_at_rest(s, decoding))
            self._evict(idle.pop() if idle else kept.pop())
        return kept

    def _reserve(self, request: LiveRequest) -> Reservation | None:
        return self._pool.reserve(
            request.ids,
            extra_tokens=request.extra_tokens,
            finds_prefix=request.finds_prefix,
        )

    def _reserve_of_held(self, request: LiveRequest) -> Reservation | None:
        """Take held requests' blocks until one fits; none are taken where all would not do."""
        victims = [one for one in self._held.values() if _is_at_rest(one)]
        if not victims:
            return None  # the prompt need not be hashed again
        would_fit = self._pool.would_fit(
            request.ids,
            request.extra_tokens,
            finds_prefix=request.finds_prefix,
            without=[one.reservation for one in victims if one.reservation],
        )
        if not would_fit:
            return None
        for victim in victims:
            self._evict(victim)
            if (reservation := self._reserve(request)) is not None:
                return reservation
        return None

    def _evict(self, victim: LiveRequest) -> None:
        assert victim.reservation is not None
        self._pool.release(victim.reservation)
        victim.reservation, victim.computed = None, 0
        self._evicted.append(victim)
        if not (victim.is_held and victim.tokens):
            self.push(victim)

    def _take(self, request: LiveRequest) -> None:
        self._waiting.remove(request)
        self._tokens -= len(request.ids)
        self._seconds = self._seconds - request.predicted_s if self._waiting else 0.0


def _is_idle(request: LiveRequest) -> bool:
    """Whether it holds blocks though its prefill has not started."""
    has_blocks = request.reservation is not None and request.is_scheduled
    return has_blocks and request.work_id is None and not request.tokens


def _is_at_rest(held: LiveRequest, taken: Sequence[LiveRequest] = ()) -> bool:
    """Whether a held request has blocks that no run uses, nor one that is being built."""
    has_blocks = held.reservation is not None and held.work_id is None
    return has_blocks and bool(held.tokens) and held not in taken


def _urgency(request: LiveRequest) -> tuple[float, float]:
    return min(request.deadline_s, request.arrival_s + LATEST_S), request.arrival_s
