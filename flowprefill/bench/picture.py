"""Draws mixed rounds as timelines: who waited, who ran, and how long; used by the demo."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowprefill.bench.mixed_round import LONG_RUN, Answer, Round
from flowprefill.bench.statistics import median

# Okabe and Ito's colours: told apart also by those who see fewer of them.
LONG, WAITING, RUNNING = "#0072B2", "#E69F00", "#009E73"
TEXT = "#222222"
WIDTH_INCHES, DPI = 9.0, 200
TOUCHING_S = 2e-4  # segments closer than this are drawn as one
ZOOM_BEFORE_S, ZOOM_AFTER = 0.012, 1.35  # the enlarged view, around one short prompt
LONG_HEIGHT, SHORT_HEIGHT = 1.6, 0.7


def draw(off: Round, on: Round, path: Path) -> None:
    """Draw two rounds one above the other and, below, one preemption enlarged.

    Args:
        off: where a short prompt has to wait for the long one.
        on: where it does not.
        path: a .png or .svg file to write.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    style: dict[Any, Any] = {
        "font.size": 9, "font.family": "DejaVu Sans", "text.color": TEXT, "axes.labelcolor": TEXT,
        "xtick.color": TEXT, "svg.fonttype": "path", "svg.hashsalt": "flowprefill",
    }  # fmt: skip
    rows = len(on.shorts)
    heights = [rows + 4, rows + 4, 4.6]
    with plt.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of matplotlib's own dependencies
        figure, axes = plt.subplots(
            3, 1, figsize=(WIDTH_INCHES, 0.21 * sum(heights) + 1.7), height_ratios=heights
        )
        last_s = 1.07 * max(off.elapsed_s, on.elapsed_s)
        _draw_round(axes[0], off, "Preemption off", last_s)
        _draw_round(axes[1], on, "Preemption on", last_s)
        axes[1].set_xlabel("seconds since the long prompt was submitted")
        _draw_zoom(axes[2], on)
        _draw_head(figure, off, on)
        figure.tight_layout(rect=(0, 0, 1, 1 - 0.45 / figure.get_figheight()), h_pad=1.4)
        figure.savefig(path, dpi=DPI)
        plt.close(figure)


def seconds_text(seconds: float) -> str:
    """Return a time as people say it: ``8.3 s`` or ``62 ms``."""
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"


def merged(spans: Sequence[tuple[float, float]], gap_s: float) -> list[tuple[float, float]]:
    """Join spans, in order of time, that lie no further apart than a gap."""
    joined: list[tuple[float, float]] = []
    for begin_s, end_s in spans:
        if joined and begin_s - joined[-1][1] <= gap_s:
            joined[-1] = (joined[-1][0], max(end_s, joined[-1][1]))
        else:
            joined.append((begin_s, end_s))
    return joined


def _draw_head(figure: Any, off: Round, on: Round) -> None:
    from matplotlib.patches import Patch

    medians = [seconds_text(median(short.ttft_s for short in one.shorts)) for one in (off, on)]
    figure.suptitle(
        f"A short prompt during a long one: first token after {medians[1]} instead of {medians[0]}"
        " (median)",
        fontsize=11.5, fontweight="bold", x=0.5, y=1 - 0.1 / figure.get_figheight(), va="top",
    )  # fmt: skip
    names = (
        (LONG, "long prompt runs"),
        (WAITING, "short prompt waits"),
        (RUNNING, "short prompt runs"),
    )
    figure.legend(
        handles=[Patch(facecolor=colour, label=label) for colour, label in names],
        loc="upper center",
        ncols=3,
        frameon=False,
        bbox_to_anchor=(0.5, 1 - 0.3 / figure.get_figheight()),
    )


def _draw_round(axis: Any, one: Round, title: str, last_s: float) -> None:
    zero_s = one.long.submitted_s
    rows = len(one.shorts)
    spans = [(s.start_s - zero_s, s.end_s - zero_s) for s in one.segments if s.run == LONG_RUN]
    bars = [(begin, end - begin) for begin, end in merged(spans, TOUCHING_S)]
    axis.broken_barh(bars, (rows + 1.2, LONG_HEIGHT), facecolors=LONG, linewidth=0)
    long_s = one.long.ttft_s
    axis.text(long_s + 0.006 * last_s, rows + 1.2 + LONG_HEIGHT / 2, seconds_text(long_s),
              va="center", color=LONG, fontweight="bold")  # fmt: skip
    for row, short in enumerate(one.shorts):
        _draw_short(axis, short, rows - row, zero_s, last_s)
    axis.set_title(f"{title} (granularity {one.granularity})", loc="left", fontsize=9.5)
    axis.set_xlim(0, last_s)
    axis.set_ylim(0.3, rows + 1.2 + LONG_HEIGHT + 0.4)
    axis.set_yticks([rows + 1.2 + LONG_HEIGHT / 2, (rows + 1) / 2])
    axis.set_yticklabels(["long", f"{rows} short"])
    _clean(axis)


def _draw_short(axis: Any, short: Answer, row: int, zero_s: float, last_s: float) -> None:
    waits_s = short.started_s - short.submitted_s
    begin = (short.submitted_s - zero_s, row - SHORT_HEIGHT / 2)
    axis.broken_barh([(begin[0], waits_s)], (begin[1], SHORT_HEIGHT), facecolors=WAITING, lw=0)
    runs = (begin[0] + waits_s, short.ttft_s - waits_s)
    axis.broken_barh([runs], (begin[1], SHORT_HEIGHT), facecolors=RUNNING, lw=0)
    end = sum(runs) + 0.006 * last_s
    axis.text(end, row, seconds_text(short.ttft_s), va="center", fontsize=7, color=TEXT)


def _draw_zoom(axis: Any, one: Round) -> None:
    """Draw the short prompt whose TTFT is nearest to the median, segment by segment."""
    middle_s = median(short.ttft_s for short in one.shorts)
    short = min(one.shorts, key=lambda s: abs(s.ttft_s - middle_s))
    zero_s = short.submitted_s
    last_s = ZOOM_AFTER * short.ttft_s
    waits_s = short.started_s - zero_s
    for segment in one.segments:
        begin_s, end_s = segment.start_s - zero_s, segment.end_s - zero_s
        if end_s < -ZOOM_BEFORE_S or begin_s > last_s:
            continue
        is_long = segment.run == LONG_RUN
        axis.broken_barh(
            [(begin_s * 1e3, (end_s - begin_s) * 1e3)], (2, 1) if is_long else (0.5, 1),
            facecolors=LONG if is_long else RUNNING, edgecolor="white", linewidth=0.5,
        )  # fmt: skip
    axis.broken_barh([(0, waits_s * 1e3)], (0.5, 1), facecolors=WAITING, linewidth=0)
    axis.axvline(0, color=TEXT, linewidth=0.8, linestyle=":")
    axis.set_xlim(-ZOOM_BEFORE_S * 1e3, last_s * 1e3)
    axis.set_ylim(0.2, 3.2)
    axis.set_yticks([2.5, 1.0])
    axis.set_yticklabels(["long", short.request_id.replace("-", " ")])
    axis.set_title(
        f"One of them enlarged: it waits {waits_s * 1e3:.1f} ms for a boundary, runs, and the long "
        "prompt goes on where it stopped",
        loc="left", fontsize=9.5,
    )  # fmt: skip
    axis.set_xlabel("milliseconds since the short prompt was submitted; each block is one segment")
    _clean(axis)


def _clean(axis: Any) -> None:
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
