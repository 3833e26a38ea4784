"""`flowprefill bench goodput`: the highest rate at which policies meet their objectives.

arguments.py has the flags, command.py the order of work; backends measure, searches ask, reports
show.
"""

from __future__ import annotations

# First: the native module, which the simulator loads, links torch's libraries. Where it came before
# torch of a CUDA build, this command once ended in a crash, whose cause was not found.
import torch  # noqa: F401

from flowprefill.bench.goodput.arguments import add_arguments
from flowprefill.bench.goodput.command import run

__all__ = ["add_arguments", "run"]
