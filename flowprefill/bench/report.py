"""Report: a bench's rows with machine, commit and command; printed as a table, written as JSON."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowprefill.bench import doctor
from flowprefill.version import __version__

Row = dict[str, Any]
SOURCES = Path(__file__).resolve().parents[2]
# Findings of `flowprefill doctor` that timings depend on.
MACHINE_FIELDS = (
    "processor", "instruction_sets", "cores_available", "memory_gib", "system", "python", "torch",
)  # fmt: skip


def machine() -> dict[str, Any]:
    """Return what timings depend on: processor, cores, instruction sets, memory, torch."""
    found = doctor.system_findings()
    return {name: found[name] for name in MACHINE_FIELDS}


def load_average() -> list[float]:
    """Return the load of the last 1, 5 and 15 minutes: how busy the machine was with others."""
    return [round(value, 2) for value in os.getloadavg()]


def commit() -> str:
    """Return the commit of the sources, with ``+changes`` if files differ from it.

    Outside of a checkout, e.g. in an installed wheel: the version.
    """

    def git(*arguments: str) -> str:
        result = subprocess.run(
            ["git", *arguments], cwd=SOURCES, capture_output=True, text=True, check=True, timeout=20
        )
        return result.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != SOURCES:
            return f"version {__version__}"
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "csrc", "flowprefill")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return f"version {__version__}"


def command() -> str:
    """Return the command line of this process, as one would type it again."""
    if "-m" in sys.orig_argv[1:2]:
        return shlex.join(["python", *sys.orig_argv[1:]])
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def json_path(text: str) -> Path:
    """Check where a report is to go before anything is measured; for ``--json``."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a file in an existing folder")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a file that may be written")
    return path


@dataclass
class Report:
    """One bench's result; make it before measuring, add rows, then `write`.

    Attributes:
        bench: its name.
        settings: what was measured how: model, rounds, lengths, seed.
        rows: one flat object each, numbers in SI units; NaN becomes null.
        extra: further keys of the top level.
    """

    bench: str
    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=machine)
    load_before: list[float] = field(default_factory=load_average)
    started_s: float = field(default_factory=time.time)

    def to_dict(self) -> dict[str, Any]:
        """Return the object that is written."""
        load = {"load_before": self.load_before, "load_after": load_average()}
        whole = {
            "bench": self.bench,
            "machine": self.machine | load,
            "commit": commit(),
            "command": command(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started_s)),
            "duration_s": round(time.time() - self.started_s, 1),
            "settings": self.settings,
            **self.extra,
            "rows": self.rows,
        }
        finite: dict[str, Any] = _finite(whole)
        return finite

    def write(self, path: Path | None) -> None:
        """Write the JSON, if a path was given."""
        if path is not None:
            path.write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(title: str, rows: Sequence[Row], columns: Mapping[str, str]) -> None:
    """Print rows as a table on stdout.

    Args:
        columns: row key -> heading. A heading that ends in ``ms`` shows seconds as milliseconds.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for key, heading in columns.items():
        is_text = all(isinstance(row.get(key), str) for row in rows)
        table.add_column(heading, justify="left" if is_text else "right")
    for row in rows:
        table.add_row(*(shown(row.get(key), heading) for key, heading in columns.items()))
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print(table)


def shown(value: Any, heading: str) -> str:
    """Return a table's cell as text; the heading says in what unit, see `print_table`."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if not isinstance(value, float):
        return str(value)
    if heading.rstrip().endswith("ms"):
        value *= 1e3
    if heading.endswith("%"):
        return f"{value * 100:.1f}"
    size = abs(value)
    return f"{value:,.0f}" if size >= 1000 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"
