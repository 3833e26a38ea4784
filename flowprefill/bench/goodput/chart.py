"""Charts as data: what the HTML report and the PNGs of `bench goodput` show. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

# Okabe and Ito's colours, told apart also by those who see fewer of them; later ones are dashed.
# Ours is the first, drawn last and wider.
COLOURS = (
    "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8A8A8A", "#7A5AC8",
    "#882255", "#B0B000", "#444444", "#BBBBBB",
)  # fmt: skip
MOST_POINTS = 200  # of a distribution
FIRST_DASHED = 6
Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Series:
    """One line.

    Attributes:
        points: (x, y) by rising x.
        colour: index in `COLOURS`; the same setting has the same in every chart.
    """

    name: str
    points: Sequence[Point]
    colour: int

    @property
    def is_ours(self) -> bool:
        """Whether it is drawn wider, over the others."""
        return self.colour == 0

    @property
    def is_dashed(self) -> bool:
        """Whether its line is dashed."""
        return self.colour >= FIRST_DASHED


@dataclass(frozen=True, slots=True)
class LineChart:
    """Lines over one axis.

    Attributes:
        name: of files and anchors: letters and dashes.
        is_log: whether x is shown logarithmically.
        marks: y values with a dashed line, e.g. targets.
        x_range, y_range: what is shown; None: what the points take.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    is_log: bool = False
    marks: Sequence[float] = ()
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None

    def ranges(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Return the ranges of x and y that are shown."""
        points = [point for one in self.series for point in one.points] or [(1.0, 1.0)]
        xs, ys = zip(*points, strict=True)
        x_range = self.x_range or (min(xs), max(xs))
        y_range = self.y_range or (min(0.0, *ys), max(ys))
        return _widened(x_range), _widened(y_range)


@dataclass(frozen=True, slots=True)
class Block:
    """One stretch of a timeline; group: index in the timeline's groups."""

    begin: float
    end: float
    group: int


@dataclass(frozen=True, slots=True)
class Timeline:
    """Rows of blocks over time.

    Attributes:
        rows: name and blocks of each row, top row first.
        groups: what the blocks' colours mean.
    """

    name: str
    title: str
    x_label: str
    rows: Sequence[tuple[str, Sequence[Block]]]
    groups: Sequence[str]
    x_range: tuple[float, float] = field(default=(0.0, 1.0))


def _widened(ends: tuple[float, float]) -> tuple[float, float]:
    low, high = ends
    return (low, high) if high > low else (low, low + (abs(low) or 1.0))


def cumulative(values: Sequence[float]) -> list[Point]:
    """Return the cumulative distribution of values as points of rising value and share."""
    ordered = sorted(values)
    count = len(ordered)
    step = max(1, count // MOST_POINTS)
    indices = sorted({*range(0, count, step), count - 1}) if count else []
    return [(ordered[n], (n + 1) / count) for n in indices]


def ticks(low: float, high: float, is_log: bool = False) -> list[float]:
    """Return round values within a range, about five."""
    if is_log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        factors = (1,) if len(powers) > 4 else (1, 2, 5)
        found = [factor * 10.0**power for power in powers for factor in factors]
        return [value for value in found if low * 0.999 <= value <= high * 1.001]
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((one * power for one in (1, 2, 5, 10)), key=lambda one: abs(one - rough))
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_text(value: float) -> str:
    """Return a tick's label, without rounding noise."""
    return f"{value:.6g}"
