"""Search: the highest rate at which a setting still attains a target, on a grid of rates. Pure.

Rates are ``base * step**index``. From a start the search goes up or down in doubling strides until
the target is bracketed, then halves the bracket down to neighbours, and interpolates between these.
Attainment on one sample need not fall evenly with the rate; the search finds one place where it
passes the target, by the same way for every setting.
"""

from __future__ import annotations


class Search:
    """One search; ask `next_index`, measure, `tell`, until `is_done`.

    Attributes:
        target: attainment in (0, 1).
        low: highest index that attained it; None: none yet.
        high: lowest index above `low` that did not; None: none yet.
    """

    def __init__(self, target: float, start: int, stride: int, least: int, most: int) -> None:
        """Make a search.

        Args:
            start: index to begin with.
            stride: first step of the widening, >= 1.
            least: below this index it gives up: the target is out of reach.
            most: above this index it gives up: the rate is as good as unlimited.
        """
        self.target = target
        self.low: int | None = None
        self.high: int | None = None
        self.attained: dict[int, float] = {}
        self._next, self._stride = start, stride
        self._least, self._most = least, most

    @property
    def is_done(self) -> bool:
        """Whether the bracket is one step, or the search has left its range."""
        if self.low is not None and self.high is not None:
            return self.high - self.low <= 1
        if self.low is None:
            return self.high is not None and self.high <= self._least
        return self.low >= self._most

    @property
    def next_index(self) -> int:
        """Where to measure next."""
        return self._next

    def tell(self, index: int, attainment: float) -> None:
        """Take the attainment measured at an index."""
        self.attained[index] = attainment
        if attainment >= self.target:
            self.low = index if self.low is None else max(self.low, index)
        else:
            self.high = index if self.high is None else min(self.high, index)
        if self.low is not None and self.high is not None:
            self._next = (self.low + self.high) // 2
        elif self.low is None:
            assert self.high is not None
            self._next = max(self.high - self._stride, self._least)
            self._stride *= 2
        else:
            self._next = min(self.low + self._stride, self._most)
            self._stride *= 2

    @property
    def index(self) -> float | None:
        """The (interpolated) index where attainment passes the target.

        None: out of reach, or not bracketed yet. Before `is_done` the bracket is wider than a step.
        """
        if self.low is None or (self.high is None and not self.is_done):
            return None
        if self.high is None:
            return float(self.low)
        above, below = self.attained[self.low], self.attained[self.high]
        part = (above - self.target) / (above - below) if above > below else 0.0
        return self.low + part * (self.high - self.low)
