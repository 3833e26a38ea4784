"""MemoryQueue: who gets KV blocks next, who waits, who gives theirs up."""

from __future__ import annotations

import math
from typing import Any

import pytest

from flowprefill.engine.kv_blocks import BlockPool
from flowprefill.engine.memory_queue import LATEST_S, MAX_MISSES, PATIENCE_S, MemoryQueue
from flowprefill.request import SLO


class FakeSequence:
    """What the queue reads and writes of a sequence."""

    def __init__(
        self, name: str, tokens: int, arrival_s: float = 0.0, due_s: float = math.inf
    ) -> None:
        self.id = name
        # Tokens of its own: no prefix is shared by accident.
        self.ids = [hash((name, index)) % 50_000 for index in range(tokens)]
        self.arrival_s = arrival_s
        self.deadline_s = due_s
        self.slo = SLO()
        self.extra_tokens = 1
        self.finds_prefix = True
        self.predicted_s = tokens / 1000
        self.computed = 0
        self.reservation: Any = None
        self.is_scheduled = False
        self.work_id: int | None = None
        self.tokens: list[int] = []
        self.is_held = False


def names(sequences: Any) -> list[str]:
    return [sequence.id for sequence in sequences]


@pytest.fixture
def pool() -> BlockPool:
    return BlockPool(10, 16)


@pytest.fixture
def queue(pool: BlockPool) -> MemoryQueue:
    return MemoryQueue(pool)


def push(queue: MemoryQueue, *sequences: FakeSequence) -> None:
    for sequence in sequences:
        queue.push(sequence)  # type: ignore[arg-type]


def test_earliest_deadline_gets_blocks_first(queue: MemoryQueue) -> None:
    push(queue, FakeSequence("late", 60, due_s=9.0), FakeSequence("soon", 60, due_s=2.0))
    push(queue, FakeSequence("never", 20))
    assert (queue.tokens, queue.seconds) == (140, pytest.approx(0.14))
    assert names(queue.admit(0.0)) == ["soon", "late", "never"]
    assert (len(queue), queue.tokens, queue.seconds) == (0, 0, 0.0)


@pytest.mark.parametrize("start_s", [0.0, 1000.0])
def test_one_without_objective_is_due_some_time(queue: MemoryQueue, start_s: float) -> None:
    later_s = start_s + LATEST_S
    push(queue, FakeSequence("later", 60, later_s, later_s + 1.0))
    push(queue, FakeSequence("old", 60, start_s))
    push(queue, FakeSequence("sooner", 60, later_s - 2.0, later_s - 1.0))
    assert names(queue.admit(later_s)) == ["sooner", "old"]


@pytest.mark.parametrize("start_s", [0.0, 1000.0])
def test_smaller_ones_pass_one_that_does_not_fit_until_it_has_waited(
    queue: MemoryQueue, pool: BlockPool, start_s: float
) -> None:
    holder = pool.reserve(list(range(79)), 1)  # 5 of 10 blocks
    assert holder is not None
    push(queue, FakeSequence("big", 100, start_s, start_s + 1.0))
    push(queue, FakeSequence("small", 20, start_s, start_s + 2.0))
    assert names(queue.admit(start_s)) == ["small"]
    later_s = start_s + PATIENCE_S + 1
    push(queue, FakeSequence("another", 20, later_s, later_s + 1))
    assert names(queue.admit(later_s)) == []
    pool.release(holder)
    queue.blocks_freed()
    assert names(queue.admit(later_s)) == ["big"]
    assert names(queue.admit(later_s)) == []


def test_one_that_leaves_holds_up_none_of_those_that_might_not_pass_it(
    queue: MemoryQueue, pool: BlockPool
) -> None:
    assert pool.reserve(list(range(79)), 1) is not None
    big = FakeSequence("big", 100, due_s=1.0)
    push(queue, big, FakeSequence("small", 20, due_s=2.0))
    assert names(queue.admit(PATIENCE_S + 1)) == []
    queue.remove(big)  # type: ignore[arg-type]
    assert names(queue.admit(PATIENCE_S + 1)) == ["small"]


