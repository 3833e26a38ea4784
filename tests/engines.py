"""What all tests of a running engine share: prompts, waiting, and that nothing is left."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest

from flowprefill import SLO, Engine, Request, SamplingParams, _core
from flowprefill.engine.core import EngineCore
from flowprefill.engine.handle import Handle
from flowprefill.engine.live_request import LiveRequest, TokenSide
from flowprefill.engine.sampler import Sampler
from flowprefill.engine.stop import StopChecker
from flowprefill.engine.worker import Batch

VOCAB = 49_152  # of the default model's tokenizer
WAIT_S = 100.0  # for a bug that would hang; nothing waits this long otherwise


def prompt_of(tokens: int, seed: int = 0, vocab: int = VOCAB) -> list[int]:
    """Random ordinary token ids; never special ones."""
    return [int(i) for i in np.random.default_rng(seed).integers(100, vocab, tokens)]


def greedy(max_tokens: int, **params: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, **params)


def ids_of(engine: Engine, prompt: list[int], max_tokens: int) -> list[int]:
    """The greedy continuation when nothing else runs."""
    return engine.submit(Request(prompt, greedy(max_tokens))).result(WAIT_S).token_ids


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Wait until something that must happen has happened."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"did not happen: {what}"
        time.sleep(0.001)


def start_long(engine: Engine, request: Request, slo: SLO | None = None) -> Handle:
    """Submit a request and wait until the executor is in the middle of it."""
    segments = engine.stats().segments
    handle = engine.submit(request, slo)
    wait_for(lambda: engine.stats().segments > segments, "the long prefill executes")
    return handle


class Spinning:
    """Lets an engine's runs of chosen lengths spin until cancelled, so that states can be held."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch, from_tokens: int) -> None:
        original = engine._worker.make_run

        def make_run(batch: Batch) -> Any:
            first = batch.sequences[0]
            if first.context + len(first.tokens) >= from_tokens:
                return _core.spin_run(batch.run_id, 1_000_000, 5e-4)
            return original(batch)

        monkeypatch.setattr(engine._worker, "make_run", make_run)


class KeptLogits:
    """Keeps a copy of the logits of every run; the engine then chooses all tokens itself."""

    def __init__(self, engine: Engine) -> None:
        self.rows: list[npt.NDArray[np.float32]] = []
        worker: Any = engine._worker
        self._logits = worker.logits
        worker.logits = self._keep
        worker.limits = replace(worker.limits, chooses_tokens=False)

    def _keep(self, run: Any) -> npt.NDArray[np.float32]:
        logits: npt.NDArray[np.float32] = self._logits(run)
        self.rows.append(logits.copy())
        return logits


class Letters:
    """A decoder to which every token is one letter."""

    def push(self, token_id: int) -> str:
        return chr(ord("a") + token_id)

    def flush(self) -> str:
        return ""


def live_request(
    core: EngineCore, now_s: float, request: Request, slo: SLO, **more: Any
) -> LiveRequest:
    """What an engine makes of a request of token ids, for a core without an engine around it."""
    assert not isinstance(request.prompt, str)
    ids, params, decoder = request.prompt, request.sampling, cast("Any", Letters())
    live = LiveRequest(
        request=request,
        slo=slo,
        handle=Handle(request.id, len(ids), lambda: core.cancel(live)),
        make_token_side=lambda: TokenSide(
            Sampler(params, 10, [1], 0), StopChecker(params), decoder
        ),
        arrival_s=now_s,
        ids=ids,
        num_prompt=len(ids),
        **more,
    )
    return live


def assert_all_free(engine: Engine) -> None:
    """No request, no block, no workspace is left."""
    if engine.describe()["device"] == "cpu":
        wait_for(lambda: engine.stats().workspace_bytes == 0, "every workspace free")
    wait_for(lambda: not engine._core._runs, "every run ends")
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.suspended, stats.held) == (0, 0, 0, 0)
    assert stats.kv_blocks_used == 0
    engine._pool.check()
    assert not engine._core._live
