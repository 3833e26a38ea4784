"""A preempted run gives the bits of an undisturbed one, and blocks others for one segment."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from cases import NEWER, Logits, Piece, Runner
from devices import EVERY, GPUS, ONE, Device, on

from flowprefill import _core

GetRunner = Callable[..., Runner]
pytestmark = pytest.mark.timeout(600)  # a test may compute every boundary of every granularity
ON_CPU = ("cpu", "cpu-bf16")


def execute_with_others(
    native: Runner, run: Any, boundaries: Iterable[int], other: Callable[[], None]
) -> Logits:
    """Execute a run that pauses at the boundaries, and something else at each of them."""
    for boundary in boundaries:
        native.advance(run, boundary)
        other()
        assert (run.cursor, run.state) == (boundary, "suspended")
    return native.execute(run)


class Bystander:
    """Another request with blocks of its own, whose logits must not change either."""

    def __init__(self, native: Runner, piece: Piece, granularity: str) -> None:
        self._native = native
        self._piece = piece
        self._granularity = granularity
        self._expected = native.logits([piece], granularity)
        self.count = 0

    def __call__(self) -> None:
        got = self._native.logits([self._piece], self._granularity)
        assert np.array_equal(got, self._expected)
        self.count += 1


def stop_everywhere(native: Runner, granularity: str, most: int = 10_000) -> None:
    """Check that a prompt which stops for another at each boundary keeps its bits, and so that.

    Args:
        most: stop so often at most, at boundaries with equally many between them.
    """
    ids = native.ids
    mine, others = native.tables([200, 150])
    undisturbed = native.logits([(ids, 0, mine)], granularity)
    bystander = Bystander(native, (ids[50:], 0, others), "operator")
    boundaries = native.make([(ids, 0, mine)], granularity).num_segments - 1
    every = range(1, 1 + boundaries, -(-boundaries // most) or 1)
    run = native.make([(ids, 0, mine)], granularity, pause_at=set(every))
    assert np.array_equal(execute_with_others(native, run, every, bystander), undisturbed)
    assert bystander.count == len(every) == run.accounting().num_preemptions
    if granularity == "budget:0.1" and not native.device.is_cuda:
        assert len(every) > 50


@on(EVERY)
def test_preempted_at_every_boundary_is_bit_equal(device: Device, runner: GetRunner) -> None:
    """All boundaries of one run, one after another."""
    for granularity in device.granularities:
        stop_everywhere(runner("llama-grouped"), granularity)


@on(("cpu-team", "cpu-bf16-team"), NEWER)
def test_families_preempted_at_the_finest_boundaries_are_bit_equal(
    case: str, runner: GetRunner
) -> None:
    stop_everywhere(runner(case), "budget:0.1")


@on(GPUS, NEWER)
def test_families_preempted_at_every_boundary_are_bit_equal(
    device: Device, case: str, open_runner: GetRunner
) -> None:
    """One lane: what is live is spilled and restored each time."""
    native = open_runner(case, num_lanes=1)
    for granularity in device.granularities:
        stop_everywhere(native, granularity)


@pytest.mark.parametrize("has_graphs", [True, False])
@pytest.mark.parametrize("granularity", ["operator", "layer", "chunk:64", "budget:0.1"])
@on(GPUS)
def test_with_one_lane_each_preemption_spills_what_is_live(
    granularity: str, has_graphs: bool, open_runner: GetRunner
) -> None:
    native = open_runner("llama-biases", has_graphs=has_graphs, num_lanes=1)
    mine, others = native.tables([200, 90])
    pieces: list[Piece] = [(native.ids, 0, mine)]
    undisturbed = native.logits(pieces, granularity)
    bystander = Bystander(native, (native.ids[:90], 0, others), "operator")
    every = range(1, native.make(pieces, granularity).num_segments)
    run = native.make(pieces, granularity, pause_at=set(every))
    live_bytes: list[int] = []

    def other() -> None:
        live_bytes.append(run.live_bytes)
        bystander()

    assert np.array_equal(execute_with_others(native, run, every, other), undisturbed)
    report = native.model.lane_report()
    num_live = sum(count > 0 for count in live_bytes)  # a chunk leaves nothing but the KV cache
    assert num_live == 0 if granularity.startswith("chunk") else num_live == len(every)
    assert report["num_spills"] == report["num_restores"] == num_live
    assert report["spilled_bytes"] == report["restored_bytes"] == sum(live_bytes)


def test_attention_sliced_by_heads_leaves_none_out(runner: GetRunner) -> None:
    """Slices of one attention step have equal rows and follow each other; logits are the same."""
    native = runner("llama-grouped")
    (mine,) = native.tables([200])
    fine = native.make([(native.ids, 0, mine)], "budget:0.1")
    attention = [label for label in fine.labels() if label.op == "attention"]
    rows = [(label.layer, label.row_begin, label.row_end) for label in attention]
    assert len(rows) > len(set(rows)), "no slice by heads"
    assert rows == sorted(rows), "all slices of some rows before those of others"
    logits = native.execute(fine)
    assert np.allclose(logits, native.logits([(native.ids, 0, mine)], "none"), atol=1e-5)


@pytest.mark.parametrize("granularity", ["layer", "operator", "chunk:32", "budget:2"])
@on(ON_CPU, ["mistral-window", "qwen2-some-windows", "qwen3", *NEWER])
def test_preempted_once_at_each_boundary_is_bit_equal(
    case: str, granularity: str, runner: GetRunner
) -> None:
    """One run per boundary: a packed batch, interrupted by a decode-like run."""
    native = runner(case)
    ids = native.ids
    first, second, others = native.tables([65, 30, 20], seed=4)
    pieces: list[Piece] = [(ids[:65], 0, first), (ids[:30], 0, second)]
    undisturbed = native.logits(pieces, granularity)
    native.logits([(ids[:19], 0, others)], "none")
    bystander = Bystander(native, ([ids[19]], 19, others), "none")
    for boundary in range(1, native.make(pieces, granularity).num_segments):
        run = native.make(pieces, granularity, pause_at={boundary})
        assert np.array_equal(execute_with_others(native, run, [boundary], bystander), undisturbed)


@on(ONE, ["llama-biases", "mistral-window"])
def test_many_runs_preempt_each_other_at_every_boundary(
    device: Device, case: str, open_runner: GetRunner
) -> None:
    native = open_runner(case, **({"num_lanes": 2} if device.is_cuda else {}))
    lengths = (90, 200, 40, 70)
    pieces = [
        [(native.ids[:n], 0, t)] for n, t in zip(lengths, native.tables(lengths), strict=True)
    ]
    expected = [native.logits(piece, "operator") for piece in pieces]
    boundaries = range(1, native.make(pieces[0], "operator").num_segments)
    runs = [native.make(piece, "operator", pause_at=set(boundaries)) for piece in pieces]
    for boundary in boundaries:
        for run in runs:
            native.advance(run, boundary)
    for run, wanted in zip(runs, expected, strict=True):
        assert np.array_equal(native.execute(run), wanted)
    if device.is_cuda:
        report = native.model.lane_report()
        assert report["num_spills"] == report["num_restores"] > 2 * len(boundaries)


@on(("cpu-int8",))
def test_slices_of_equal_rows_multiply_the_bytes_of_their_own_run(runner: GetRunner) -> None:
    """Slices of a product find its rows in bytes, unless another run's have replaced them."""
    native = runner("llama-grouped")
    lengths = (190, 190)
    pieces = [[(native.ids[n:][:190], 0, t)] for n, t in enumerate(native.tables(lengths))]
    expected = [native.logits(piece, "none") for piece in pieces]
    boundaries = range(1, native.make(pieces[0], "budget:0.1").num_segments)
    runs = [native.make(piece, "budget:0.1", pause_at=set(boundaries)) for piece in pieces]
    slices = Counter((label.op, label.layer, label.row_begin) for label in runs[0].labels())
    assert any(count > 1 for (op, *_), count in slices.items() if op.endswith("proj"))
    for boundary in boundaries:
        for run in runs:
            native.advance(run, boundary)
    for run, wanted in zip(runs, expected, strict=True):
        assert np.array_equal(native.execute(run), wanted)


