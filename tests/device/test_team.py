"""The compute team of an executor: its threads spin from region to region, and end with it."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import Runner
from devices import on

from flowprefill import _core

GetRunner = Callable[..., Runner]
TRIES = 200
MANY_REGIONS = "chunk:16"  # few rows: every operator is a region of its own


def thread_statuses() -> list[dict[str, str]]:
    """Return what the kernel tells of each thread of this process."""
    statuses = []
    for task in Path("/proc/self/task").iterdir():
        try:
            lines = (task / "status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
        statuses.append(dict(line.split(":\t", 1) for line in lines if ":\t" in line))
    return statuses


def count_threads() -> Counter[str]:
    return Counter(status["Name"] for status in thread_statuses())


def voluntary_switches() -> int:
    """Return how often the threads of all executors have gone to sleep."""
    return sum(
        int(status["voluntary_ctxt_switches"])
        for status in thread_statuses()
        if status["Name"] in ("fp-executor", "fp-compute")
    )


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two threads need two cores")
@on(("cpu-team",))
def test_team_does_not_sleep_between_regions(runner: GetRunner) -> None:
    """With torch's own team alive. The best prefill counts: others may want the cores meanwhile."""
    torch.set_num_threads(max(2, torch.get_num_threads()))
    square = torch.ones(512, 512)
    assert (square @ square)[0, 0] == 512
    native = runner("llama-grouped")
    shares = []
    for _ in range(TRIES):
        slept, regions = voluntary_switches(), native.executor.num_regions
        native.prefill(native.ids, MANY_REGIONS)
        regions = native.executor.num_regions - regions
        assert regions > 100
        shares.append((voluntary_switches() - slept) / regions)
        if shares[-1] < 0.05:
            return
    if os.getloadavg()[0] > len(os.sched_getaffinity(0)) + 1:
        pytest.skip(f"others compute: the load is {os.getloadavg()[0]}")
    pytest.fail(f"the team slept in {min(shares):.0%} of its regions")


def test_one_thread_has_no_regions(runner: GetRunner) -> None:
    native = runner("llama-grouped")
    native.prefill(native.ids, MANY_REGIONS)
    assert native.executor.num_regions == 0


def test_team_ends_with_its_executor() -> None:
    before = count_threads()
    first, second = _core.Executor(3), _core.Executor(2)
    first.start()
    second.start()
    started = count_threads() - before
    first.stop()
    second.stop()
    deadline = time.monotonic() + 10
    while count_threads()["fp-compute"] > before["fp-compute"] and time.monotonic() < deadline:
        time.sleep(0.01)  # a joined thread stays in /proc for a moment
    assert count_threads()["fp-compute"] == before["fp-compute"]
    # A thread names itself, so one that has not run yet may still have its maker's name.
    assert started.total() == 5


@pytest.mark.parametrize("background", [False, True])
def test_background_is_the_policy_of_every_thread(background: bool) -> None:
    before = {int(status["Pid"]) for status in thread_statuses()}
    executor = _core.Executor(3, background)
    executor.start()
    wanted = os.SCHED_IDLE if background else os.sched_getscheduler(0)
    deadline = time.monotonic() + 10
    policies: list[int] = []
    while policies != [wanted] * 3 and time.monotonic() < deadline:
        time.sleep(0.01)  # a worker sets its own
        mine = {int(status["Pid"]) for status in thread_statuses()} - before
        policies = [os.sched_getscheduler(thread) for thread in mine]
    executor.stop()
    assert policies == [wanted] * 3
