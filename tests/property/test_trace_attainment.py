"""SLO attainment of the policies on the published trace's lengths, on the virtual device."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from virtual_device import Client, VirtualDevice, cost_model

from flowprefill.scheduling import Job, Scheduler, SchedulerSettings

TRACE = Path(os.environ.get("FLOWPREFILL_TRACES", "traces"), "qwen_traceA_0.0min_2.0min.jsonl")
TTFT_S = {"text": 0.25, "image": 0.5, "search": 4.0, "file": 6.0}


def attainment(policy: str, rate_scale: float) -> float:
    """Return the share of the trace's requests whose first token is in time."""
    clients = []
    for number, line in enumerate(TRACE.read_text().splitlines()):
        row = json.loads(line)
        at = 1.0 + row["timestamp"] / rate_scale
        job = Job(f"job-{number}", at, row["input_length"], 0, at + TTFT_S[row["type"]])
        clients.append(Client(job))
    scheduler = Scheduler(policy, cost_model(8_000.0), SchedulerSettings(max_batch_tokens=2048))
    VirtualDevice(scheduler, clients, noise=0.1).play()
    return sum(client.is_on_time for client in clients) / len(clients)


@pytest.mark.skipif(not TRACE.exists(), reason=f"no trace at {TRACE}")
@pytest.mark.parametrize("rate_scale", [1.0, 1.5, 2.0])
def test_slack_edf_published_trace_attains_at_least_fcfs(rate_scale: float) -> None:
    shares = {p: attainment(p, rate_scale) for p in ("slack_edf", "s_edf_paper", "edf", "fcfs")}
    print(rate_scale, shares)
    assert shares["slack_edf"] >= shares["fcfs"]
    assert shares["slack_edf"] >= 0.75
