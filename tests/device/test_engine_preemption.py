"""Preemption, timings, prefix reuse, short memory: outputs are those of a quiet engine."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from devices import ONE, Device, on
from engines import WAIT_S, Spinning, assert_all_free, greedy, ids_of, prompt_of, start_long

from flowprefill import SLO, Engine, Request
from flowprefill.config import POLICIES
from flowprefill.engine.live_run import LiveRun
from flowprefill.errors import ConfigError
from flowprefill.request import Timings

OpenEngine = Callable[..., Engine]
LONG = 12_000
TRIES = 10  # to submit while a long one executes: other programs may have the cores just then
SOON, LATER = SLO(ttft=WAIT_S), SLO(ttft=10 * WAIT_S)


@on(ONE)
def test_urgent_request_overtakes_and_both_are_right(
    device: Device, open_engine: OpenEngine, set_options: Callable[..., None]
) -> None:
    set_options(num_lanes=1)
    long_ids, short_ids = prompt_of(device.long_prompt, 1), prompt_of(30, 2)
    for granularity in device.preemptible:
        engine = open_engine(granularity=granularity, prefix_cache=False, policy="edf")
        expected = ids_of(engine, long_ids, 3), ids_of(engine, short_ids, 1)
        for _ in range(TRIES):
            long = start_long(engine, Request(long_ids, greedy(3), id="long"), LATER)
            short = engine.submit(Request(short_ids, greedy(1), id="short"), SOON)
            short_done = short.result(WAIT_S)
            is_first = not long.done
            long_done = long.result(WAIT_S)
            assert (long_done.token_ids, short_done.token_ids) == expected
            if is_first or not device.is_met:
                break
        if device.is_met:
            assert is_first, "the short one ends first"
            assert_overtaken(engine, long_done.timings, short_done.timings)
        if device.is_cuda:
            report = engine._worker._model.lane_report()  # type: ignore[attr-defined]
            assert report["num_restores"] == report["num_spills"]
            if device.is_met and not granularity.startswith("chunk"):
                assert report["num_spills"] > 0, "one lane: its activations make room"
        assert_all_free(engine)
        engine.close()


def assert_overtaken(engine: Engine, long: Timings, short: Timings) -> None:
    """Check what is told of a preemption."""
    assert long.preemptions >= 1
    assert long.suspended > 0
    assert short.preemptions == 0
    assert engine.stats().preemptions >= 1
    decisions = [d for d in engine.decisions() if d["requests"] == ["short"]]
    assert decisions[-1]["preempted"] is not None
    assert decisions[-1]["reason"]


def test_without_boundaries_nothing_can_overtake(open_engine: OpenEngine) -> None:
    engine = open_engine(granularity="none", prefix_cache=False, policy="edf")
    long = start_long(engine, Request(prompt_of(LONG, 1), greedy(1)))
    short = engine.submit(Request(prompt_of(30, 2), greedy(1)), SOON)
    short.result(WAIT_S)
    assert long.result(WAIT_S).timings.preemptions == 0


def test_a_policy_set_later_decides_from_then_on(open_engine: OpenEngine) -> None:
    engine = open_engine(granularity="operator", prefix_cache=False, policy="fcfs")
    long_ids, short_ids = prompt_of(LONG, 1), prompt_of(30, 2)

    def preemptions_of_long() -> int:
        long = start_long(engine, Request(long_ids, greedy(1)), LATER)
        engine.submit(Request(short_ids, greedy(1)), SOON).result(WAIT_S)
        return long.result(WAIT_S).timings.preemptions

    assert preemptions_of_long() == 0
    with pytest.raises(ConfigError, match="policy"):
        engine.set_policy("latest")
    live = start_long(engine, Request(long_ids, greedy(1)))
    with pytest.raises(RuntimeError, match="live"):
        engine.set_policy("edf")
    live.result(WAIT_S)
    assert engine.describe()["policy"] == "fcfs"
    assert_all_free(engine)
    engine.set_policy("edf", 64)
    assert (engine.describe()["policy"], engine.config.max_batch_tokens) == ("edf", 64)
    assert any(preemptions_of_long() for _ in range(TRIES))


class Prefills:
    """When the first run of each request had left the device, seconds after its arrival."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left_s: dict[str, float] = {}
        original = LiveRun.account

        def account(run: LiveRun) -> None:
            left_s = run.run.accounting().last_end_s
            for request in run.requests:
                self.left_s.setdefault(request.id, left_s - request.arrival_s)
            original(run)

        monkeypatch.setattr(LiveRun, "account", account)


