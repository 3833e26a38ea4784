"""Puts rows and charts of `bench goodput` on one HTML page that needs nothing else. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from flowprefill.bench.goodput import svg
from flowprefill.bench.goodput.chart import LineChart, Timeline
from flowprefill.bench.report import shown

OPEN_ROWS = 24  # longer tables are shown on demand
STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --faint: #6b6b70; --paper: #ffffff;
  --line: #dcdce0; --head: #f4f4f6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8ea; --faint: #a0a0a6;
  --paper: #161618; --line: #3a3a3e; --head: #222226; } }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif;
  max-width: 1000px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
p.note, figcaption { color: var(--faint); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line); }
th { background: var(--head); font-weight: 600; } th:first-child, td:first-child {
  text-align: left; }
figure { margin: 1rem 0; } svg { width: 100%; height: auto; max-width: 760px; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
svg line.grid { stroke: var(--line); } svg line.mark { stroke: var(--faint);
  stroke-dasharray: 5 4; } svg polyline { fill: none; stroke-width: 1.6; }
svg polyline.ours { stroke-width: 3; } svg polyline.dashed { stroke-dasharray: 6 3; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; color: var(--faint); font-size: 12px; }
"""


def page(
    title: str,
    notes: Sequence[str],
    tables: Sequence[tuple[str, Sequence[Mapping[str, Any]], Mapping[str, str]]],
    charts: Sequence[LineChart | Timeline],
    about: Mapping[str, Any],
) -> str:
    """Return the page.

    Args:
        notes: sentences under the title.
        tables: heading, rows, and row key -> column heading of each table, as for
            `print_table`.
        about: machine, settings and command, shown at the end.
    """
    parts = [f"<h1>{escape(title)}</h1>"]
    parts += [f'<p class="note">{escape(note)}</p>' for note in notes]
    for heading, rows, columns in tables:
        table = _table(rows, columns)
        if len(rows) > OPEN_ROWS:
            table = f"<details><summary>{len(rows)} rows</summary>{table}</details>"
        parts += [f"<h2>{escape(heading)}</h2>", table]
    for chart in charts:
        drawn = svg.line_chart(chart) if isinstance(chart, LineChart) else svg.timeline(chart)
        name = escape(chart.title)
        parts.append(f'<h2 id="{escape(chart.name)}">{name}</h2><figure>{drawn}</figure>')
    text = escape(json.dumps(about, indent=1, default=str))
    parts.append(f"<h2>How it was measured</h2><pre>{text}</pre>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        + "\n".join(parts)
        + "</body></html>\n"
    )


def _table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in columns.values())
    lines = [f"<tr>{head}</tr>"]
    for row in rows:
        cells = (shown(row.get(key), name) for key, name in columns.items())
        lines.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    return '<div class="wide"><table>' + "".join(lines) + "</table></div>"
