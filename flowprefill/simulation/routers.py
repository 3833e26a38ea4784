"""Routers: which worker of a simulated cluster gets a request; each is one small class.

A router knows what a real one could: how many tokens live on each worker, and what its scheduler
predicts. Predictions are as of each worker's last event.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from flowprefill.errors import ConfigError

if TYPE_CHECKING:
    from flowprefill.scheduling import Job
    from flowprefill.simulation.node import Node

SHORT_LIST = 8  # workers whose schedulers least_finish asks


class Router(Protocol):
    """Chooses workers. One thread; deterministic by its seed."""

    def choose(self, job: Job, now: float) -> int:
        """Return the worker for a job that arrives now."""

    def changed(self, worker: int, now: float) -> None:
        """Hear that something happened at a worker."""


class RoundRobin:
    """One after the other."""

    def __init__(self, nodes: Sequence[Node], seed: int) -> None:
        del seed
        self._count = len(nodes)
        self._next = -1

    def choose(self, job: Job, now: float) -> int:
        """Return the next."""
        del job, now
        self._next = (self._next + 1) % self._count
        return self._next

    def changed(self, worker: int, now: float) -> None:
        """Need not know."""


class LeastTokens:
    """The worker with the fewest prompt tokens of live requests; of equals the first."""

    def __init__(self, nodes: Sequence[Node], seed: int) -> None:
        del seed
        self._nodes = nodes
        self._tokens = np.zeros(len(nodes))

    def choose(self, job: Job, now: float) -> int:
        """Return the one with the fewest tokens; O(workers)."""
        del job, now
        return int(self._tokens.argmin())

    def changed(self, worker: int, now: float) -> None:
        """Note its tokens."""
        del now
        self._tokens[worker] = self._nodes[worker].tokens


class LeastFinish:
    """The worker that predicts the earliest first token; of the few with the least backlog.

    Asks the schedulers of the SHORT_LIST workers that will be done first with all they have.
    """

    def __init__(self, nodes: Sequence[Node], seed: int) -> None:
        del seed
        self._nodes = nodes
        self._free_s = np.zeros(len(nodes))

    def choose(self, job: Job, now: float) -> int:
        """Return the best of the short list; O(workers + the list's predictions)."""
        free_s = self._free_s
        if free_s.min() <= now:
            return int((free_s <= now).argmax())
        if len(free_s) <= SHORT_LIST:
            few = list(range(len(free_s)))
        else:
            few = sorted(np.argpartition(free_s, SHORT_LIST)[:SHORT_LIST].tolist())
        return min(few, key=lambda worker: _predicted_s(self._nodes[worker], job, now))

    def changed(self, worker: int, now: float) -> None:
        """Note when it will be done with what it has."""
        self._free_s[worker] = now + self._nodes[worker].scheduler.load().backlog_s


class TwoChoices:
    """Of two workers drawn at random, the one that predicts the earlier first token."""

    def __init__(self, nodes: Sequence[Node], seed: int) -> None:
        self._nodes = nodes
        self._random = random.Random(seed)

    def choose(self, job: Job, now: float) -> int:
        """Return the better of two; O(1) in the number of workers."""
        count = len(self._nodes)
        first = self._random.randrange(count)
        second = self._random.randrange(count)
        if first == second:
            return first
        nodes = self._nodes
        earlier_s = _predicted_s(nodes[first], job, now)
        return first if earlier_s <= _predicted_s(nodes[second], job, now) else second

    def changed(self, worker: int, now: float) -> None:
        """Need not know."""


def _predicted_s(node: Node, job: Job, now: float) -> float:
    return node.scheduler.predicted_ttft_s(job, now)


ROUTERS: dict[str, Callable[[Sequence[Node], int], Router]] = {
    "round_robin": RoundRobin,
    "least_tokens": LeastTokens,
    "least_finish": LeastFinish,
    "two_choices": TwoChoices,
}
PREDICTING = ("least_finish", "two_choices")  # of first tokens: of no use to decode workers


def check_router(name: str, role: str) -> None:
    """Raise ConfigError for a router that there is not, or not for this role."""
    if name not in ROUTERS:
        raise ConfigError(
            f"router: got {name!r}, expected one of {', '.join(ROUTERS)}", param="router"
        )
    if role == "decode" and name in PREDICTING:
        raise ConfigError(
            f"router: got {name!r}, which predicts first tokens; workers that only decode have "
            "round_robin or least_tokens",
            param="router",
        )
