"""Draws charts as PNG files with matplotlib, e.g. for a README."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowprefill.bench.goodput.chart import COLOURS, LineChart, Timeline, tick_text, ticks

WIDTH_INCHES, HEIGHT_INCHES, DPI = 8.0, 4.4, 160
ROW_INCHES = 0.32


def draw(charts: Sequence[LineChart | Timeline], folder: Path) -> list[Path]:
    """Draw each chart to ``NAME.png`` in a folder; returns the files.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    style: dict[Any, Any] = {"font.size": 9, "font.family": "DejaVu Sans"}
    paths = []
    with plt.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of matplotlib's own dependencies
        for chart in charts:
            height = HEIGHT_INCHES
            if isinstance(chart, Timeline):
                height = 1.6 + ROW_INCHES * len(chart.rows)
            figure, axis = plt.subplots(figsize=(WIDTH_INCHES, height))
            if isinstance(chart, LineChart):
                _draw_lines(axis, chart)
            else:
                _draw_timeline(axis, chart)
            axis.set_title(chart.title, loc="left", fontsize=10)
            for side in ("top", "right"):
                axis.spines[side].set_visible(False)
            figure.tight_layout()
            paths.append(folder / f"{chart.name}.png")
            figure.savefig(paths[-1], dpi=DPI)
            plt.close(figure)
    return paths


def _draw_lines(axis: Any, chart: LineChart) -> None:
    (x_low, x_high), (y_low, y_high) = chart.ranges()
    for series in chart.series:
        xs, ys = zip(*series.points, strict=True) if series.points else ((), ())
        axis.plot(
            xs, ys, color=COLOURS[series.colour % len(COLOURS)], label=series.name,
            linewidth=2.6 if series.is_ours else 1.5, linestyle="--" if series.is_dashed else "-",
            zorder=3 if series.is_ours else 2,
        )  # fmt: skip
    for value in chart.marks:
        axis.axhline(value, color="#888888", linewidth=0.8, linestyle="--")
    if chart.is_log:
        x_low = max(x_low, 1e-6)
        axis.set_xscale("log")
        places = ticks(x_low, x_high, is_log=True)
        axis.set_xticks(places, [tick_text(value) for value in places])
        axis.minorticks_off()
    axis.set_xlim(x_low, x_high)
    axis.set_ylim(y_low, y_high * 1.01)
    axis.set_xlabel(chart.x_label)
    axis.set_ylabel(chart.y_label)
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_timeline(axis: Any, chart: Timeline) -> None:
    from matplotlib.patches import Patch

    for row, (_, blocks) in enumerate(chart.rows):
        spans = [(block.begin, block.end - block.begin) for block in blocks]
        colours = [COLOURS[block.group % len(COLOURS)] for block in blocks]
        axis.broken_barh(spans, (len(chart.rows) - row - 0.9, 0.8), facecolors=colours, lw=0)
    axis.set_xlim(*chart.x_range)
    axis.set_yticks([len(chart.rows) - row - 0.5 for row in range(len(chart.rows))])
    axis.set_yticklabels([name for name, _ in chart.rows])
    axis.set_xlabel(chart.x_label)
    handles = [
        Patch(facecolor=COLOURS[n % len(COLOURS)], label=name)
        for n, name in enumerate(chart.groups)
    ]
    axis.legend(handles=handles, frameon=False, fontsize=8, loc="center left",
                bbox_to_anchor=(1.0, 0.5))  # fmt: skip
