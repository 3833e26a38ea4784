"""Tests of BlockPool: examples, then random use against a model that also simulates the storage."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from flowprefill.engine.kv_blocks import BlockPool, Reservation
from flowprefill.errors import PromptTooLong


def reserve(pool: BlockPool, tokens: list[int], extra_tokens: int = 1) -> Reservation:
    reservation = pool.reserve(tokens, extra_tokens)
    assert reservation is not None
    pool.check()
    return reservation


def test_reserve_counts_prompt_and_extra_tokens() -> None:
    pool = BlockPool(8, 4)
    assert len(reserve(pool, [1] * 8, 0).block_ids) == 2
    assert len(reserve(pool, [1] * 8, 1).block_ids) == 3
    assert pool.stats.used == 5
    assert pool.stats.free == 3


def test_reserve_too_long_raises_with_numbers_and_changes_nothing() -> None:
    pool = BlockPool(4, 16)
    before = pool.stats
    with pytest.raises(PromptTooLong, match=r"64 tokens and 1 .* 5 KV blocks of 16 .* has 4 \(64"):
        pool.reserve(list(range(64)), 1)
    assert pool.stats == before


def test_reserve_short_of_blocks_returns_none_and_changes_nothing() -> None:
    pool = BlockPool(4, 4)
    first = reserve(pool, list(range(9)), 0)
    pool.commit(first, list(range(9)))
    pool.release(first)
    held = reserve(pool, [50] * 8, 0)
    before = pool.stats
    assert pool.reserve(list(range(8)) + [99] * 8, 0) is None  # two blocks cached, two more missing
    assert pool.stats == before
    pool.check()
    pool.release(held)
    assert reserve(pool, list(range(8)) + [99] * 8, 0).cached_tokens == 8


def test_reserve_finds_committed_prefix_but_never_the_whole_prompt() -> None:
    pool = BlockPool(8, 4)
    prompt = list(range(8))
    first = reserve(pool, prompt)
    pool.commit(first, prompt)
    same = reserve(pool, prompt)
    assert same.cached_tokens == 4
    assert same.block_ids[0] == first.block_ids[0]
    assert same.block_ids[1] != first.block_ids[1]
    longer = reserve(pool, [*prompt, 8])
    assert longer.cached_tokens == 8
    assert longer.block_ids[:2] == first.block_ids[:2]
    assert pool.stats.queried_tokens == 8 + 8 + 9
    assert pool.stats.hit_tokens == 4 + 8


def test_reserve_uncommitted_block_is_not_found() -> None:
    pool = BlockPool(8, 4)
    first = reserve(pool, list(range(9)))
    pool.commit(first, list(range(7)))  # only the first block is complete
    assert reserve(pool, list(range(9))).cached_tokens == 4


def test_reserve_same_block_after_another_prefix_is_not_found() -> None:
    pool = BlockPool(8, 2)
    first = reserve(pool, [1, 2, 3, 4, 5])
    pool.commit(first, [1, 2, 3, 4])
    assert reserve(pool, [9, 9, 3, 4, 5]).cached_tokens == 0


def test_reserve_accepts_arrays_and_lists_alike() -> None:
    pool = BlockPool(8, 2)
    tokens = np.array([7, 8, 9, 10, 11], dtype=np.int32)
    first = pool.reserve(tokens, 0)
    assert first is not None
    pool.commit(first, tokens)
    assert reserve(pool, tokens.tolist()).cached_tokens == 4


def test_prefix_cache_off_shares_nothing() -> None:
    pool = BlockPool(8, 2, enable_prefix_cache=False)
    first = reserve(pool, [1, 2, 3, 4, 5])
    pool.commit(first, [1, 2, 3, 4, 5])
    assert reserve(pool, [1, 2, 3, 4, 5]).cached_tokens == 0
    pool.release(first)
    assert pool.stats.cached == 0


def test_commit_equal_block_keeps_the_older() -> None:
    pool = BlockPool(8, 2)
    older, newer = reserve(pool, [1, 2, 3]), reserve(pool, [1, 2, 3])
    pool.commit(older, [1, 2, 3])
    pool.commit(newer, [1, 2, 3])
    assert reserve(pool, [1, 2, 3]).block_ids[0] == older.block_ids[0]
    pool.release(newer)
    pool.check()
    assert pool.stats.cached == 0


def test_commit_blocks_filled_by_decoding_are_found() -> None:
    pool = BlockPool(8, 2)
    first = reserve(pool, [1, 2, 3], 1)
    pool.commit(first, [1, 2, 3])
    assert pool.grow(first, 6)
    pool.commit(first, [1, 2, 3, 4, 5, 6])
    assert reserve(pool, [1, 2, 3, 4, 5, 6, 7]).cached_tokens == 6


def test_commit_more_than_reserved_raises() -> None:
    pool = BlockPool(8, 2)
    with pytest.raises(ValueError, match="4 tokens computed in 1 KV blocks"):
        pool.commit(reserve(pool, [1], 1), [1, 2, 3, 4])


def test_commit_of_some_tokens_shares_none_beyond_them() -> None:
    pool = BlockPool(8, 2)
    first = reserve(pool, [1, 2, 3, 4], 1)
    pool.commit(first, [1, 2, 3, 4], computed=3)
    assert reserve(pool, [1, 2, 3, 4, 5]).cached_tokens == 2


def test_grow_takes_a_block_only_when_needed() -> None:
    pool = BlockPool(3, 4)
    first = reserve(pool, [1, 2, 3], 1)
    assert pool.grow(first, 4)
    assert first.table.tolist() == first.block_ids
    assert len(first.block_ids) == 1
    assert pool.grow(first, 5)
    assert first.table.tolist() == first.block_ids
    assert len(first.block_ids) == 2
    reserve(pool, [5], 0)
    assert not pool.grow(first, 9)
    assert len(first.block_ids) == 2
    pool.check()


def test_release_tail_is_evicted_before_its_head() -> None:
    pool = BlockPool(4, 2)
    first = reserve(pool, [1, 2, 3, 4, 5, 6, 7], 1)
    pool.commit(first, [1, 2, 3, 4, 5, 6, 7])
    pool.release(first)
    assert pool.stats.cached == 3
    reserve(pool, [9, 9, 9], 0)  # the free one and one evicted
    assert reserve(pool, [1, 2, 3, 4], 0).cached_tokens == 2


def test_release_least_recently_used_sequence_is_evicted_first() -> None:
    pool = BlockPool(4, 2)
    old, young = reserve(pool, [1, 2], 0), reserve(pool, [3, 4], 0)
    pool.commit(old, [1, 2])
    pool.commit(young, [3, 4])
    pool.release(old)
    pool.release(young)
    pool.release(reserve(pool, [1, 2, 0], 0))  # used again: now the younger of the two
    reserve(pool, [9] * 6, 0)
    assert pool.stats.cached == 1
    assert reserve(pool, [1, 2], 0) is not None
    pool.check()


def test_release_shared_block_stays_until_the_last_holder() -> None:
    pool = BlockPool(3, 2)
    first = reserve(pool, [1, 2, 3], 0)
    pool.commit(first, [1, 2, 3])
    second = reserve(pool, [1, 2, 4], 0)
    pool.release(first)
    assert (pool.stats.used, pool.stats.free, pool.stats.cached) == (2, 1, 0)
    pool.release(second)
    assert (pool.stats.used, pool.stats.free, pool.stats.cached) == (0, 2, 1)


@pytest.mark.parametrize("call", ["release", "grow", "commit"])
def test_use_after_release_raises(call: str) -> None:
    pool = BlockPool(2, 2)
    first = reserve(pool, [1], 0)
    pool.release(first)
    calls: dict[str, Callable[[], object]] = {
        "release": lambda: pool.release(first),
        "grow": lambda: pool.grow(first, 1),
        "commit": lambda: pool.commit(first, [1]),
    }
    with pytest.raises(RuntimeError, match="released before"):
        calls[call]()
    pool.check()


@pytest.mark.parametrize(("blocks", "tokens"), [(0, 4), (4, 0)])
def test_pool_of_nothing_raises(blocks: int, tokens: int) -> None:
    with pytest.raises(ValueError, match="both >= 1"):
        BlockPool(blocks, tokens)


BLOCKS, WIDTH = 6, 2
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=9)


class Held:
    """The model's view of one reservation: its tokens and how many of them are computed."""

    def __init__(self, reservation: Reservation, tokens: list[int]) -> None:
        self.reservation = reservation
        self.tokens = tokens
        self.computed = reservation.cached_tokens
        self.offered = reservation.cached_tokens  # tokens of the blocks offered to the cache
        self.live = True