@on(GPUS)
def test_spills_beyond_the_device_go_to_the_host_and_come_back(open_runner: GetRunner) -> None:
    native = open_runner(num_lanes=1, device_spill_bytes=0)
    mine, others = native.tables([150, 90])
    undisturbed = native.logits([(native.ids[:150], 0, mine)], "operator")
    run = native.make([(native.ids[:150], 0, mine)], "operator", pause_at={5})
    native.advance(run, 5)
    native.logits([(native.ids[:90], 0, others)], "operator")
    report = native.model.lane_report()
    assert report["pinned_spill_bytes"] > 0
    assert report["device_spill_bytes"] == 0
    assert np.array_equal(native.execute(run), undisturbed)


@on(ONE, ["qwen3"])
def test_a_run_cancelled_at_every_boundary_leaves_others_alone(
    device: Device, case: str, runner: GetRunner
) -> None:
    native = runner(case)
    mine, others = native.tables([100, 100])
    pieces: list[Piece] = [(native.ids[:100], 0, mine)]
    bystander = Bystander(native, (native.ids[:100], 0, others), "layer")
    idle_bytes = _core.live_workspace_bytes()
    for boundary in range(1, native.make(pieces, "operator").num_segments):
        run = native.make(pieces, "operator", pause_at={boundary})
        native.advance(run, boundary)
        assert native.executor.cancel(run)
        native.wait(run, "cancelled")
        bystander()
        del run
        deadline = time.monotonic() + 100  # the executor may hold it for a moment longer
        while _core.live_workspace_bytes() != idle_bytes:
            assert time.monotonic() < deadline, "the workspace was not given back"


