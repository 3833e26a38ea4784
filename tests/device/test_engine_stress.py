"""Random requests, cancels and failures at once: one terminal event each, nothing left."""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import random
import re
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from engines import WAIT_S, assert_all_free, prompt_of, wait_for

from flowprefill import SLO, Engine, Request, SamplingParams
from flowprefill.config import POLICIES
from flowprefill.engine import core, stories
from flowprefill.engine.handle import Handle
from flowprefill.engine.records import RequestRecord
from flowprefill.errors import FlowPrefillError

REQUESTS = 200
# What the engine keeps of ended requests.
KEPT = (
    (core, "KEPT_DECISIONS"), (core, "KEPT_RUN_NAMES"),
    (stories, "KEPT_STORIES"), (stories, "KEPT_PREFILLS"),
)  # fmt: skip
GRANULARITIES = ("budget:0.5", "operator", "layer", "none", "chunk:64")


class Ends:
    """Counts terminal events by request."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.preemptions = 0

    def on_end(self, record: RequestRecord) -> None:
        self.count[record.request_id] += 1

    def on_preemption(self, reason: str, ack_s: float) -> None:
        assert reason
        assert ack_s >= 0
        self.preemptions += 1

    def on_decision(self, seconds: float) -> None:
        assert seconds >= 0


def random_request(chance: random.Random, number: int) -> tuple[Request, SLO]:
    tokens = chance.choice((1, 5, 16, 40, 64, 130, 400, 900))
    params = SamplingParams(
        max_tokens=chance.randrange(1, 12),
        temperature=chance.choice((0.0, 0.8)),
        logprobs=chance.choice((None, 2)),
        repetition_penalty=chance.choice((1.0, 1.2)),
        seed=chance.choice((None, number)),
    )
    slo = SLO(
        ttft=chance.choice((None, 0.01, 0.2, 5.0)),
        tpot=chance.choice((None, 0.02, 1.0)),
        on_miss=chance.choice(("demote", "demote", "drop")),
    )
    prompt = prompt_of(tokens, chance.randrange(40))
    return Request(prompt, params, id=f"r{number}"), slo


def one_round(
    engine: Engine, chance: random.Random, numbers: itertools.count[int], requests: int = REQUESTS
) -> list[str]:
    """Submit from four threads, cancel some at random moments; returns how each request ended."""
    plans = [random_request(chance, next(numbers)) for _ in range(requests)]
    dooms = [chance.choice((None, None, 0, 1, 3)) for _ in plans]
    outcomes: list[str] = []

    def serve(handle: Handle, doom: int | None) -> None:
        try:
            if doom is not None:
                for _ in itertools.islice(handle, doom):
                    pass
                handle.cancel()
            outcomes.append(handle.result(WAIT_S).finish_reason)
        except FlowPrefillError as error:
            outcomes.append(type(error).__name__)

    def work(index: int) -> None:
        mine = list(zip(plans, dooms, strict=True))[index::4]
        handles = [(engine.submit(*plan), doom) for plan, doom in mine]
        for handle, doom in handles:
            serve(handle, doom)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive(), "a request never ended"
    return outcomes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "granularity"),
    list(zip(POLICIES, itertools.cycle(GRANULARITIES), strict=False)),
)
def test_one_terminal_event_each_and_nothing_left(
    open_engine: Callable[..., Engine], policy: str, granularity: str
) -> None:
    """Each ends once and nothing is left, with memory for a tenth of the requests at a time."""
    engine = open_engine(
        policy=policy, granularity=granularity, kv_cache_gib=0.0015, block_tokens=16, threads=2
    )
    ends = Ends()
    engine.subscribe(ends)
    outcomes = one_round(engine, random.Random(policy), itertools.count())
    assert len(outcomes) == REQUESTS
    assert set(outcomes) <= {"length", "stop", "RequestCancelled", "DeadlinePassed"}
    assert_all_free(engine)
    assert len(ends.count) == REQUESTS
    assert set(ends.count.values()) == {1}
    wait_for(lambda: ends.preemptions == engine.stats().preemptions, "each suspension is told once")


def test_failures_among_the_rest(
    open_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(kv_cache_gib=0.0015, block_tokens=16)
    chance = random.Random(8)
    original: Any = engine._worker._model.make_run

    class Failing:
        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def make_run(self, *arguments: Any) -> Any:
            return original(*arguments, fail_at=chance.choice((-1, -1, -1, 0, 2)))

    model = engine._worker._model
    monkeypatch.setattr(engine._worker, "_model", Failing())
    ends = Ends()
    engine.subscribe(ends)
    outcomes = one_round(engine, random.Random(9), itertools.count())
    assert "RequestFailed" in outcomes
    assert len(outcomes) == REQUESTS
    assert_all_free(engine)
    assert set(ends.count.values()) == {1}
    assert len(ends.count) == REQUESTS


class MallocInfo(ctypes.Structure):
    """What glibc's mallinfo2 returns."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd",
            "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def python_bytes() -> int:
    """Bytes of live small Python objects, which have an allocator of their own."""
    with tempfile.TemporaryFile() as report:
        stderr = os.dup(2)
        os.dup2(report.fileno(), 2)
        try:
            sys._debugmallocstats()
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        report.seek(0)
        told = re.search(rb"# bytes in allocated blocks += *([\d,]+)", report.read())
    assert told is not None
    return int(told[1].replace(b",", b""))


def bytes_in_use() -> int:
    """Bytes that this process has allocated and not freed, of C++ and of Python.

    Resident pages say more: what allocators keep, and workspaces that are kept for the next run,
    which the kernel rounds up to huge pages. How much that is depends on chance.
    """
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = MallocInfo
    info = libc.mallinfo2()
    return int(info.uordblks + info.hblkhd) + python_bytes()


@pytest.mark.slow
def test_memory_does_not_grow_over_rounds(
    open_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once all bounded tables are full, more requests leave nothing behind."""
    for module, name in KEPT:
        monkeypatch.setattr(module, name, 64)
    engine = open_engine(kv_cache_gib=0.0015, block_tokens=16)
    for token in range(engine.vocab_size):
        engine.tokenizer.token_bytes(token)  # spellings are kept
    numbers, chance = itertools.count(), random.Random(4)
    sizes = []
    for _ in range(15):
        one_round(engine, chance, numbers, requests=100)
        assert_all_free(engine)
        sizes.append(bytes_in_use())
    growth = (sizes[-1] - sizes[6]) / 8  # a round; the first ones fill pools and scratch memory
    assert growth < 50_000, str(sizes)
