"""The policies by name; the scheduler calls `make_policy` with the name from the configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowprefill.config import POLICIES
from flowprefill.errors import ConfigError
from flowprefill.scheduling.policies.base import BasePolicy, Packing, Policy
from flowprefill.scheduling.policies.edf import EarliestDeadlineFirst
from flowprefill.scheduling.policies.fcfs import FirstComeFirstServed
from flowprefill.scheduling.policies.priority import FixedPriority
from flowprefill.scheduling.policies.s_edf_paper import PublishedSlackEdf
from flowprefill.scheduling.policies.shortest_first import ShortestFirst
from flowprefill.scheduling.policies.slack_edf import SlackEdf

if TYPE_CHECKING:
    from flowprefill.scheduling.cost_model import CostModel
    from flowprefill.scheduling.interface import SchedulerSettings

__all__ = ["BasePolicy", "Packing", "Policy", "make_policy"]

_BY_NAME: dict[str, type[BasePolicy]] = {
    policy.name: policy
    for policy in (
        SlackEdf, PublishedSlackEdf, EarliestDeadlineFirst, FirstComeFirstServed, ShortestFirst,
        FixedPriority,
    )
}  # fmt: skip


def make_policy(name: str, cost_model: CostModel, settings: SchedulerSettings) -> Policy:
    """Build a policy by its configured name.

    Raises:
        ConfigError: unknown name.
    """
    if name not in _BY_NAME:
        raise ConfigError(
            f"policy: got {name!r}, expected one of {', '.join(POLICIES)}", param="policy"
        )
    return _BY_NAME[name](cost_model, settings)
