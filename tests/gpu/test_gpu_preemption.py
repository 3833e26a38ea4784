"""Runs on a GPU: right, and to the bit what they are undisturbed, whatever happens beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_models import CASES, TOLERANCE, Logits, Runner, cpu_logits, plan, prompt_of

pytestmark = pytest.mark.gpu
OpenRunner = Callable[..., Runner]


@pytest.mark.parametrize("case", sorted(CASES))
def test_logits_are_those_of_the_cpu(
    case: str, open_runner: OpenRunner, checkpoint: Callable[[str], Path]
) -> None:
    runner = open_runner(case)
    for tokens in (1, 65, 200):
        ids = prompt_of(tokens, seed=tokens)
        want = cpu_logits(checkpoint(case), ids)
        for granularity in ("none", "operator", "budget:0.1"):
            got = runner.logits(ids, granularity=granularity)
            assert np.abs(got - want).max() < TOLERANCE * np.abs(want).max()


def test_graphs_give_the_bits_of_eager_launches(open_runner: OpenRunner) -> None:
    """A segment's first launch is eager, its second is captured, later ones are replays."""
    runner = open_runner("qwen3", warm_tokens=0)
    ids = prompt_of(128)
    eager = runner.logits(ids)
    assert runner.model.graph_report()["num_replayed"] == 0
    for _ in range(3):
        assert np.array_equal(runner.logits(ids), eager)
    report = runner.model.graph_report()
    assert report["num_failed"] == 0, report["last_failure"]
    assert report["num_replayed"] > report["num_captured"] > 0


@pytest.mark.parametrize("has_graphs", [True, False])
@pytest.mark.parametrize("granularity", ["operator", "layer", "chunk:64", "budget:0.1"])
def test_preempted_at_every_boundary_is_bit_equal(
    granularity: str, has_graphs: bool, open_runner: OpenRunner
) -> None:
    """Invariant 1, all boundaries of one run; with one lane each preemption spills it."""
    runner = open_runner("llama-biases", has_graphs=has_graphs, num_lanes=1)
    mine, others = prompt_of(200, 1), prompt_of(90, 2)
    undisturbed = runner.logits(mine, 0, granularity)
    bystander = runner.logits(others, 1)
    count = runner.make(mine, 0, plan(granularity)).num_segments
    every = range(1, count)
    run = runner.make(mine, 0, plan(granularity), pause_at=set(every))
    live_bytes = []
    for boundary in every:
        runner.advance(run, boundary)
        live_bytes.append(run.live_bytes)
        assert np.array_equal(runner.logits(others, 1), bystander)
    assert np.array_equal(runner.finish(run), undisturbed)
    report = runner.model.lane_report()
    num_live = sum(count > 0 for count in live_bytes)  # a chunk leaves nothing but the KV cache
    assert num_live == 0 if granularity.startswith("chunk") else num_live == len(every)
    assert report["num_spills"] == report["num_restores"] == num_live
    assert report["spilled_bytes"] == report["restored_bytes"] == sum(live_bytes)


def test_more_suspended_runs_than_lanes(open_runner: OpenRunner) -> None:
    runner = open_runner("mistral-window", num_lanes=2)
    prompts = [prompt_of(40 + 30 * number, number) for number in range(5)]
    alone = [runner.logits(ids, number) for number, ids in enumerate(prompts)]
    boundaries = range(1, runner.make(prompts[0], 0, plan("operator")).num_segments)
    runs = [
        runner.make(ids, number, plan("operator"), pause_at=set(boundaries))
        for number, ids in enumerate(prompts)
    ]
    for boundary in boundaries:
        for run in runs:
            runner.advance(run, boundary)
    for run, wanted in zip(runs, alone, strict=True):
        assert np.array_equal(runner.finish(run), wanted)
    report = runner.model.lane_report()
    assert report["num_spills"] == report["num_restores"] > 3 * len(boundaries)


def test_spills_beyond_the_device_go_to_the_host_and_come_back(open_runner: OpenRunner) -> None:
    runner = open_runner(num_lanes=1, device_spill_bytes=0)
    mine, others = prompt_of(150, 1), prompt_of(90, 2)
    undisturbed = runner.logits(mine)
    run = runner.make(mine, 0, plan("operator"), pause_at={5})
    runner.advance(run, 5)
    runner.logits(others, 1)
    report = runner.model.lane_report()
    assert report["pinned_spill_bytes"] > 0
    assert report["device_spill_bytes"] == 0
    assert np.array_equal(runner.finish(run), undisturbed)


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_run_cancelled_at_every_boundary_leaves_others_alone(
    lanes: int, open_runner: OpenRunner
) -> None:
    runner = open_runner(num_lanes=lanes)
    mine, others = prompt_of(100, 1), prompt_of(90, 2)
    bystander = runner.logits(others, 1)
    for boundary in range(1, runner.make(mine, 0, plan("operator")).num_segments):
        run = runner.make(mine, 0, plan("operator"), pause_at={boundary})
        runner.advance(run, boundary)
        assert runner.executor.cancel(run)
        runner.wait(run, "cancelled")
        assert np.array_equal(runner.logits(others, 1), bystander)


def test_an_injected_failure_ends_one_run_and_the_executor_lives_on(
    open_runner: OpenRunner,
) -> None:
    runner = open_runner()
    ids = prompt_of(100)
    want = runner.logits(ids)
    for segment in range(runner.make(ids, 0, plan("layer")).num_segments):
        bad: Any = runner.make(ids, 1, plan("layer"), fail_at=segment)
        runner.executor.dispatch(bad)
        runner.wait(bad, "finished", "cancelled", "failed")
        assert bad.state == "failed"
        assert "injected failure" in bad.error
        assert np.array_equal(runner.logits(ids), want)


def test_every_depth_of_run_ahead_gives_the_same_bits(open_runner: OpenRunner) -> None:
    ids = prompt_of(180)
    found: list[Logits] = []
    for depth in (1, 2, 3, 4):
        runner = open_runner(run_ahead=depth)
        found.append(runner.logits(ids))
        others = runner.logits(ids, 1)
        assert np.array_equal(found[0], found[-1])
        assert np.array_equal(others, found[-1])