@on(ONE)
def test_many_overtake_and_timings_add_up(
    device: Device, open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefills = Prefills(monkeypatch)
    engine = open_engine(granularity="budget:0.5", prefix_cache=False)
    long_ids, prompts = prompt_of(device.long_prompt, 3), [prompt_of(20 + n, n) for n in range(12)]
    expected = [ids_of(engine, ids, 2) for ids in (*prompts, long_ids)]
    for _ in range(TRIES):
        long = start_long(engine, Request(long_ids, greedy(2)))
        handles = [engine.submit(Request(ids, greedy(2)), SOON) for ids in prompts]
        assert [handle.result(WAIT_S).token_ids for handle in (*handles, long)] == expected
        if long.result().timings.preemptions or not device.is_met:
            break
    for handle in (*handles, long):
        timings = handle.result(WAIT_S).timings
        assert timings.ttft is not None
        accounted = timings.queue + timings.prefill_run + timings.suspended
        # What is left is the event thread's wake-up and sampling.
        assert accounted == pytest.approx(prefills.left_s[handle.request_id], abs=1e-6)
        assert accounted <= timings.ttft + 1e-6
    timings = long.result().timings
    assert not device.is_met or timings.preemptions >= 1
    assert (timings.suspended > 0) == (timings.preemptions > 0)


def test_invariant_5_equal_urgency_never_preempts(open_engine: OpenEngine) -> None:
    for policy in POLICIES:
        engine = open_engine(policy=policy, prefix_cache=False, max_batch_tokens=1)
        handles = [
            engine.submit(Request(prompt_of(1500, n), greedy(1)), SLO(ttft=50.0)) for n in range(4)
        ]
        for handle in handles:
            assert handle.result(WAIT_S).timings.preemptions == 0, policy
        engine.close()


def test_invariant_5_suspension_ends_though_urgent_ones_keep_coming(
    open_engine: OpenEngine,
) -> None:
    engine = open_engine(granularity="budget:0.5", prefix_cache=False)
    long = start_long(engine, Request(prompt_of(3000, 5), greedy(1)))
    served = 0
    for n in itertools.count():
        engine.submit(Request(prompt_of(64, n), greedy(1)), SLO(ttft=0.05)).result(WAIT_S)
        served += 1
        if long.done:
            break
        assert served < 5000, "the long one starves"
    assert long.result().timings.preemptions <= served


# ---- prefix cache --------------------------------------------------------------------------------


def test_equal_prefixes_are_reused_and_change_nothing(open_engine: OpenEngine) -> None:
    engine = open_engine(block_tokens=16)
    prompt = prompt_of(200, 6)
    first = engine.submit(Request(prompt, greedy(6))).result(WAIT_S)
    again = engine.submit(Request(prompt, greedy(6)))
    second = again.result(WAIT_S)
    assert first.timings.cached_tokens == 0
    assert second.timings.cached_tokens == again.cached_tokens == 192
    assert second.token_ids == first.token_ids
    # The generated tokens are in the cache too: a follow-up starts behind them.
    follow_up = prompt + first.token_ids + prompt_of(20, 7)
    third = engine.submit(Request(follow_up, greedy(6))).result(WAIT_S)
    assert third.timings.cached_tokens >= 192
    other = open_engine(block_tokens=16, prefix_cache=False)
    assert third.token_ids == ids_of(other, follow_up, 6)
    stats = engine.stats()
    assert stats.prefix_cache_hits == 192 + third.timings.cached_tokens
    assert stats.prefix_cache_queries == 200 + 200 + 226
    assert stats.kv_blocks_cached > 0
    assert_all_free(engine)


def test_prefix_cache_off_shares_nothing(open_engine: OpenEngine) -> None:
    engine = open_engine(prefix_cache=False)
    for _ in range(2):
        completion = engine.submit(Request(prompt_of(200, 6), greedy(1))).result(WAIT_S)
        assert completion.timings.cached_tokens == 0
    assert engine.stats().kv_blocks_cached == 0


# ---- short memory --------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_decoding_sequences_are_evicted_and_computed_again(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch, prefix_cache: bool
) -> None:
    prompts = [prompt_of(290 + 16 * n, 30 + n) for n in range(8)]
    quiet = open_engine()
    expected = [ids_of(quiet, prompt, 60) for prompt in prompts]
    engine = open_engine(kv_cache_gib=0.001, block_tokens=16, prefix_cache=prefix_cache)
    assert engine.stats().kv_blocks_total * 16 < sum(len(prompt) + 60 for prompt in prompts)
    evicted = count_evictions(engine, monkeypatch)
    Spinning(engine, monkeypatch, from_tokens=600)
    holder = engine.submit(Request(prompt_of(600, 99), greedy(1)))
    handles = [engine.submit(Request(prompt, greedy(60))) for prompt in prompts]
    holder.cancel()  # so all begin together
    assert [handle.result(WAIT_S).token_ids for handle in handles] == expected
    assert evicted, "memory was never short: the test shows nothing"
    assert_all_free(engine)


def test_requests_wait_for_memory_and_all_are_served(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(kv_cache_gib=0.001, block_tokens=16)
    Spinning(engine, monkeypatch, from_tokens=2000)
    holder = engine.submit(Request(prompt_of(2000, 99), greedy(1)))
    handles = [engine.submit(Request(prompt_of(700, n), greedy(2))) for n in range(10)]
    assert len(engine._core._memory) == engine.stats().waiting == 10, "one has nearly all blocks"
    holder.cancel()
    for handle in handles:
        assert len(handle.result(WAIT_S).token_ids) == 2
    assert_all_free(engine)


def test_longest_request_fits_when_others_hold_memory(open_engine: OpenEngine) -> None:
    engine = open_engine(kv_cache_gib=0.001, block_tokens=16)
    capacity = engine.stats().kv_blocks_total * 16
    small = [engine.submit(Request(prompt_of(100, n), greedy(30))) for n in range(6)]
    whole = engine.submit(Request(prompt_of(capacity - 40, 99), greedy(40)))
    assert len(whole.result(WAIT_S).token_ids) == 40
    for handle in small:
        assert len(handle.result(WAIT_S).token_ids) == 30
    assert_all_free(engine)


def count_evictions(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of evicted sequences, as they are evicted from now on."""
    evicted: list[str] = []
    take_evicted = engine._core._memory.take_evicted

    def counted() -> Any:
        lost = take_evicted()
        evicted.extend(sequence.id for sequence in lost)
        return lost

    monkeypatch.setattr(engine._core._memory, "take_evicted", counted)
    return evicted