class PoolMachine(RuleBasedStateMachine):
    """Random requests over a tiny alphabet; `storage` is what the device's blocks would hold.

    The model names cached content by the whole prefix (a tuple), keeps who holds which block, and
    an exact recency list of the evictable prefixes.
    """

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS, WIDTH)
        self.storage: list[tuple[int, ...] | None] = [None] * BLOCKS
        self.cached: dict[tuple[int, ...], int] = {}  # findable prefix -> block
        self.recency: list[tuple[int, ...]] = []  # evictable prefixes, oldest first
        self.live: list[Held] = []

    def holders(self, block: int) -> int:
        return sum(block in h.reservation.block_ids for h in self.live)

    def free(self) -> int:
        held = {b for h in self.live for b in h.reservation.block_ids}
        return BLOCKS - len(held) - len(self.recency)

    def take(self, count: int) -> None:
        for _ in range(count - self.free()):
            del self.cached[self.recency.pop(0)]

    def prefixes(self, tokens: list[int]) -> list[tuple[int, ...]]:
        return [tuple(tokens[:end]) for end in range(WIDTH, len(tokens) + 1, WIDTH)]

    @rule(target=held, tokens=TOKENS, extra=st.integers(0, 3))
    def reserve(self, tokens: list[int], extra: int) -> Held | None:
        needed = -(-(len(tokens) + extra) // WIDTH)
        found: list[tuple[int, ...]] = []
        for prefix in self.prefixes(tokens[:-1]):
            if prefix not in self.cached:
                break
            found.append(prefix)
        idle = [p for p in found if p in self.recency]
        room = self.free() + len(self.recency) - len(idle)
        reservation = self.pool.reserve(tokens, extra)
        if needed - len(found) > room:
            assert reservation is None
            return None
        assert reservation is not None
        assert reservation.cached_tokens == WIDTH * len(found)
        assert reservation.block_ids[: len(found)] == [self.cached[p] for p in found]
        self.recency = [p for p in self.recency if p not in idle]
        # free() counts the revived blocks as free: none in `live` holds them yet.
        self.take(needed - len(found) + len(idle))
        entry = Held(reservation, list(tokens))
        self.check_private(reservation.block_ids[len(found) :])
        for block, prefix in zip(reservation.block_ids, found, strict=False):
            assert self.storage[block] == prefix, "a cached block holds something else"
        self.live.append(entry)
        return entry

    def check_private(self, blocks: list[int]) -> None:
        for block in blocks:
            assert self.holders(block) == 0, "another reservation holds a fresh block"
            assert block not in self.cached.values(), "a fresh block is still findable"
            self.storage[block] = None

    @rule(tokens=TOKENS, extra=st.integers(0, 3), count=st.integers(0, 4))
    def ask(self, tokens: list[int], extra: int, count: int) -> None:
        others = [entry.reservation for entry in self.live[:count]]
        said = self.pool.would_fit(tokens, extra, finds_prefix=True, without=others)
        pool, others = copy.deepcopy((self.pool, others))
        for reservation in others:
            pool.release(reservation)
        assert said == (pool.reserve(tokens, extra) is not None)

    @rule(entry=held, count=st.integers(1, 9))
    def compute(self, entry: Held | None, count: int) -> None:
        if entry is None or not entry.live:
            return
        entry.computed = min(entry.computed + count, len(entry.tokens))
        blocks = entry.reservation.block_ids
        done = entry.tokens[: entry.computed]
        for prefix, block in zip(self.prefixes(done), blocks, strict=False):
            if block not in self.cached.values():
                self.storage[block] = prefix
            assert self.storage[block] == prefix, "a shared block was overwritten"
        self.pool.commit(entry.reservation, done)
        for prefix, block in zip(self.prefixes(done), blocks, strict=False):
            if len(prefix) > entry.offered and prefix not in self.cached:
                self.cached[prefix] = block
        entry.offered = max(entry.offered, len(done) // WIDTH * WIDTH)

    @rule(entry=held, token=st.integers(0, 1))
    def decode(self, entry: Held | None, token: int) -> None:
        if entry is None or not entry.live:
            return
        before = list(entry.reservation.block_ids)
        needed = -(-(len(entry.tokens) + 1) // WIDTH) - len(before)
        has_room = needed <= self.free() + len(self.recency)
        assert self.pool.grow(entry.reservation, len(entry.tokens) + 1) == has_room
        after = entry.reservation.block_ids
        assert after[: len(before)] == before
        if has_room:
            if needed > 0:
                entry.reservation.block_ids = before  # the model counts free blocks without them
                self.take(needed)
                self.check_private(after[len(before) :])
                entry.reservation.block_ids = after
            entry.tokens.append(token)
        else:
            assert after == before

    @rule(entry=consumes(held))
    def release(self, entry: Held | None) -> None:
        if entry is None or not entry.live:
            return
        self.pool.release(entry.reservation)
        entry.live = False
        self.live.remove(entry)
        name_of = {block: prefix for prefix, block in self.cached.items()}
        for block in reversed(entry.reservation.block_ids):
            if block in name_of and self.holders(block) == 0:
                self.recency.append(name_of[block])

    @invariant()
    def stats_agree(self) -> None:
        self.pool.check()
        stats = self.pool.stats
        assert (stats.free, stats.cached) == (self.free(), len(self.recency))
        assert stats.used + stats.free + stats.cached == stats.total == BLOCKS


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, derandomize=True
)
