"""`flowprefill bench goodput`: the highest rate at which policies meet their objectives.

command.py has the flags and the order of work; backends measure, searches ask, reports show.
"""

from __future__ import annotations

from flowprefill.bench.goodput.command import add_arguments, run

__all__ = ["add_arguments", "run"]
