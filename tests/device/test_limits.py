"""On a GPU: how long a run blocks another by depth of run-ahead, and memory after many runs."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest
from cases import Piece, Runner
from devices import GPUS, Device, on

from flowprefill.bench.gpu_model import GpuModel, load_weights
from flowprefill.config import Granularity
from flowprefill.engine.device_choice import find_gpu
from flowprefill.engine.loading import plan_options
from flowprefill.models.checkpoint import open_checkpoint
from flowprefill.scheduling.cost_model import MachineRates

CLOCKS_S = 1e-4  # by which a time of the GPU may be off on the host's clock
SLACK_BYTES = 4 << 20  # of what the driver takes and gives back in whole pages


@pytest.mark.alone
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@on(("cuda",))  # the clock of the double stands still but for kernels
def test_a_dispatch_waits_for_no_more_segments_than_the_host_is_ahead(
    device: Device, depth: int
) -> None:
    """On a GPU run_ahead + 1 segments of the other run end after the dispatch, no more.

    Where other processes have turns on the GPU, its clock cannot be set by the host's to CLOCKS_S:
    an event on an idle stream waits for the end of their turn.
    """
    checkpoint = open_checkpoint("smollm2-135m")
    choice = find_gpu(None)
    weights = load_weights(choice, checkpoint)
    model = GpuModel(choice, checkpoint, weights, 6000, {"run_ahead": depth})
    options = plan_options(device.module, Granularity.parse("layer"), MachineRates())
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


@pytest.mark.alone
@pytest.mark.parametrize("has_graphs", [True, False])
@on(GPUS)
def test_a_thousand_runs_take_no_more_memory(
    has_graphs: bool, device: Device, open_runner: Callable[..., Runner]
) -> None:
    runner = open_runner(num_lanes=1, has_graphs=has_graphs)
    mine, others = runner.tables([200, 200])
    lengths = (1, 7, 20) if device.is_double else (1, 20, 100, 200)
    prompts: list[list[Piece]] = [[(runner.ids[:tokens], 0, mine)] for tokens in lengths]

    def run_once(number: int) -> None:
        """Every tenth run is preempted, so that it spills."""
        pieces = prompts[number % len(prompts)]
        if number % 10:
            runner.logits(pieces, "operator")
            return
        run = runner.make(pieces, "operator", pause_at={3})
        runner.advance(run, 3)
        runner.logits([(runner.ids[:1], 0, others)], "operator")
        runner.execute(run)

    for number in range(40 * len(prompts)):  # every graph captured, every pool filled
        run_once(number)
    before = runner.native.device_info()["free_bytes"]
    graphs = runner.model.graph_report()
    for number in range(1000):
        run_once(number)
    assert runner.native.device_info()["free_bytes"] >= before - SLACK_BYTES
    after = runner.model.graph_report()
    for name in ("num_executables", "bytes", "num_captured"):
        assert after[name] == graphs[name], name
    lanes = runner.model.lane_report()
    assert lanes["device_spill_bytes"] == lanes["pinned_spill_bytes"] == 0