@on(EVERY)
def test_same_logits_from_each_repetition(device: Device, runner: GetRunner) -> None:
    native = runner("llama-grouped")
    first = native.prefill(native.ids, "budget:2", seed=1)
    for seed in range(2 if device.is_double else 10):
        assert np.array_equal(native.prefill(native.ids, "budget:2", seed), first)


@on(GPUS)
def test_every_depth_of_run_ahead_gives_the_same_bits(open_runner: GetRunner) -> None:
    found: list[Logits] = []
    for depth in (1, 2, 3, 4):
        native = open_runner(run_ahead=depth)
        found += [native.prefill(native.ids[:180], "operator", seed) for seed in (1, 2)]
    assert all(np.array_equal(found[0], other) for other in found)


@on(GPUS)
def test_graphs_give_the_bits_of_eager_launches(open_runner: GetRunner) -> None:
    """A segment's first launch is eager, its second is captured, later ones are replays."""
    native = open_runner("qwen3", warm_tokens=0)
    eager = native.prefill(native.ids[:128], "operator")
    assert native.model.graph_report()["num_replayed"] == 0
    for _ in range(3):
        assert np.array_equal(native.prefill(native.ids[:128], "operator"), eager)
    report = native.model.graph_report()
    assert report["num_failed"] == 0, report["last_failure"]
    assert report["num_replayed"] > report["num_captured"] > 0


@pytest.mark.parametrize("granularity", ["operator", "chunk:16", "budget:2", "budget:0.1"])
def test_no_segment_starts_after_a_dispatch_but_the_newcomers(
    granularity: str, runner: GetRunner
) -> None:
    """Blocking is the segment being executed and no more, without a clock's tolerance."""
    native = runner("llama-grouped")
    chance = random.Random(1)
    long_table, short_table = native.tables([1200, 20])
    for _ in range(20):
        long = native.make([(native.ids * 6, 0, long_table)], granularity)
        short = native.make([(native.ids[:20], 0, short_table)], granularity)
        seen = native.executor.timeline().next
        native.executor.dispatch(long)
        # From the first boundary on: before it a start is noted only after the look at the mailbox.
        target = chance.randrange(1, long.num_segments)
        while long.cursor < target:
            pass
        native.executor.dispatch(short)
        dispatched_s = _core.now_s()
        native.wait(short, "finished")
        records = native.executor.timeline(seen).records
        started_late = [r for r in records if r.run_id == long.id and r.start_s > dispatched_s]
        assert not started_late
        if long.state != "finished":  # suspended, or displaced before it began
            native.execute(long)


@pytest.mark.parametrize("tokens", [1, 2, 15, 17, 31, 33, 70])
@on(ON_CPU)
def test_what_a_block_held_before_does_not_matter(tokens: int, runner: GetRunner) -> None:
    """Blocks come back full of another request's values, infinities included; no run reads them."""
    native = runner("mistral-no-window")
    ids = native.ids
    table = native.tables([96])[0]
    native.model.zero_blocks(table.tolist())
    prompt, step = [(ids[:tokens], 0, table)], [([ids[tokens]], tokens, table)]
    clean = native.logits(prompt, "budget:2")
    decoded = native.logits(step, "none")
    native.logits([(ids[100:196], 0, table)], "none")
    assert np.array_equal(native.logits(prompt, "budget:2"), clean)
    assert np.array_equal(native.logits(step, "none"), decoded)
