"""What a scheduling policy of one's own is written with; `Engine(..., policy=...)` takes one.

docs/python.md says what a policy answers; examples/4_own_policy.py is one.
"""

from __future__ import annotations

from flowprefill.scheduling.policies.base import BasePolicy, Packing, Policy
from flowprefill.scheduling.work import Rank, Verdict, Work

__all__ = ["BasePolicy", "Packing", "Policy", "Rank", "Verdict", "Work"]
