"""Founding invariants 1 and 4: bit-equal logits when preempted; blocking of one segment."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from native_models import NEWER, Logits, Piece, Runner, Saved, plan

from flowprefill import _core

GetRunner = Callable[..., Runner]
GetSaved = Callable[[str], Saved]
GRANULARITIES = ("none", "layer", "operator", "chunk:16", "budget:2", "budget:0.1")


def execute_with_others(
    native: Runner, run: _core.Run, boundaries: Iterable[int], other: Callable[[], None]
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
        self._plan = plan(granularity)
        self._expected = native.logits([piece], self._plan)
        self.count = 0

    def __call__(self) -> None:
        assert np.array_equal(self._native.logits([self._piece], self._plan), self._expected)
        self.count += 1


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_preempted_at_every_boundary_is_bit_equal(
    granularity: str, dtype: str, threads: int, runner: GetRunner, saved: GetSaved
) -> None:
    """Invariant 1, all boundaries of one run, one after another."""
    stop_everywhere(
        runner("llama-grouped", dtype, threads), saved("llama-grouped").ids, granularity
    )


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("case", NEWER)
def test_families_preempted_at_the_finest_boundaries_are_bit_equal(
    case: str, dtype: str, runner: GetRunner, saved: GetSaved
) -> None:
    stop_everywhere(runner(case, dtype, 2), saved(case).ids, "budget:0.1")


def stop_everywhere(native: Runner, ids: list[int], granularity: str) -> None:
    """Check that a prompt which stops for another at each boundary keeps its bits, and so that."""
    mine, others = native.tables([200, 150])
    undisturbed = native.logits([(ids, 0, mine)], plan(granularity))
    bystander = Bystander(native, (ids[50:], 0, others), "operator")
    every = range(1, native.make([(ids, 0, mine)], plan(granularity)).num_segments)
    run = native.make([(ids, 0, mine)], plan(granularity), pause_at=set(every))
    assert np.array_equal(execute_with_others(native, run, every, bystander), undisturbed)
    assert bystander.count == len(every) == run.accounting().num_preemptions
    if granularity == "budget:0.1":
        assert len(every) > 50


def test_attention_sliced_by_heads_leaves_none_out(runner: GetRunner, saved: GetSaved) -> None:
    """Slices of one attention step have equal rows and follow each other; logits are the same."""
    native = runner("llama-grouped", "f32")
    ids = saved("llama-grouped").ids
    (mine,) = native.tables([200])
    fine = native.make([(ids, 0, mine)], plan("budget:0.1"))
    attention = [label for label in fine.labels() if label.op == "attention"]
    rows = [(label.layer, label.row_begin, label.row_end) for label in attention]
    assert len(rows) > len(set(rows)), "no slice by heads"
    assert rows == sorted(rows), "all slices of some rows before those of others"
    logits = native.execute(fine)
    assert np.allclose(logits, native.logits([(ids, 0, mine)], plan("none")), atol=1e-5)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("granularity", ["layer", "operator", "chunk:32", "budget:2"])
@pytest.mark.parametrize("case", ["mistral-window", "qwen2-some-windows", "qwen3", *NEWER])
def test_preempted_once_at_each_boundary_is_bit_equal(
    case: str, granularity: str, dtype: str, runner: GetRunner, saved: GetSaved
) -> None:
    """Invariant 1, one run per boundary: a packed batch, interrupted by a decode-like run."""
    native, ids = runner(case, dtype), saved(case).ids
    first, second, others = native.tables([65, 30, 20], seed=4)
    pieces: list[Piece] = [(ids[:65], 0, first), (ids[:30], 0, second)]
    undisturbed = native.logits(pieces, plan(granularity))
    native.logits([(ids[:19], 0, others)], plan("none"))
    bystander = Bystander(native, ([ids[19]], 19, others), "none")
    for boundary in range(1, native.make(pieces, plan(granularity)).num_segments):
        run = native.make(pieces, plan(granularity), pause_at={boundary})
        assert np.array_equal(execute_with_others(native, run, [boundary], bystander), undisturbed)


def test_two_runs_preempt_each_other_at_every_boundary(runner: GetRunner, saved: GetSaved) -> None:
    native, ids = runner("llama-biases"), saved("llama-biases").ids
    pieces: list[Piece] = [
        (ids[:n], 0, t) for n, t in zip((90, 200), native.tables([90, 200]), strict=True)
    ]
    expected = [native.logits([piece], plan("operator")) for piece in pieces]
    count = native.make(pieces[:1], plan("operator")).num_segments
    runs = [
        native.make([piece], plan("operator"), pause_at=set(range(1, count))) for piece in pieces
    ]
    for boundary in range(1, count):
        for run in runs:
            native.advance(run, boundary)
    for run, wanted in zip(runs, expected, strict=True):
        assert np.array_equal(native.execute(run), wanted)


def test_a_run_cancelled_at_every_boundary_leaves_others_alone(
    runner: GetRunner, saved: GetSaved
) -> None:
    native, ids = runner("qwen3"), saved("qwen3").ids
    mine, others = native.tables([100, 100])
    bystander = Bystander(native, (ids[:100], 0, others), "layer")
    idle_bytes = _core.live_workspace_bytes()
    for boundary in range(1, native.make([(ids[:100], 0, mine)], plan("operator")).num_segments):
        run = native.make([(ids[:100], 0, mine)], plan("operator"), pause_at={boundary})
        native.advance(run, boundary)
        assert native.executor.cancel(run)
        native.wait(run, "cancelled")
        bystander()
        del run
        deadline = time.monotonic() + 10  # the executor may hold it for a moment longer
        while _core.live_workspace_bytes() != idle_bytes:
            assert time.monotonic() < deadline, "the workspace was not given back"


def test_same_logits_from_each_thread_count_and_repetition(
    runner: GetRunner, saved: GetSaved
) -> None:
    ids = saved("llama-grouped").ids
    for dtype in ("f32", "bf16") if _core.has_bf16_gemm() else ("f32",):
        native = runner("llama-grouped", dtype, 2)
        first = native.prefill(ids, plan("budget:2"), seed=1)
        for seed in range(10):
            assert np.array_equal(native.prefill(ids, plan("budget:2"), seed), first)


@pytest.mark.parametrize("granularity", ["operator", "chunk:16", "budget:2", "budget:0.1"])
def test_no_segment_starts_after_a_dispatch_but_the_newcomers(
    granularity: str, runner: GetRunner, saved: GetSaved
) -> None:
    """Invariant 4, without a clock's tolerance: blocking is the segment being executed, no more."""
    native, ids = runner("llama-grouped"), saved("llama-grouped").ids
    chance = random.Random(1)
    long_table, short_table = native.tables([1200, 20])
    long_ids = ids * 6
    for _ in range(20):
        long = native.make([(long_ids, 0, long_table)], plan(granularity))
        short = native.make([(ids[:20], 0, short_table)], plan(granularity))
        seen = native.executor.timeline().next
        native.executor.dispatch(long)
        target = chance.randrange(long.num_segments)
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


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("tokens", [1, 2, 15, 17, 31, 33, 70])
def test_what_a_block_held_before_does_not_matter(
    tokens: int, dtype: str, runner: GetRunner, saved: GetSaved
) -> None:
    """Blocks come back full of another request's values, infinities included; nobody sees them."""
    native, ids = runner("mistral-no-window", dtype), saved("mistral-no-window").ids
    table = native.tables([96])[0]
    native.model.zero_blocks(table.tolist())
    clean = native.logits([(ids[:tokens], 0, table)], plan("budget:2"))
    decoded = native.logits([([ids[tokens]], tokens, table)], plan("none"))
    native.logits([(ids[100:196], 0, table)], plan("none"))
    assert np.array_equal(native.logits([(ids[:tokens], 0, table)], plan("budget:2")), clean)
    assert np.array_equal(native.logits([([ids[tokens]], tokens, table)], plan("none")), decoded)
