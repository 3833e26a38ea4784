"""What a scheduling policy of one's own is written with; `Engine(..., policy=...)` takes one.

docs/python.md says what a policy answers; examples/4_own_policy.py is one.
"""

from __future__ import annotations

from flowprefill.scheduling.entry import Entry, Rank, Verdict
from flowprefill.scheduling.interface import Threshold
from flowprefill.scheduling.policies.base import BasePolicy, Packing, Policy

__all__ = ["BasePolicy", "Entry", "Packing", "Policy", "Rank", "Threshold", "Verdict"]