def test_it_tries_only_after_an_event(queue: MemoryQueue, pool: BlockPool) -> None:
    holder = pool.reserve(list(range(150)), 1)
    assert holder is not None
    push(queue, FakeSequence("waits", 20))
    assert names(queue.admit(0.0)) == []
    pool.release(holder)
    assert names(queue.admit(0.0)) == [], "blocks_freed() was not called"
    queue.blocks_freed()
    assert names(queue.admit(0.0)) == ["waits"]


def test_seconds_before_are_those_of_the_prefills_that_get_blocks_first(
    queue: MemoryQueue, pool: BlockPool
) -> None:
    several = [FakeSequence(name, 20 * n, due_s=n) for n, name in enumerate("abc", 1)]
    push(queue, *reversed(several))

    def seconds_before() -> list[float]:
        return [queue.seconds_before(one) for one in several]  # type: ignore[arg-type]

    assert seconds_before() == pytest.approx([0.0, 0.02, 0.06])
    assert names(queue.admit(0.0)) == ["a", "b", "c"]
    assert seconds_before() == [0.0, 0.0, 0.0]


def test_what_is_found_in_the_cache_counts_as_computed(queue: MemoryQueue, pool: BlockPool) -> None:
    before, after = FakeSequence("before", 40), FakeSequence("after", 40)
    after.ids[:33] = before.ids[:33]
    push(queue, before)
    assert names(queue.admit(0.0)) == ["before"]
    pool.commit(before.reservation, before.ids)
    push(queue, after)
    assert names(queue.admit(0.0)) == ["after"]
    assert (before.computed, after.computed) == (0, 32)
    assert after.reservation.block_ids[:2] == before.reservation.block_ids[:2]


def test_tries_are_bounded(queue: MemoryQueue, pool: BlockPool) -> None:
    assert pool.reserve(list(range(140)), 1) is not None
    push(queue, *(FakeSequence(f"big{n}", 100, due_s=1.0) for n in range(MAX_MISSES)))
    push(queue, FakeSequence("small", 5, due_s=2.0))
    assert names(queue.admit(0.0)) == []


def test_removed_wherever_it_is(queue: MemoryQueue) -> None:
    gone = FakeSequence("gone", 20)
    push(queue, FakeSequence("a", 20), gone)
    queue.remove(gone)  # type: ignore[arg-type]
    queue.remove(gone)  # type: ignore[arg-type]
    assert (queue.tokens, queue.seconds) == (20, pytest.approx(0.02))
    assert names(queue.admit(0.0)) == ["a"]


def decoding(pool: BlockPool, name: str, tokens: int, arrival_s: float) -> FakeSequence:
    """A sequence whose blocks are full: its next token needs one more."""
    sequence = FakeSequence(name, tokens, arrival_s)
    sequence.reservation = pool.reserve(sequence.ids, 0)
    sequence.ids.append(1)
    sequence.tokens = [1]
    sequence.is_scheduled = True
    return sequence


def test_room_is_made_by_the_least_urgent(queue: MemoryQueue, pool: BlockPool) -> None:
    first, second = decoding(pool, "first", 80, 0.0), decoding(pool, "second", 80, 1.0)
    kept = queue.make_room([second, first], [first, second])  # type: ignore[list-item]
    assert (names(kept), names(queue.take_evicted())) == (["first"], ["second"])
    assert len(first.reservation.block_ids) == 6
    assert queue.take_evicted() == []
    assert second.reservation is None
    assert second.computed == 0
    assert len(queue) == 1
    pool.check()


def test_one_with_a_pace_to_keep_has_room_before_one_without(
    queue: MemoryQueue, pool: BlockPool
) -> None:
    without, paced = decoding(pool, "without", 80, 0.0), decoding(pool, "paced", 80, 1.0)
    paced.slo = SLO(tpot=0.1)
    kept = queue.make_room([without, paced], [without, paced])  # type: ignore[list-item]
    assert (names(kept), names(queue.take_evicted())) == (["paced"], ["without"])


def idle_one(pool: BlockPool, name: str, tokens: int, due_s: float = math.inf) -> FakeSequence:
    """A sequence with blocks whose prefill has not begun."""
    sequence = FakeSequence(name, tokens, due_s=due_s)
    sequence.reservation, sequence.is_scheduled = pool.reserve(sequence.ids, 1), True
    return sequence


