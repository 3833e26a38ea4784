"""`flowprefill bench goodput`: the highest rate at which policies meet their objectives.

arguments.py has the flags, command.py the order of work; backends measure, searches ask, reports
show.
"""

from __future__ import annotations

from flowprefill.bench.goodput.arguments import add_arguments
from flowprefill.bench.goodput.command import run

__all__ = ["add_arguments", "run"]
