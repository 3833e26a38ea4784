"""How requests end early: cancelled in every state, failed, dropped, closed; nothing is left."""

from __future__ import annotations

import gc
import itertools
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import POISON, Tiny
from devices import ONE, Device, on
from engines import (
    WAIT_S,
    Spinning,
    assert_all_free,
    greedy,
    ids_of,
    prompt_of,
    start_long,
    wait_for,
)

from flowprefill import SLO, Engine, EngineConfig, Request, SamplingParams, _core
from flowprefill.engine import core, outbox
from flowprefill.engine.handle import Handle
from flowprefill.engine.live_request import LiveRequest
from flowprefill.engine.worker import Batch
from flowprefill.errors import DeadlinePassed, NotReady, RequestCancelled, RequestFailed
from flowprefill.scheduling.policies.base import Policy
from flowprefill.scheduling.work import Verdict

OpenEngine = Callable[..., Engine]


def assert_cancelled(handle: Handle) -> None:
    with pytest.raises(RequestCancelled, match=handle.request_id):
        handle.result(WAIT_S)
    assert handle.timings is not None


def test_cancel_in_every_state(open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_engine(kv_cache_gib=0.001, block_tokens=16, policy="edf")
    Spinning(engine, monkeypatch, from_tokens=400)
    first = engine.submit(Request(prompt_of(1500), greedy(5)))
    wait_for(lambda: engine.stats().running == 1, "running")
    no_memory = engine.submit(Request(prompt_of(1000, 1), greedy(5)))
    no_turn = engine.submit(Request(prompt_of(100, 2), greedy(5)))
    assert engine.stats().waiting == 2
    no_memory.cancel()
    assert no_memory.done, "waiting for memory: ends at once"
    no_turn.cancel()
    assert no_turn.done, "waiting for its turn: ends at once"
    urgent = engine.submit(Request(prompt_of(410, 3), greedy(5)), SLO(ttft=WAIT_S))
    wait_for(lambda: engine.stats().suspended == 1, "suspended")
    first.cancel()
    assert_cancelled(first)
    assert not urgent.done
    urgent.cancel()
    for handle in (no_memory, no_turn, urgent):
        assert_cancelled(handle)
    assert_all_free(engine)
    done = engine.submit(Request(prompt_of(20), greedy(2)))
    completion = done.result(WAIT_S)
    done.cancel()
    assert done.result() == completion
    assert_all_free(engine)


def test_cancel_while_decoding_keeps_what_was_seen(engine: Engine) -> None:
    handle = engine.submit(Request(prompt_of(30), greedy(10_000)))
    tokens: list[int] = []

    def read() -> None:
        for token in handle:
            tokens.append(token.token_id)
            if len(tokens) == 5:
                handle.cancel()

    with pytest.raises(RequestCancelled):
        read()
    assert tokens[:5] == ids_of(engine, prompt_of(30), 5)
    assert_all_free(engine)


def test_cancelling_one_of_a_batch_leaves_the_others(open_engine: OpenEngine) -> None:
    engine = open_engine()
    prompts = [prompt_of(60, n) for n in range(6)]
    expected = [ids_of(engine, prompt, 20) for prompt in prompts]
    for victim in range(6):
        blocker = engine.submit(Request(prompt_of(3000, 50), greedy(1)))
        handles = [engine.submit(Request(prompt, greedy(20))) for prompt in prompts]
        for _ in zip(range(victim), handles[victim], strict=False):
            pass  # a different moment each time
        handles[victim].cancel()
        for index, handle in enumerate(handles):
            if index != victim:
                assert handle.result(WAIT_S).token_ids == expected[index]
        blocker.result(WAIT_S)
    assert_all_free(engine)


@on(ONE)
def test_cancelled_in_mid_prefill_frees_everything(device: Device, open_engine: OpenEngine) -> None:
    engine = open_engine(granularity="operator", prefix_cache=False)
    expected = ids_of(engine, prompt_of(40, 2), 3)
    for _ in range(3):
        long = start_long(engine, Request(prompt_of(device.long_prompt, 1), greedy(400)))
        long.cancel()
        assert_cancelled(long)
        assert ids_of(engine, prompt_of(40, 2), 3) == expected
    assert_all_free(engine)


@pytest.mark.parametrize("moment", ["before sampling", "after sampling"])
@pytest.mark.parametrize("max_tokens", [1, 3])
def test_cancel_while_a_token_is_sampled(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch, moment: str, max_tokens: int
) -> None:
    """The event thread samples without the lock; a cancel in this moment must not be lost."""
    engine = open_engine()
    handles: list[Handle] = []
    submitted = threading.Event()
    take = LiveRequest.take

    def cancelling(request: LiveRequest, *arguments: Any) -> Any:
        assert submitted.wait(WAIT_S)
        if moment == "before sampling":
            handles[0].cancel()
        token = take(request, *arguments)
        if moment == "after sampling":
            handles[0].cancel()
        return token

    monkeypatch.setattr(LiveRequest, "take", cancelling)
    handles.append(engine.submit(Request(prompt_of(10), greedy(max_tokens))))
    submitted.set()
    if max_tokens == 1:  # its reader has the last token: that is how it ends
        assert handles[0].result(WAIT_S).finish_reason == "length"
    else:
        assert_cancelled(handles[0])
    assert_all_free(engine)


# ---- failures ------------------------------------------------------------------------------------


def failing_at(engine: Engine, monkeypatch: pytest.MonkeyPatch, tokens: int, segment: int) -> None:
    """Let the prefill of a prompt of so many tokens throw in a segment."""
    model = engine._worker._model

    class Failing:
        failing = False

        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def make_run(self, *arguments: Any, **options: Any) -> Any:
            make: Any = model.make_run
            return make(*arguments, **options, fail_at=segment if self.failing else -1)

    stand_in = Failing()
    original = engine._worker.make_run

    def make_run(batch: Batch) -> Any:
        stand_in.failing = any(len(sequence.tokens) == tokens for sequence in batch.sequences)
        return original(batch)

    monkeypatch.setattr(engine._worker, "_model", stand_in)
    monkeypatch.setattr(engine._worker, "make_run", make_run)


@pytest.mark.parametrize("segment", [0, 3, 10])
@on(ONE)
def test_a_failing_segment_ends_its_request_and_no_other(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch, segment: int
) -> None:
    engine = open_engine(granularity="operator", max_batch_tokens=1)
    prompts = [prompt_of(50, n) for n in range(4)]
    expected = [ids_of(engine, prompt, 6) for prompt in prompts]
    failing_at(engine, monkeypatch, 70, segment)
    before = [engine.submit(Request(prompt, greedy(6))) for prompt in prompts[:2]]
    bad = engine.submit(Request(prompt_of(70, 9), greedy(6), id="bad"))
    after = [engine.submit(Request(prompt, greedy(6))) for prompt in prompts[2:]]
    with pytest.raises(
        RequestFailed, match=r"request bad: .*operator '\w+' of layer -?\d"
    ) as failed:
        bad.result(WAIT_S)
    assert "injected failure" in str(failed.value)
    assert [handle.result(WAIT_S).token_ids for handle in (*before, *after)] == expected
    assert_all_free(engine)


def test_a_run_that_cannot_be_built_fails_its_requests(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine()
    original = engine._worker.make_run

    def make_run(batch: Batch) -> Any:
        if any(len(sequence.tokens) == 600 for sequence in batch.sequences):
            raise MemoryError("no memory for the workspace")
        return original(batch)

    monkeypatch.setattr(engine._worker, "make_run", make_run)
    blocker = engine.submit(Request(prompt_of(3000), greedy(1)))
    bad = engine.submit(Request(prompt_of(600, 1), greedy(1), id="bad"))
    good = engine.submit(Request(prompt_of(700, 2), greedy(3)))
    with pytest.raises(RequestFailed, match="request bad: no memory for the workspace"):
        bad.result(WAIT_S)
    assert len(good.result(WAIT_S).token_ids) == 3
    blocker.result(WAIT_S)
    assert_all_free(engine)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_nan_ends_its_request_and_poisons_no_other(
    open_engine: OpenEngine, poisoned: Path, dtype: str, prefix_cache: bool
) -> None:
    if dtype == "bf16" and not _core.has_bf16_gemm():
        pytest.skip("this processor does not multiply bf16 natively")
    settings = {"kv_cache_gib": 0.001, "block_tokens": 16, "prefix_cache": prefix_cache}
    engine = open_engine(poisoned, dtype=dtype, **settings)
    prompts = [prompt_of(37 + n, n) for n in range(12)]
    expected = [ids_of(engine, prompt, 8) for prompt in prompts]
    for round_ in range(4):  # the blocks go round: each has been a poisoned request's
        bad = [
            engine.submit(Request([*prompt_of(90 + n, 60 + n + round_), POISON], greedy(3)))
            for n in range(6)
        ]
        handles = [engine.submit(Request(prompt, greedy(8))) for prompt in prompts]
        for handle in bad[1:]:
            with pytest.raises(RequestFailed, match=r"request .* NaN"):
                handle.result(WAIT_S)
        bad[0].cancel()
        assert [handle.result(WAIT_S).token_ids for handle in handles] == expected
    assert_all_free(engine)


def test_blocks_of_a_cancelled_poisoned_request_are_harmless(
    open_engine: OpenEngine, poisoned: Path
) -> None:
    engine = open_engine(poisoned, kv_cache_gib=0.001, block_tokens=16, prefix_cache=False)
    expected = ids_of(engine, prompt_of(21), 8)
    for _ in range(3):
        bad = engine.submit(Request([POISON] * 1900, greedy(3)))
        segments = engine.stats().segments
        wait_for(lambda: engine.stats().segments > segments, "executing")  # noqa: B023
        bad.cancel()
        with pytest.raises((RequestCancelled, RequestFailed)):
            bad.result(WAIT_S)
        assert ids_of(engine, prompt_of(21), 8) == expected
    assert_all_free(engine)


def silenced(monkeypatch: pytest.MonkeyPatch, module: Any) -> list[str]:
    """A module's logged exceptions; pytest would keep tracebacks, and runs with them."""
    logged: list[str] = []
    monkeypatch.setattr(module.log, "exception", lambda message, *_: logged.append(message))
    return logged


class Raising:
    """A policy of one's own with a bug: it raises once it is told to."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.is_broken = False

    def __getattr__(self, name: str) -> Any:
        if self.is_broken:
            raise LookupError("a bug in the policy")
        return getattr(self._inner, name)


def test_a_policy_that_raises_leaves_no_client_waiting(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine()
    logged = silenced(monkeypatch, core)
    policy = Raising(engine._core._scheduler.policy)
    engine._core._scheduler.policy = policy
    engine._core._scheduler._queue._policy = policy
    # None of them can have ended by then: that takes a thousand decode steps.
    handles = [engine.submit(Request(prompt_of(3000, n), greedy(1000))) for n in range(4)]
    policy.is_broken = True
    for handle in handles:
        with pytest.raises(RequestFailed, match="a bug in the policy"):
            handle.result(WAIT_S)
    with pytest.raises(NotReady, match="the engine has failed: a bug in the policy"):
        engine.submit(Request(prompt_of(5), greedy(1)))
    assert logged == ["the engine has failed"]
    assert engine.has_failed
    assert not engine.is_ready
    assert_all_free(engine)


def test_a_policy_that_raises_at_a_prediction_costs_no_client_its_handle(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine()
    silenced(monkeypatch, core)

    def no_prediction(*_: object, **_options: object) -> float:
        raise LookupError("a bug in the policy")

    start_long(engine, Request(prompt_of(3000), greedy(1000)))
    monkeypatch.setattr(engine._core._scheduler, "predicted_ttft_s", no_prediction)
    handle = engine.submit(Request(prompt_of(3000, 1), greedy(1)))
    with pytest.raises(RequestFailed, match="a bug in the policy"):
        handle.result(WAIT_S)
    assert_all_free(engine)


def test_a_policy_that_cannot_be_made_leaves_no_thread_and_no_file(
    device: Device, tiny: Tiny, tmp_path: Path
) -> None:
    def no_policy(*_: object) -> Policy:
        raise LookupError("a bug in the policy")

    def held() -> list[int]:
        return [len(list(Path("/proc/self", of).iterdir())) for of in ("task", "fd")]

    settings = {"calibrate": False, "cache_dir": str(tmp_path)} | device.settings
    config = EngineConfig(**settings)
    with pytest.raises(LookupError, match="a bug in the policy"):
        Engine(tiny[0], config, policy=no_policy)
    before = held()
    with pytest.raises(LookupError, match="a bug in the policy"):
        Engine(tiny[0], config, policy=no_policy)
    gc.collect()
    deadline = time.monotonic() + WAIT_S  # a thread that has ended is listed for a moment longer
    while any(now > then for now, then in zip(held(), before, strict=True)):
        assert time.monotonic() < deadline, (held(), before)
        time.sleep(0.01)


def test_a_policy_that_wants_to_be_asked_in_a_year(open_engine: OpenEngine) -> None:
    engine = open_engine()
    policy: Any = engine._core._scheduler.policy
    policy.should_preempt = lambda *_: Verdict(False, "not now", 3e7)
    handles = [engine.submit(Request(prompt_of(3000, n), greedy(20))) for n in range(3)]
    for handle in handles:
        assert len(handle.result(WAIT_S).token_ids) == 20
    assert_all_free(engine)


def test_an_observer_that_raises_costs_no_client_its_result(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def __getattr__(self, name: str) -> Any:
            raise LookupError(name)

    engine = open_engine()
    logged = silenced(monkeypatch, outbox)
    engine.subscribe(Broken())
    handles = [engine.submit(Request(prompt_of(20, n), greedy(3))) for n in range(5)]
    for handle in handles:
        assert len(handle.result(WAIT_S).token_ids) == 3
    assert "an observer of the engine failed" in logged
    assert_all_free(engine)


# ---- deadlines -----------------------------------------------------------------------------------


def test_hopeless_requests_are_dropped_or_demoted(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(policy="fcfs")
    Spinning(engine, monkeypatch, from_tokens=3000)
    running = engine.submit(Request(prompt_of(3000), greedy(1)), SLO(ttft=0.2))
    slo = SLO(ttft=0.3, on_miss="drop")
    dropped = engine.submit(Request(prompt_of(2500, 1), greedy(1)), slo)
    with pytest.raises(DeadlinePassed, match=dropped.request_id):
        dropped.result(WAIT_S)
    assert dropped.timings is not None
    assert dropped.timings.ttft is None
    assert dropped.timings.slo_met is False
    running.cancel()
    assert_cancelled(running)
    demoted = engine.submit(Request(prompt_of(100, 2), greedy(2)), SLO(ttft=1e-4))
    completion = demoted.result(WAIT_S)
    assert completion.timings.slo_met is False
    assert_all_free(engine)


# ---- closing -------------------------------------------------------------------------------------


def test_graceful_close_waits_for_the_live_ones(open_engine: OpenEngine) -> None:
    engine = open_engine()
    handles = [engine.submit(Request(prompt_of(500, n), greedy(5))) for n in range(5)]
    engine.close()
    for handle in handles:
        assert handle.done
        assert len(handle.result().token_ids) == 5
    with pytest.raises(NotReady):
        engine.submit(Request([5], greedy(1)))
    engine.close()
    handles[0].cancel()


def test_close_waits_for_ever_where_that_is_asked(open_engine: OpenEngine) -> None:
    engine = open_engine()
    handle = engine.submit(Request(prompt_of(900), greedy(20)))
    engine.close(math.inf)
    assert len(handle.result(WAIT_S).token_ids) == 20


def test_close_lets_held_ones_go_on_to_their_end(open_engine: OpenEngine) -> None:
    engine = open_engine()
    handles = [engine.submit(Request(prompt_of(50, n), greedy(40))) for n in range(3)]
    for handle in handles:
        handle.hold()
    wait_for(lambda: engine.stats().held == 3, "all are held")
    engine.close()
    assert [len(handle.result().token_ids) for handle in handles] == [40] * 3
    handles[0].hold()
    handles[0].resume()


def test_cancelled_while_held_frees_everything(open_engine: OpenEngine) -> None:
    engine = open_engine()
    handle = engine.submit(Request(prompt_of(50), greedy(1000)))
    handle.hold()
    wait_for(lambda: engine.stats().held == 1 and not engine._core._runs, "it is held, at rest")
    assert engine.stats().kv_blocks_used > 0
    handle.cancel()
    assert handle.done
    assert_cancelled(handle)
    assert_all_free(engine)


def test_abrupt_close_cancels_the_live_ones(open_engine: OpenEngine) -> None:
    engine = open_engine(kv_cache_gib=0.001, block_tokens=16)
    handles = [engine.submit(Request(prompt_of(900, n), greedy(1000))) for n in range(6)]
    start = time.monotonic()
    engine.close(0.0)
    assert time.monotonic() - start < WAIT_S
    for handle in handles:
        assert handle.done
        assert_cancelled(handle)
    assert engine.stats().kv_blocks_used == 0


def test_closed_while_many_threads_submit(open_engine: OpenEngine) -> None:
    engine = open_engine()
    outcomes: list[str] = []
    started = threading.Barrier(9)

    def work(seed: int) -> None:
        started.wait()
        for step in itertools.count():
            try:
                handle = engine.submit(
                    Request(prompt_of(40 + seed, step), SamplingParams(max_tokens=4))
                )
                handle.result(WAIT_S)
                outcomes.append("finished")
            except RequestCancelled:
                outcomes.append("cancelled")
            except NotReady:
                outcomes.append("refused")
                return

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    started.wait()
    wait_for(lambda: len(outcomes) > 20, "requests end")
    closers = [threading.Thread(target=engine.close, args=(0.0,)) for _ in range(3)]
    for thread in closers:
        thread.start()
    for thread in (*closers, *threads):
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert outcomes.count("refused") == 8


def test_a_forked_child_is_told_that_the_engine_is_not_there(open_engine: OpenEngine) -> None:
    engine = open_engine()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(int(WAIT_S))
            engine.submit(Request(prompt_of(5), greedy(1)))
        except NotReady:
            engine.close()
            status = 3 if engine.is_ready else 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert engine.is_ready
    assert len(engine.submit(Request(prompt_of(5), greedy(1))).result(WAIT_S).token_ids) == 1
