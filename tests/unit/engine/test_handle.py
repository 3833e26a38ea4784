"""Tests of Handle: every way to consume, every way to end, then threads and asyncio at once."""

from __future__ import annotations

import asyncio
import gc
import math
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from flowprefill.engine.handle import Handle
from flowprefill.errors import DeadlinePassed, RequestFailed
from flowprefill.request import Completion, Timings, Token

TIMINGS = Timings(0.1, 0.2, 0.0, 0, 0.3, 0.3, 1.0, 0.1, True, 0)


def token(index: int) -> Token:
    return Token(index, f"t{index}")


def completion(count: int) -> Completion:
    tokens = tuple(token(i) for i in range(count))
    return Completion("r", 3, "".join(t.text for t in tokens), tokens, "stop", TIMINGS)


def ended(count: int) -> Handle:
    handle = Handle("r", 3)
    for index in range(count):
        handle.push(token(index))
    handle.finish(completion(count))
    return handle


def later(handle: Handle, count: int, error: RequestFailed | None = None) -> threading.Thread:
    """Feed the handle from another thread, which the caller joins."""

    def produce() -> None:
        for index in range(count):
            handle.push(token(index))
        if error is None:
            handle.finish(completion(count))
        else:
            handle.fail(error)

    thread = threading.Thread(target=produce)
    thread.start()
    return thread


def test_handle_before_the_end_has_no_timings() -> None:
    handle = Handle("r", 3)
    assert (handle.request_id, handle.prompt_tokens, handle.cached_tokens) == ("r", 3, 0)
    assert not handle.done
    assert handle.timings is None
    assert handle.predicted_ttft is None


def test_finish_gives_result_and_timings() -> None:
    handle = ended(2)
    assert handle.done
    assert handle.timings is TIMINGS
    assert handle.result(0.0).token_ids == [0, 1]
    assert [t.token_id for t in handle] == [0, 1]
    assert [t.token_id for t in handle] == [0, 1], "every iterator starts at the first token"


def test_fail_raises_after_the_remaining_tokens() -> None:
    handle = Handle("r", 3)
    handle.push(token(0))
    handle.fail(RequestFailed("layer 3: boom"), TIMINGS)
    stream = iter(handle)
    assert next(stream).token_id == 0
    with pytest.raises(RequestFailed, match="layer 3: boom"):
        next(stream)
    with pytest.raises(RequestFailed):
        handle.result()
    assert handle.timings is TIMINGS


@pytest.mark.parametrize("first", ["finish", "fail"])
@pytest.mark.parametrize("second", ["finish", "fail", "push"])
def test_call_after_terminal_raises_assertion(first: str, second: str) -> None:
    handle = Handle("r", 3)
    calls = {
        "finish": lambda: handle.finish(completion(0)),
        "fail": lambda: handle.fail(DeadlinePassed("late")),
        "push": lambda: handle.push(token(0)),
    }
    calls[first]()
    with pytest.raises(AssertionError, match=rf"r: {second}\(\) after its terminal event"):
        calls[second]()


def test_result_too_late_raises_timeout_and_leaves_no_waiter() -> None:
    handle = Handle("r", 3)
    with pytest.raises(TimeoutError, match=r"request r has not ended within 0\.001 s"):
        handle.result(0.001)
    assert not handle._end_wakers
    handle.finish(completion(0))
    assert handle.result(0.0).finish_reason == "stop"


def test_result_waits_for_another_thread() -> None:
    handle = Handle("r", 3)
    thread = later(handle, 50)
    assert len(handle.result(100).tokens) == 50
    thread.join()


def test_iter_blocks_until_tokens_come() -> None:
    handle = Handle("r", 3)
    thread = later(handle, 50)
    assert [t.token_id for t in handle] == list(range(50))
    thread.join()


def test_cancel_calls_back_once() -> None:
    calls: list[int] = []
    handle = Handle("r", 3, lambda: calls.append(1))
    handle.cancel()
    handle.cancel()
    assert calls == [1]


def test_cancel_after_the_end_does_nothing() -> None:
    calls: list[int] = []
    handle = Handle("r", 3, lambda: calls.append(1))
    handle.finish(completion(0))
    handle.cancel()
    assert calls == []


def test_cancel_callback_may_end_the_request() -> None:
    handle = Handle("r", 3, lambda: handle.finish(completion(0)))
    handle.cancel()
    assert handle.done


async def test_async_iteration_and_await() -> None:
    handle = Handle("r", 3)
    waiting = asyncio.ensure_future(_collect(handle))
    result = asyncio.ensure_future(handle)
    await asyncio.sleep(0)
    thread = later(handle, 50)
    assert await waiting == list(range(50))
    assert len((await result).tokens) == 50
    assert len((await handle).tokens) == 50, "awaiting again after the end"
    thread.join()


async def test_async_failure_raises_after_the_remaining_tokens() -> None:
    handle = Handle("r", 3)
    seen: list[int] = []
    thread = later(handle, 3, RequestFailed("boom"))
    with pytest.raises(RequestFailed, match="boom"):
        await _collect(handle, seen)
    assert seen == [0, 1, 2]
    with pytest.raises(RequestFailed):
        await handle
    thread.join()


