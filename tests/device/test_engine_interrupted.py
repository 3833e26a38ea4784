"""Calls from where the engine itself is interrupted: finalizers, signal handlers, its observers."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import WAIT_S, assert_all_free, greedy, prompt_of, wait_for

from flowprefill import SLO, Engine, Request
from flowprefill.engine.grammar_process import GrammarProcess
from flowprefill.engine.handle import Handle
from flowprefill.engine.worker import Batch
from flowprefill.errors import NotReady, RequestCancelled

OpenEngine = Callable[..., Engine]


def interrupted(
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[[], object],
    max_tokens: int = 2,
) -> Handle:
    """Make a call as a finalizer or signal handler would: inside a decision, in its own thread."""
    worker = engine._worker
    original = worker.make_run
    made = threading.Event()

    def make_run(batch: Batch) -> Any:
        if not made.is_set():
            made.set()
            call()
        return original(batch)

    monkeypatch.setattr(worker, "make_run", make_run)
    handles: list[Handle] = []
    request = Request(prompt_of(30), greedy(max_tokens))
    submitting = threading.Thread(target=lambda: handles.append(engine.submit(request)))
    submitting.daemon = True  # one that waits for itself never ends
    submitting.start()
    assert made.wait(WAIT_S)  # here or, while a decode step runs, on the event thread
    submitting.join(WAIT_S)
    assert handles, "the thread waits for itself"
    return handles[0]


def test_a_request_is_cancelled_inside_a_decision(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine()
    victim = engine.submit(Request(prompt_of(60, 1), greedy(1000)))
    next(iter(victim))
    urgent = interrupted(engine, monkeypatch, victim.cancel)
    assert len(urgent.result(WAIT_S).token_ids) == 2
    with pytest.raises(RequestCancelled):
        victim.result(WAIT_S)
    assert_all_free(engine)


def test_a_request_is_held_and_resumed_inside_a_decision(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine()
    victim = engine.submit(Request(prompt_of(60, 1), greedy(200)))
    next(iter(victim))
    assert len(interrupted(engine, monkeypatch, victim.hold).result(WAIT_S).token_ids) == 2
    wait_for(lambda: engine.stats().held == 1, "it is held")
    assert len(interrupted(engine, monkeypatch, victim.resume).result(WAIT_S).token_ids) == 2
    assert len(victim.result(WAIT_S).token_ids) == 200
    assert_all_free(engine)


def test_the_engine_is_closed_inside_a_decision(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine()
    handle = interrupted(engine, monkeypatch, lambda: engine.close(0.0), 1000)
    with pytest.raises(RequestCancelled):
        handle.result(WAIT_S)
    engine.close()
    assert_all_free(engine)


def test_a_submit_inside_a_decision_is_refused(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine()

    def submit() -> None:
        with pytest.raises(NotReady, match="interrupted the engine"):
            engine.submit(Request(prompt_of(5), greedy(1)))

    assert len(interrupted(engine, monkeypatch, submit).result(WAIT_S).token_ids) == 2
    assert_all_free(engine)


def test_an_observer_closes_the_engine(open_engine: OpenEngine) -> None:
    """It is called on the thread that has to end."""
    engine = open_engine()

    class Closing:
        def on_end(self, record: object) -> None:
            engine.close(0.0)

        def on_preemption(self, reason: str, ack_s: float) -> None: ...

        def on_decision(self, seconds: float) -> None: ...

    engine.subscribe(Closing())
    long = engine.submit(Request(prompt_of(60, 1), greedy(1000)))
    short = engine.submit(Request(prompt_of(5), greedy(1)), SLO(ttft=0.1))
    assert short.result(WAIT_S).finish_reason == "length"
    with pytest.raises(RequestCancelled):
        long.result(WAIT_S)
    engine.close()
    assert_all_free(engine)


def test_a_signal_handler_closes_what_the_main_thread_closes(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine()
    stop = engine._worker.stop

    def stop_interrupted() -> None:
        engine.close(0.0)
        stop()

    monkeypatch.setattr(engine._worker, "stop", stop_interrupted)
    closing = threading.Thread(target=engine.close, daemon=True)
    closing.start()
    closing.join(WAIT_S)
    assert not closing.is_alive(), "the thread waits for itself"
    with pytest.raises(NotReady):
        engine.submit(Request(prompt_of(5), greedy(1)))


def test_the_process_of_grammars_is_closed_while_it_is_asked() -> None:
    process = GrammarProcess()

    class Interrupted:
        is_alive = True

        def ask(self, request: bytes) -> bytes:
            process.close()  # as a signal handler would, in this thread
            return b""

        def end(self) -> None:
            ended.set()

    ended = threading.Event()
    process._process, process._owner = Interrupted(), os.getpid()  # type: ignore[assignment]
    assert process.can_compile("start: /a/")
    assert ended.wait(WAIT_S)


FORKS = """
import os, sys
from flowprefill import Engine, EngineConfig, Request, SamplingParams
engine = Engine(sys.argv[1], EngineConfig(
    dtype="f32", threads=2, kv_cache_gib=0.02, calibrate=False))
sampling = SamplingParams(max_tokens=1000, temperature=0, ignore_eos=True)
handle = engine.submit(Request([5] * 3000, sampling))
engine._core._lock.inner.acquire()  # as another thread may have it at that moment
child = os.fork()
if child == 0:
    handle.cancel()
    handle.hold()
    engine.close()
    sys.exit(3)  # destroys all that there is, as a program that ends
engine._core._lock.inner.release()
status = os.waitpid(child, 0)[1]
handle.cancel()
engine.close(0.0)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_a_forked_child_ends_as_any_process(tiny: tuple[Path, object]) -> None:
    """It has a copy of everything but the threads, and waits for none of them."""
    done = subprocess.run([sys.executable, "-c", FORKS, str(tiny[0])], timeout=WAIT_S, check=False)
    assert done.returncode == 3
