"""Random requests, cancels and failures at once: one terminal event each, nothing left."""

from __future__ import annotations

import gc
import itertools
import random
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import WAIT_S, assert_all_free, prompt_of

from flowprefill import SLO, Engine, Request, SamplingParams
from flowprefill.config import POLICIES
from flowprefill.engine.handle import Handle
from flowprefill.engine.records import RequestRecord
from flowprefill.errors import FlowPrefillError

REQUESTS = 200
GRANULARITIES = ("budget:0.5", "operator", "layer", "none", "chunk:64")


class Ends:
    """Counts terminal events by request."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()

    def on_end(self, record: RequestRecord) -> None:
        self.count[record.request_id] += 1

    def on_preemption(self, reason: str, ack_s: float) -> None:
        assert reason
        assert ack_s >= 0

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


def one_round(engine: Engine, chance: random.Random, numbers: itertools.count[int]) -> list[str]:
    """Submit from four threads, cancel some at random moments; returns how each request ended."""
    plans = [random_request(chance, next(numbers)) for _ in range(REQUESTS)]
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
def test_invariants_2_and_3_one_terminal_event_each_and_nothing_left(
    open_engine: Callable[..., Engine], policy: str, granularity: str
) -> None:
    """Invariants 2 and 3, with memory for a tenth of the requests at a time."""
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


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.slow
def test_memory_does_not_grow_over_rounds(open_engine: Callable[..., Engine]) -> None:
    """After some rounds that fill pools and caches, more add only what fragmentation does."""
    engine = open_engine(kv_cache_gib=0.0015, block_tokens=16)
    numbers, chance = itertools.count(), random.Random(4)
    sizes = []
    for _ in range(8):
        one_round(engine, chance, numbers)
        assert_all_free(engine)
        gc.collect()
        sizes.append(resident_bytes())
    assert sizes[-1] - sizes[3] < 24 << 20, sizes
