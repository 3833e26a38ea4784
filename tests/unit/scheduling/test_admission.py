"""Admission: each bound, and what the refusal says."""

from __future__ import annotations

import pytest

from flowprefill.scheduling import Job, Load
from flowprefill.scheduling.admission import AdmissionLimits, refusal_of

JOB = Job("a", 10.0, 100, 0, 10.5, on_miss="drop")


def test_refusal_nothing_waiting_none() -> None:
    limits = AdmissionLimits(max_waiting=1, max_waiting_tokens=50, max_backlog_s=1.0)
    assert refusal_of(JOB, Load(), limits, 10.0, 0.1) is None


@pytest.mark.parametrize(
    ("load", "limits", "reason", "message"),
    [
        (Load(5, 500, 10.0), AdmissionLimits(max_waiting=5), "waiting", "5 requests"),
        (Load(5, 500, 10.0), AdmissionLimits(max_waiting_tokens=599), "tokens", "over 599"),
        (Load(5, 500, 10.0), AdmissionLimits(max_backlog_s=9.0), "backlog", "10.0 s"),
        (Load(5, 500, 10.0), AdmissionLimits(refuse_late=True), "deadline", "0.600 s"),
    ],
)
def test_refusal_over_a_bound_names_it(
    load: Load, limits: AdmissionLimits, reason: str, message: str
) -> None:
    refusal = refusal_of(JOB, load, limits, 10.0, 0.6)
    assert refusal is not None
    assert refusal.reason == reason
    assert message in refusal.message
    assert 1.0 <= refusal.retry_after_s <= 120.0


def test_refusal_late_but_demoting_none() -> None:
    job = Job("a", 10.0, 100, 0, 10.5, on_miss="demote")
    assert refusal_of(job, Load(5, 500, 10.0), AdmissionLimits(refuse_late=True), 10.0, 9.0) is None


def test_limits_bad_value_names_field() -> None:
    with pytest.raises(ValueError, match="max_waiting: got 0"):
        AdmissionLimits(max_waiting=0)
