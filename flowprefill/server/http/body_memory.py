"""BodyMemory: bounds the memory of all request bodies together; incoming.py counts them in."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from flowprefill.errors import NotReady


class TooManyBodies(NotReady):
    """The bodies that are being read or tokenised fill the memory that they may take."""

    code = "too_many_bodies"


class BodyMemory:
    """Bytes of all bodies that are not token ids yet; one per server, on its event loop."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0

    def take(self, size: int) -> None:
        """Count bytes in; raises TooManyBodies if they do not fit, and then counts none."""
        if self._used + size > self._limit:
            limit_mib = round(self._limit / 2**20, 3)
            raise TooManyBodies(
                f"body: the requests being read and tokenised fill the {limit_mib:g} MiB that they "
                "may take together"
            )
        self._used += size

    def keep(self, size: int) -> Callable[[], None]:
        """Count bytes in once more, for they are in already; returns what counts them out."""
        self._used += size
        return partial(self.give_back, size)

    def give_back(self, size: int) -> None:
        """Count bytes out."""
        self._used -= size

    @property
    def used(self) -> int:
        """How many bytes are counted in."""
        return self._used
