"""Draws charts as inline SVG whose text and lines follow the page's colours; for the HTML report.

Pure: text in, text out. Every name that comes from outside is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from flowprefill.bench.goodput.chart import COLOURS, LineChart, Timeline, tick_text, ticks

WIDTH, HEIGHT = 720, 330
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 10, 44
ROW_HEIGHT, LABEL_WIDTH = 26, 216
LEGEND_LINE, LEGEND_COLUMNS = 18, 2


def line_chart(chart: LineChart) -> str:
    """Return a chart as one ``<svg>`` with its legend below."""
    (x_low, x_high), (y_low, y_high) = chart.ranges()
    if chart.is_log:
        x_low = max(x_low, 1e-6)

    def x_of(value: float) -> float:
        if chart.is_log:
            share = math.log(max(value, x_low) / x_low) / math.log(x_high / x_low)
        else:
            share = (value - x_low) / (x_high - x_low)
        return LEFT + min(max(share, 0.0), 1.0) * (WIDTH - LEFT - RIGHT)

    def y_of(value: float) -> float:
        share = (value - y_low) / (y_high - y_low)
        return HEIGHT - BOTTOM - min(max(share, 0.0), 1.0) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for value in ticks(y_low, y_high):
        parts.append(_line(LEFT, y_of(value), WIDTH - RIGHT, y_of(value), "grid"))
        parts.append(_text(LEFT - 6, y_of(value) + 4, tick_text(value), "end"))
    for value in ticks(x_low, x_high, chart.is_log):
        parts.append(_line(x_of(value), TOP, x_of(value), HEIGHT - BOTTOM, "grid"))
        parts.append(_text(x_of(value), HEIGHT - BOTTOM + 16, tick_text(value), "middle"))
    for value in chart.marks:
        parts.append(_line(LEFT, y_of(value), WIDTH - RIGHT, y_of(value), "mark"))
    for series in sorted(chart.series, key=lambda one: one.is_ours):
        points = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in series.points)
        colour = COLOURS[series.colour % len(COLOURS)]
        kind = "ours" if series.is_ours else "dashed" if series.is_dashed else "plain"
        parts.append(f'<polyline class="{kind}" points="{points}" stroke="{colour}"/>')
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, chart.x_label, "middle"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    label = escape(chart.y_label)
    parts.append(
        f'<text transform="translate(14 {middle:.0f}) rotate(-90)" text-anchor="middle">{label}'
        "</text>"
    )
    entries = [(one.name, COLOURS[one.colour % len(COLOURS)]) for one in chart.series]
    legend, height = _legend(entries, HEIGHT)
    return _svg(chart.title, [*parts, *legend], height)


def timeline(chart: Timeline) -> str:
    """Return rows of blocks as one ``<svg>`` with its legend below."""
    low, high = chart.x_range
    bottom = TOP + ROW_HEIGHT * len(chart.rows)

    def x_of(value: float) -> float:
        share = min(max((value - low) / (high - low), 0.0), 1.0)
        return LABEL_WIDTH + share * (WIDTH - LABEL_WIDTH - RIGHT)

    parts = []
    for value in ticks(low, high):
        parts.append(_line(x_of(value), TOP, x_of(value), bottom, "grid"))
        parts.append(_text(x_of(value), bottom + 16, tick_text(value), "middle"))
    for row, (name, blocks) in enumerate(chart.rows):
        top = TOP + row * ROW_HEIGHT
        parts.append(_text(LABEL_WIDTH - 6, top + ROW_HEIGHT / 2 + 4, name, "end"))
        for block in blocks:
            begin, end = x_of(block.begin), x_of(block.end)
            colour = COLOURS[block.group % len(COLOURS)]
            parts.append(
                f'<rect x="{begin:.2f}" y="{top + 4}" width="{max(end - begin, 0.3):.2f}" '
                f'height="{ROW_HEIGHT - 8}" fill="{colour}"/>'
            )
    middle = (LABEL_WIDTH + WIDTH - RIGHT) / 2
    parts.append(_text(middle, bottom + 34, chart.x_label, "middle"))
    entries = [(name, COLOURS[n % len(COLOURS)]) for n, name in enumerate(chart.groups)]
    legend, height = _legend(entries, bottom + 44)
    return _svg(chart.title, [*parts, *legend], height)


def _svg(title: str, parts: Sequence[str], height: float) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'
        + "".join(parts)
        + "</svg>"
    )


def _legend(entries: Sequence[tuple[str, str]], top: float) -> tuple[list[str], float]:
    parts = []
    for number, (name, colour) in enumerate(entries):
        x = LEFT + number % LEGEND_COLUMNS * (WIDTH - LEFT) / LEGEND_COLUMNS
        y = top + 12 + number // LEGEND_COLUMNS * LEGEND_LINE
        parts.append(f'<rect x="{x:.0f}" y="{y - 5}" width="18" height="5" fill="{colour}"/>')
        parts.append(_text(x + 24, y, name, "start"))
    lines = -(-len(entries) // LEGEND_COLUMNS)
    return parts, top + 6 + lines * LEGEND_LINE


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
