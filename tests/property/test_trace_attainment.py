"""SLO attainment of the policies on traces like the published one, on the virtual device."""

from __future__ import annotations

import pytest
from virtual_device import Client, VirtualDevice, cost_model

from flowprefill.scheduling import Job, Scheduler
from flowprefill.traces.synthetic import synthetic_trace

TTFT_S = {"text": 0.25, "image": 0.5, "search": 4.0, "file": 6.0}
TOKENS_PER_S = 13_000.0
SEEDS = range(5)


def attainment(policy: str, load: float, seed: int) -> float:
    """Return the share of a trace's requests whose first token is in time at a load."""
    requests = synthetic_trace(seed, 250).requests
    model = cost_model(TOKENS_PER_S)
    work_s = sum(model.prefill_s(request.prompt_tokens) for request in requests)
    stretch = work_s / load / requests[-1].at_s
    clients = []
    for number, request in enumerate(requests):
        at = 1.0 + request.at_s * stretch
        due = at + TTFT_S[request.service_class]
        clients.append(Client(Job(f"job-{number}", at, request.prompt_tokens, 0, due)))
    VirtualDevice(Scheduler(policy, model), clients, noise=0.1, seed=seed).play()
    return sum(client.is_on_time for client in clients) / len(clients)


@pytest.mark.parametrize("load", [0.7, 1.2, 1.6])
def test_slack_edf_keeps_more_on_time_than_the_published_rule_and_fcfs(load: float) -> None:
    def mean(policy: str) -> float:
        return sum(attainment(policy, load, seed) for seed in SEEDS) / len(SEEDS)

    own, published, arrival = mean("slack_edf"), mean("s_edf_paper"), mean("fcfs")
    print(load, own, published, arrival)
    assert own >= published + (0.01 if load > 1.5 else -0.001)
    assert own >= arrival + 0.3
