"""MemoryQueue: requests that wait for KV blocks, by deadline; the engine's core drains it.

A request that does not fit lets later ones that do pass it, until it has waited for PATIENCE_S:
from then on nobody passes, so that a large prompt gets its blocks in the end.
"""

from __future__ import annotations

import bisect
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from flowprefill.engine.kv_blocks import BlockPool
    from flowprefill.engine.sequence import Sequence

PATIENCE_S = 5.0
LATEST_S = 60.0  # a request counts as due this long after its arrival at the latest
MAX_MISSES = 16  # failed tries at once: each hashes a prompt


class MemoryQueue:
    """Sequences without a reservation. Not thread-safe; the engine's lock guards it."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._waiting: list[Sequence] = []
        self._tokens = 0
        self._is_dirty = False

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def tokens(self) -> int:
        """The tokens that wait to be computed."""
        return self._tokens

    def push(self, sequence: Sequence) -> None:
        """Queue a sequence; PromptTooLong must have been ruled out."""
        bisect.insort(self._waiting, sequence, key=_urgency)
        self._tokens += len(sequence.ids)
        self._is_dirty = True

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out wherever it is; no effect if it is not here."""
        if sequence in self._waiting:
            self._take(sequence)
            self._is_dirty = True

    def blocks_freed(self) -> None:
        """Note that trying again may succeed."""
        self._is_dirty = True

    def admit(self, now: float) -> Iterator[Sequence]:
        """Reserve blocks for as many as fit, most urgent first; yields each that got them."""
        if not self._is_dirty:
            return
        self._is_dirty = False
        misses = 0
        for sequence in tuple(self._waiting):
            reservation = self._pool.reserve(sequence.ids, sequence.extra_tokens)
            if reservation is None:
                misses += 1
                if now - sequence.arrival_s > PATIENCE_S or misses >= MAX_MISSES:
                    return
                continue
            sequence.reservation = reservation
            sequence.computed = reservation.cached_tokens
            self._take(sequence)
            yield sequence

    def make_room(
        self, decoding: list[Sequence], live: Iterable[Sequence]
    ) -> tuple[list[Sequence], list[Sequence]]:
        """Give each decoding sequence a block for its next token, taken from others if need be.

        The least urgent give theirs up: first requests that hold blocks but have not started, then
        decoding ones. They wait here again and compute their tokens anew.

        Returns:
            The sequences that have room now, and those that lost their blocks.
        """
        kept = sorted(decoding, key=lambda s: (s.slo.tpot or math.inf, s.arrival_s))
        evicted: list[Sequence] = []
        idle: list[Sequence] | None = None
        index = 0
        while index < len(kept):
            sequence = kept[index]
            assert sequence.reservation is not None
            if self._pool.grow(sequence.reservation, len(sequence.ids)):
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

    def _take(self, sequence: Sequence) -> None:
        self._waiting.remove(sequence)
        self._tokens -= len(sequence.ids)


def _is_idle(sequence: Sequence) -> bool:
    """Whether it holds blocks though its prefill has not started."""
    has_blocks = sequence.reservation is not None and sequence.is_scheduled
    return has_blocks and sequence.work_id is None and not sequence.tokens


def _urgency(sequence: Sequence) -> tuple[float, float]:
    return min(sequence.deadline_s, sequence.arrival_s + LATEST_S), sequence.arrival_s
