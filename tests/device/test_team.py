"""The compute team of an executor: its threads spin from region to region, and end with it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import Runner
from devices import on
from engines import wait_for

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


def compute_threads() -> dict[int, str]:
    """Return the threads of all executors that have named themselves, by their ids."""
    names = {int(status["Pid"]): status["Name"] for status in thread_statuses()}
    return {thread: name for thread, name in names.items() if name.startswith("fp-")}


def others_seconds() -> float:
    """Return the time that anyone else, the host of a virtual machine too, has had our cores."""
    mine, busy = os.sched_getaffinity(0), 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *ticks = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in mine:
            user, nice, system, _, _, irq, softirq, stolen = (int(one) for one in ticks[:8])
            busy += user + nice + system + irq + softirq + stolen
    return busy / os.sysconf("SC_CLK_TCK") - time.process_time()


class Moment:
    """How often executors and workers have slept by now, and how long the workers have worked."""

    def __init__(self) -> None:
        statuses = [one for one in thread_statuses() if one["Name"].startswith("fp-")]
        workers = [int(one["Pid"]) for one in statuses if one["Name"] == "fp-compute"]
        self.sleeps = sum(int(one["voluntary_ctxt_switches"]) for one in statuses)
        # The clock of the processor time of a thread, as clock_getcpuclockid() makes it.
        self.worked_s = sum(time.clock_gettime((~thread << 3) | 6) for thread in workers)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two threads need two cores")
@on(("cpu-team",))
def test_team_does_not_sleep_between_regions(runner: GetRunner) -> None:
    """With torch's own team alive. The best prefill counts: others may want the cores meanwhile.

    A thread that waits for one without a core sleeps in the end, as it should, and one that never
    gets a core does not sleep. So a prefill counts if the worker had a core for half of the time,
    and nothing is shown where others had more than half of a core of those that two threads leave.
    """
    torch.set_num_threads(max(2, torch.get_num_threads()))
    square = torch.ones(512, 512)
    assert (square @ square)[0, 0] == 512
    native = runner("llama-grouped")
    shares = []
    spare = len(os.sched_getaffinity(0)) - 2
    begin_s, others_s = time.monotonic(), others_seconds()
    for _ in range(TRIES):
        start, regions = Moment(), native.executor.num_regions
        start_s = time.monotonic()
        native.prefill(native.ids, MANY_REGIONS)
        took_s = time.monotonic() - start_s  # without reading what hundreds of threads did
        end, regions = Moment(), native.executor.num_regions - regions
        assert regions > 100
        shares.append((end.sleeps - start.sleeps) / regions)
        worked_s = end.worked_s - start.worked_s
        if shares[-1] < 0.05 and worked_s > 0.5 * took_s:
            return
    cores = (others_seconds() - others_s) / (time.monotonic() - begin_s)
    if cores > spare + 0.5:
        pytest.skip(f"others computed: they had {cores:.1f} cores")
    pytest.fail(f"the team slept in {min(shares):.0%} of its regions, or did not work")


def test_one_thread_has_no_regions(runner: GetRunner) -> None:
    native = runner("llama-grouped")
    native.prefill(native.ids, MANY_REGIONS)
    assert native.executor.num_regions == 0


def test_team_ends_with_its_executor() -> None:
    before = compute_threads()
    first, second = _core.Executor(3), _core.Executor(2)
    first.start()
    second.start()
    started: set[int] = set()

    def all_have_names() -> bool:
        started.update(compute_threads().keys() - before)
        return len(started) == 5

    wait_for(all_have_names, "two executors and three workers")
    first.stop()
    second.stop()
    # A joined thread stays in /proc for a moment.
    wait_for(lambda: not started & compute_threads().keys(), "none of them is left")


@pytest.mark.parametrize("background", [False, True])
def test_background_is_the_policy_of_every_thread(background: bool) -> None:
    before = compute_threads()
    executor = _core.Executor(3, background)
    executor.start()
    wanted = os.SCHED_IDLE if background else os.sched_getscheduler(0)

    def policies() -> list[int]:
        return [os.sched_getscheduler(thread) for thread in compute_threads().keys() - before]

    try:
        wait_for(lambda: policies() == [wanted] * 3, "a worker sets its own")
    finally:
        executor.stop()