def test_least_urgent_of_the_waiting_gives_up_its_blocks_and_no_run_loses_any(
    queue: MemoryQueue, pool: BlockPool
) -> None:
    one = decoding(pool, "one", 80, 0.0)
    several = [idle_one(pool, name, 15, due_s) for name, due_s in (("a", 2.0), ("b", 9.0))]
    several += [idle_one(pool, name, 15, due_s) for name, due_s in (("c", 5.0), ("runs", 99.0))]
    several.append(idle_one(pool, "stalled", 15, 8.0))
    several[3].work_id = 1
    several[4].is_held = True  # no token yet: it is prefilled as any
    queue.hold(several[4])  # type: ignore[arg-type]
    for name in ("b", "stalled", "c", "a"):
        kept = queue.make_room([one], [one, *several])  # type: ignore[list-item]
        assert (names(kept), names(queue.take_evicted())) == (["one"], [name])
        one.ids += [1] * 16
    assert len(queue) == 4
    assert names(queue.make_room([one], [one, *several])) == []  # type: ignore[list-item]


def test_waiting_requests_give_theirs_up_before_decoding_ones(
    queue: MemoryQueue, pool: BlockPool
) -> None:
    one = decoding(pool, "one", 80, 0.0)
    idle = idle_one(pool, "idle", 70)
    started = FakeSequence("started", 1)
    kept = queue.make_room([one], [one, idle, started])  # type: ignore[list-item]
    assert (names(kept), names(queue.take_evicted())) == (["one"], ["idle"])
    assert len(one.reservation.block_ids) == 6


def test_alone_it_gives_up_its_own(queue: MemoryQueue, pool: BlockPool) -> None:
    assert pool.reserve(list(range(79)), 1) is not None  # a prefill that runs holds the rest
    one = decoding(pool, "one", 80, 0.0)
    kept = queue.make_room([one], [one])  # type: ignore[list-item]
    assert (names(kept), names(queue.take_evicted())) == ([], ["one"])
    assert names(queue.admit(0.0)) == [], "it needs one block more than it had"


def held(queue: MemoryQueue, pool: BlockPool, name: str, tokens: int) -> FakeSequence:
    """A decoding sequence that is held and in no run."""
    sequence = decoding(pool, name, tokens, 0.0)
    sequence.is_held = True
    queue.hold(sequence)  # type: ignore[arg-type]
    return sequence


def test_held_ones_give_way_to_who_waits_the_longest_held_first(
    queue: MemoryQueue, pool: BlockPool
) -> None:
    first, second = held(queue, pool, "first", 64), held(queue, pool, "second", 64)
    push(queue, FakeSequence("comes", 60))
    assert names(queue.admit(0.0)) == ["comes"]
    assert names(queue.take_evicted()) == ["first"]
    assert (len(queue), second.computed) == (0, 0), "it waits for nothing while it is held"
    queue.resume(first)  # type: ignore[arg-type]
    assert (len(queue), names(queue.held)) == (1, ["second"])
    assert names(queue.admit(0.0)) == ["first"], "taken from the other that is held"
    assert names(queue.take_evicted()) == ["second"]
    pool.check()


def test_every_one_of_a_step_has_room(queue: MemoryQueue, pool: BlockPool) -> None:
    several = [decoding(pool, name, 32, 0.0) for name in "abc"]
    assert names(queue.make_room(several, several)) == ["a", "b", "c"]  # type: ignore[arg-type]
    assert [len(one.reservation.block_ids) for one in several] == [3, 3, 3]


def test_held_one_that_goes_on_waits_for_what_it_lost_alone(
    queue: MemoryQueue, pool: BlockPool
) -> None:
    has_all, waits = held(queue, pool, "has all", 160), FakeSequence("waits", 20)
    has_all.work_id = 1
    push(queue, waits)
    queue.hold(waits)  # type: ignore[arg-type]
    for sequence in (has_all, waits):
        queue.resume(sequence)  # type: ignore[arg-type]
    assert (len(queue), queue.tokens) == (1, 20)