async def test_async_cancelled_wait_keeps_position_and_leaves_no_waiter() -> None:
    handle = Handle("r", 3)
    handle.push(token(0))
    stream = aiter(handle)
    assert (await anext(stream)).token_id == 0
    for _ in range(5):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(stream), 0.001)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(handle, 0.001)
    assert not handle._token_wakers
    assert not handle._end_wakers
    handle.push(token(1))
    assert (await anext(stream)).token_id == 1
    handle.finish(completion(2))
    assert (await handle).token_ids == [0, 1]


async def test_async_tasks_that_share_an_iterator_get_each_token_once() -> None:
    handle = Handle("r", 3)
    stream = aiter(handle)
    taken: list[int] = []

    async def consume() -> None:
        async for one in stream:
            taken.append(one.token_id)
            await asyncio.sleep(0)

    tasks = [asyncio.create_task(consume()) for _ in range(3)]
    for index in range(20):
        await asyncio.sleep(0)
        handle.push(token(index))
    handle.finish(completion(20))
    await asyncio.gather(*tasks)
    assert sorted(taken) == list(range(20))


def test_result_waits_for_ever_where_that_is_asked() -> None:
    for timeout in (math.inf, 1e12):
        handle = Handle("r", 3)
        thread = later(handle, 1)
        assert handle.result(timeout).token_ids == [0]
        thread.join()


@pytest.mark.parametrize("position", [None, 0])
def test_waiter_that_is_interrupted_by_what_it_waits_for(position: int | None) -> None:
    """As where a signal handler cancels the request while the lock is held."""

    class Interrupted(Handle):
        looks = 0

        def _is_ready(self, position: int | None) -> bool:
            is_ready = super()._is_ready(position)
            self.looks += 1
            if self.looks == 2:  # the one under the lock
                self.push(token(0))
                self.finish(completion(1))
            return is_ready

    handle = Interrupted("r", 3)
    assert handle._block(position, 20.0)
    assert handle.looks > 2


def test_loop_closed_while_waiting_does_not_disturb_the_producer() -> None:
    handle = Handle("r", 3)
    loop = asyncio.new_event_loop()
    waiting = handle.__await__()

    async def start_waiting() -> None:
        next(waiting)  # suspended on a future of this loop, never resumed

    loop.run_until_complete(start_waiting())
    loop.close()
    handle.push(token(0))
    handle.finish(completion(1))
    assert handle.result(0.0).token_ids == [0]
    waiting.close()
    gc.collect()


def test_waiting_consumer_of_tokens_is_not_woken_without_need() -> None:
    """A result() waiter sleeps through tokens; only the terminal event wakes it."""
    handle = Handle("r", 3)
    woken: list[str] = []
    assert handle._register(None, lambda: woken.append("end"))
    assert handle._register(0, lambda: woken.append("token"))
    handle.push(token(0))
    assert woken == ["token"]
    handle.push(token(1))
    handle.finish(completion(2))
    assert woken == ["token", "end"]


async def _collect(handle: Handle, seen: list[int] | None = None) -> list[int]:
    """Return the ids; they are in `seen` even when the iteration raises."""
    seen = [] if seen is None else seen
    async for item in handle:
        seen.append(item.token_id)
    return seen


async def _impatient(handle: Handle, count: int, seed: int) -> list[int]:
    """Consume with waits that are cancelled at random; no token may be lost or repeated."""
    chance = random.Random(seed)
    stream, seen = aiter(handle), list[int]()
    while len(seen) < count:
        task = asyncio.ensure_future(anext(stream))
        for _ in range(chance.randrange(3)):
            await asyncio.sleep(0)
        if chance.random() < 0.5:
            task.cancel()
        try:
            seen.append((await task).token_id)
        except asyncio.CancelledError:
            await asyncio.sleep(0)
    return seen


def test_stress_threads_and_loops_see_every_token_in_order() -> None:
    """12 handles, 60 tokens each: two threads, two loops and cancelled waits on every one."""
    handles = [Handle(f"r{i}", 3) for i in range(12)]
    expected = list(range(60))

    async def consume() -> None:
        for lists in await asyncio.gather(
            *(_collect(h) for h in handles),
            *(_impatient(h, 60, seed) for seed, h in enumerate(handles)),
        ):
            assert lists == expected
        for result in await asyncio.gather(*handles):
            assert result.token_ids == expected

    def produce() -> None:
        order = [h for h in handles for _ in range(61)]
        random.Random(7).shuffle(order)
        sent = dict.fromkeys(handles, 0)
        for handle in order:
            if sent[handle] == 60:
                handle.finish(completion(60))
            else:
                handle.push(token(sent[handle]))
                sent[handle] += 1

    with ThreadPoolExecutor(40) as pool:
        loops = [pool.submit(asyncio.run, consume()) for _ in range(2)]
        iterators = [pool.submit(lambda h: [t.token_id for t in h], h) for h in handles]
        results = [pool.submit(h.result, 100) for h in handles]
        producer = pool.submit(produce)
        producer.result(100)
        for loop in loops:
            loop.result(100)
        assert all(future.result(100) == expected for future in iterators)
        assert all(future.result(100).token_ids == expected for future in results)
    assert all(not h._token_wakers and not h._end_wakers for h in handles)
