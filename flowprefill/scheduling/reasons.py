"""Reason: what a decision says of itself, in words; docs/api.md lists them.

The scheduler and its policies give them; logs, metrics, `/debug/decisions` and `explain` show them.
A policy of one's own may say anything.
"""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Why something is dispatched, suspended, left running or dropped."""

    # What is dispatched.
    DEVICE_IS_FREE = "the device is free"
    NOTHING_TO_PREFILL = "nothing to prefill"
    STEP_IS_DUE = "a decode step is due"
    IS_BEFORE = "is before the running prefill"
    GIVEN_UP = "the running work is given up for others"
    TAKES_SLACK = "the running work would take too much of a slack"
    CAN_BE_ON_TIME = "can be on time, the running work cannot"
    BACKGROUND_YIELDS = "the running work is background"
    MUCH_SHORTER = "is much shorter"
    STEP_COSTS_DEADLINES = "deadlines would be missed behind the decode step"
    GRANTED_SLICE = "is granted a slice, late for long"
    GUARANTEED = "its class is guaranteed this time"
    # Why what runs goes on.
    NOTHING_ELSE = "nothing else to prefill"
    STEP_RUNS = "a decode step is running"
    NOTHING_IS_BEFORE = "nothing waiting is before the running prefill"
    FIRST_COME = "first come, first served"
    NONE_CAN_BE_ON_TIME = "nothing waiting can be on time"
    ENDS_IN_TIME = "the running work ends before anyone's slack runs out"
    NO_DEADLINE_AT_STAKE = "no deadline is at stake"
    HAS_SLICE = "the running work was granted a slice"
    RUNNING_IS_GUARANTEED = "the running work's class is guaranteed this time"
    # The rest.
    NOTHING_TO_RUN = "nothing to run"
    OUT_OF_REACH = "its time to first token can no longer be met"
