"""On a GPU: how long a run blocks another by depth of run-ahead, and memory after many runs."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest
from gpu_models import LONGEST, Runner, plan, prompt_of

from flowprefill.bench.gpu_model import GpuModel, load_weights
from flowprefill.engine.device_choice import find_gpu
from flowprefill.models.checkpoint import open_checkpoint

pytestmark = pytest.mark.gpu
CLOCKS_S = 1e-4  # by which a time of the GPU may be off on the host's clock
SLACK_BYTES = 4 << 20  # of what the driver takes and gives back in whole pages


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.usefixtures("real_times")
def test_a_dispatch_waits_for_no_more_segments_than_the_host_is_ahead(depth: int) -> None:
    """Invariant 4 on a GPU: run_ahead + 1 segments of the other run end after the dispatch."""
    checkpoint = open_checkpoint("smollm2-135m")
    choice = find_gpu(None)
    weights = load_weights(choice, checkpoint)
    model = GpuModel(choice, checkpoint, weights, 6000, {"run_ahead": depth})
    options = plan("layer")
    chance = random.Random(depth)
    took_s = min(model.prefill_s(6000, options) for _ in range(3))
    model.prefill_s(64, options)
    num_blocked = 0
    for _ in range(20):
        long, short = model.make(6000, options, slot=0), model.make(64, options, slot=1)
        with model.recorded() as segments:
            model.dispatch(long)
            time.sleep(chance.uniform(0.1, 0.8) * took_s)
            model.dispatch(short)
            model.finish(short)
            num_blocked += long.state == "suspended"
            model.cancel(long)
        dispatched_s = short.accounting().dispatched_s
        late = [s for s in segments if s.run_id == long.id and s.end_s > dispatched_s + CLOCKS_S]
        assert len(late) <= depth + 1
    model.close()
    assert num_blocked > 10, "the long prompt was too quick to be met"


@pytest.mark.parametrize("has_graphs", [True, False])
def test_a_thousand_runs_take_no_more_memory(
    has_graphs: bool, is_double: bool, open_runner: Callable[..., Runner]
) -> None:
    runner = open_runner(num_lanes=1, has_graphs=has_graphs)
    lengths = (1, 7, 20) if is_double else (1, 20, 100, LONGEST)
    prompts = [prompt_of(tokens, tokens) for tokens in lengths]

    def run_once(number: int) -> None:
        """Every tenth run is preempted, so that it spills."""
        ids = prompts[number % len(prompts)]
        if number % 10:
            runner.logits(ids)
            return
        run = runner.make(ids, 0, plan("operator"), pause_at={3})
        runner.advance(run, 3)
        runner.logits(prompts[0], 1)
        runner.finish(run)

    for number in range(40 * len(prompts)):  # every graph captured, every pool filled
        run_once(number)
    before = runner.cuda.device_info()["free_bytes"]
    graphs = runner.model.graph_report()
    for number in range(1000):
        run_once(number)
    assert runner.cuda.device_info()["free_bytes"] >= before - SLACK_BYTES
    after = runner.model.graph_report()
    for name in ("num_executables", "bytes", "num_captured"):
        assert after[name] == graphs[name], name
    lanes = runner.model.lane_report()
    assert lanes["device_spill_bytes"] == lanes["pinned_spill_bytes"] == 0