def test_one_that_is_held_gives_way_to_who_waits_already(
    queue: MemoryQueue, pool: BlockPool
) -> None:
    sequence = decoding(pool, "stalls", 160, 0.0)
    push(queue, FakeSequence("waits", 20))
    assert names(queue.admit(0.0)) == []
    sequence.is_held = True
    queue.hold(sequence)  # type: ignore[arg-type]
    assert names(queue.admit(0.0)) == ["waits"]


def test_held_ones_keep_their_blocks_where_all_of_them_would_not_do(
    queue: MemoryQueue, pool: BlockPool
) -> None:
    """The two share three blocks: both together have six, not nine."""
    assert pool.reserve(list(range(64)), 0) is not None  # a prefill that runs holds the rest
    one = decoding(pool, "one", 64, 0.0)
    pool.commit(one.reservation, one.ids[:64])
    other = FakeSequence("other", 80)
    other.ids[:48] = one.ids[:48]
    other.reservation, other.tokens = pool.reserve(other.ids, 0), [1]
    for sequence in (one, other):
        sequence.is_held = True
        queue.hold(sequence)  # type: ignore[arg-type]
    assert pool.available == 0
    push(queue, FakeSequence("comes", 100))
    assert names(queue.admit(0.0)) == []
    assert names(queue.take_evicted()) == []


def test_room_for_the_next_token_is_taken_from_held_ones_first(
    queue: MemoryQueue, pool: BlockPool
) -> None:
    idle = idle_one(pool, "idle", 15)
    stalled = [held(queue, pool, name, 32) for name in ("stalled", "later")]
    one = decoding(pool, "one", 80, 0.0)
    kept = queue.make_room([one], [one, idle, *stalled])  # type: ignore[list-item]
    assert (names(kept), names(queue.take_evicted())) == (["one"], ["stalled"])


def test_held_one_in_the_step_that_is_built_keeps_its_blocks(
    queue: MemoryQueue, pool: BlockPool
) -> None:
    one, stalls = decoding(pool, "one", 80, 1.0), held(queue, pool, "stalls", 80)
    kept = queue.make_room([one, stalls], [one, stalls])  # type: ignore[list-item]
    assert (names(kept), names(queue.take_evicted())) == (["stalls"], ["one"])


def test_one_that_is_held_before_its_first_token_keeps_its_blocks(
    queue: MemoryQueue, pool: BlockPool
) -> None:
    stalled = idle_one(pool, "stalled", 140)
    stalled.is_held = True
    queue.hold(stalled)  # type: ignore[arg-type]
    push(queue, FakeSequence("comes", 20))
    assert (names(queue.admit(0.0)), queue.take_evicted()) == ([], [])


def test_held_ones_lose_their_blocks_once(queue: MemoryQueue, pool: BlockPool) -> None:
    for name in ("first", "second"):
        held(queue, pool, name, 80)
    for number in range(2):
        push(queue, FakeSequence(f"comes{number}", 79))
        assert names(queue.admit(0.0)) == [f"comes{number}"]
    assert names(queue.take_evicted()) == ["first", "second"]


def test_blocks_of_a_held_one_are_left_to_a_run_that_uses_them(
    queue: MemoryQueue, pool: BlockPool
) -> None:
    running = held(queue, pool, "running", 160)
    running.work_id = 1
    push(queue, FakeSequence("comes", 20))
    assert names(queue.admit(0.0)) == []
    running.work_id = None
    queue.blocks_freed()
    assert names(queue.admit(0.0)) == ["comes"]


def test_one_that_is_held_while_it_waits_for_lost_blocks_stops_waiting(
    queue: MemoryQueue, pool: BlockPool
) -> None:
    lost, new = FakeSequence("lost", 20), FakeSequence("new", 20)
    lost.tokens = [1]
    push(queue, lost, new)
    for sequence in (lost, new):
        sequence.is_held = True
        queue.hold(sequence)  # type: ignore[arg-type]
    assert names(queue.admit(0.0)) == ["new"], "it has no token yet"
    queue.remove(lost)  # type: ignore[arg-type]
    assert (len(queue), queue.held) == (0, [])
