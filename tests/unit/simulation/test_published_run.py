"""The simulator against the published prototype's own run, request by request.

Needs the traces' folder, named by FLOWPREFILL_TRACES.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from flowprefill.config import Granularity
from flowprefill.scheduling import SchedulerSettings
from flowprefill.simulation import Configuration, Profile, Result, simulate
from flowprefill.traces import TraceRequest

FOLDER = Path(os.environ.get("FLOWPREFILL_TRACES", "traces"))
TRACE = FOLDER / "qwen_traceA_0.0min_2.0min.jsonl"
RUN = FOLDER / "flowprefill_notebook_run_rate2.0.csv"
TTFT_S = {"text": 0.25, "image": 0.5, "search": 4.0, "file": 6.0}
SPECIAL_TOKENS = 2  # that the prototype added to each prompt
PUBLISHED_ATTAINMENT = 318 / 323

pytestmark = pytest.mark.skipif(
    not (TRACE.exists() and RUN.exists()), reason=f"no published run in {FOLDER}"
)


def replay(profile: Profile) -> Result:
    """Play the workload at rate scale 2 as the prototype did."""
    rows = [json.loads(line) for line in TRACE.read_text().splitlines()]
    requests = [
        TraceRequest(
            row["timestamp"] / 2, row["input_length"] + SPECIAL_TOKENS, 1, row["type"],
            TTFT_S[row["type"]],
        )
        for row in rows
    ]  # fmt: skip
    settings = SchedulerSettings(max_batch_tokens=2048)
    return simulate(
        requests, Configuration("s_edf_paper", Granularity("operator"), settings), profile
    )


def median_error(result: Result, half: int) -> float:
    """Return the median relative error over every second request."""
    errors = []
    for row in csv.DictReader(RUN.read_text().splitlines()):
        number, measured_s = int(row["chat_id"]), float(row["ttft_s"])
        if number % 2 == half:
            errors.append(abs(result.outcomes[number].ttft_s - measured_s) / measured_s)
    assert len(errors) > 150
    return statistics.median(errors)


def test_published_run_built_in_profile_gives_its_attainment_and_its_times() -> None:
    result = replay(Profile.load("llama-3.1-8b@a800-prototype"))
    assert result.attainment == pytest.approx(PUBLISHED_ATTAINMENT, abs=0.02)
    assert median_error(result, 0) < 0.15
    assert median_error(result, 1) < 0.15


def test_published_run_profile_fitted_on_one_half_holds_on_the_other() -> None:
    base = Profile.load("llama-3.1-8b@a100")
    candidates = [
        replace(base.with_rates(gemm_flops_per_s=gemm, run_overhead_s=5e-3), response_s=response_s)
        for gemm, response_s in itertools.product((1.9e14, 2.1e14, 2.3e14, 2.5e14), (0.0, 0.015))
    ]
    results = [replay(profile) for profile in candidates]
    for half in (0, 1):
        fitted = min(results, key=lambda result: median_error(result, half))
        assert median_error(fitted, 1 - half) < 0.15
        assert fitted.attainment == pytest.approx(PUBLISHED_ATTAINMENT, abs=0.02)
