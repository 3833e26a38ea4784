"""Backends that serve requests in real time: an engine in this process, or a server at a URL."""

from __future__ import annotations

import asyncio
import gc
import math
import random
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from flowprefill.bench.arrivals import Planned
from flowprefill.bench.common import FIRST_TOKEN_ONLY, first_token_s, random_ids
from flowprefill.bench.goodput.measurement import Measurement, Served, Stretch, summarised
from flowprefill.bench.goodput.setting import Setting
from flowprefill.bench.http_client import check_answers, send_all
from flowprefill.bench.statistics import median
from flowprefill.client import server_url
from flowprefill.config import EngineConfig
from flowprefill.engine import Engine
from flowprefill.engine.handle import Handle
from flowprefill.engine.records import RequestRecord
from flowprefill.errors import FlowPrefillError, NotReady
from flowprefill.models.checkpoint import Checkpoint
from flowprefill.request import SLO, Request, SamplingParams
from flowprefill.traces import TraceRequest

WARM_TOKENS = (64, 512)
SOLO_TOKENS = (16, 64, 256, 1024, 3072, 8192, 16384)  # lengths whose time alone is measured
SOLO_ENOUGH_S = 1.0  # no longer ones once one takes so long
KEPT_WARM_TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
IDLE_TIMEOUT_S = 10.0  # from the last answer to an engine without runs
END_TIMEOUT_S = 900.0  # for the last answer after the last request was sent
TOUCHING_S = 1e-3  # segments of one run closer than this are one stretch


def slo_of(request: TraceRequest) -> SLO:
    """Return a trace's objectives as the engine takes them."""
    return SLO(
        ttft=request.ttft_s if request.ttft_s < math.inf else None,
        tpot=request.tpot_s if request.tpot_s < math.inf else None,
        service_class=request.service_class or "default",
    )


def measured_solo(engine: Engine) -> Callable[[int], float]:
    """Measure undisturbed prefills; return prompt tokens -> seconds, straight between lengths."""
    rng = random.Random(0)
    lengths = [tokens for tokens in SOLO_TOKENS if tokens < engine.max_model_len]
    times_s = []
    for tokens in lengths:
        first_token_s(engine, random_ids(rng, tokens, engine.vocab_size))  # its shapes' first use
        tries = [random_ids(rng, tokens, engine.vocab_size) for _ in range(3)]
        times_s.append(median(first_token_s(engine, ids) for ids in tries))
        if times_s[-1] > SOLO_ENOUGH_S and len(times_s) > 1:
            break

    def solo_s(tokens: int) -> float:
        above = min(max(bisect_left(lengths, tokens), 1), len(times_s) - 1)
        span = lengths[above] - lengths[above - 1]
        slope_s = (times_s[above] - times_s[above - 1]) / span
        return max(times_s[above] + slope_s * (tokens - lengths[above]), times_s[0])

    return solo_s


class Watcher:
    """Collects blocking times and preemptions of one engine; called on its threads."""

    def __init__(self) -> None:
        self.blocking_s: list[float] = []
        self.preemptions = 0

    def on_end(self, record: RequestRecord) -> None:
        """Note how long its prefill waited at most for the run that executed."""
        if record.blocking_s is not None:
            self.blocking_s.append(record.blocking_s)

    def on_preemption(self, reason: str, ack_s: float) -> None:  # noqa: ARG002
        """Count it."""
        self.preemptions += 1

    def on_decision(self, seconds: float) -> None:
        """Nothing to note."""


class EngineBackend:
    """A fresh engine in this process for each measurement, so that none profits from the last.

    Or one for all, where loading takes longer than measuring: it gets a fresh scheduler each time,
    and each granularity is warmed up at its first use.
    """

    name = "engine"
    is_fast = False

    def __init__(
        self, model: str | Checkpoint, *, keeps_engine: bool = False, **settings: Any
    ) -> None:
        """Make an engine, which calibrates itself, and measure prompts alone.

        Args:
            keeps_engine: one engine serves all measurements.
            settings: as `EngineConfig` takes them.
        """
        self._model = model
        self._settings = {"prefix_cache": False, **settings}
        self._kept: Engine | None = None
        self._warmed: set[tuple[str, int]] = set()
        since_s = time.monotonic()
        engine = self._made(Setting("fcfs", "none"))
        start_s = time.monotonic() - since_s
        try:
            self.vocab_size, self.max_model_len = engine.vocab_size, engine.max_model_len
            self.rates = engine.rates
            self.description = engine.describe() | {
                "rates": asdict(self.rates),
                "start_s": start_s,
                "max_model_len": self.max_model_len,
            }
            self._solo_s = measured_solo(engine)
        except BaseException:
            engine.close(0.0)
            raise
        if keeps_engine:
            self._kept = engine
            engine.freeze_garbage()
        else:
            engine.close(0.0)

    def _made(self, setting: Setting) -> Engine:
        config = EngineConfig(
            policy=setting.policy,
            granularity=setting.granularity,
            max_batch_tokens=setting.most_batch_tokens,
            **self._settings,
        )
        return Engine(self._model, config)

    def solo_s(self, prompt_tokens: int) -> float:
        """Return what was measured at start, straight between the lengths measured, seconds."""
        return self._solo_s(prompt_tokens)

    def close(self) -> None:
        """Close the engine that was kept."""
        if self._kept is not None:
            self._kept.close(0.0)
            self._kept = None
            gc.unfreeze()

    @contextmanager
    def _engine(self, setting: Setting, most_tokens: int) -> Iterator[Engine]:
        """Yield an engine with this setting, warmed up for prompts of up to so many tokens."""
        if self._kept is None:
            with self._made(setting) as engine:
                engine.freeze_garbage()
                _warm(engine, [min(tokens, most_tokens) for tokens in (*WARM_TOKENS, most_tokens)])
                yield engine
            return
        if self._kept.has_failed:
            raise NotReady("engine: it has failed, the log says why; nothing more can be measured")
        _switch(self._kept, setting)
        shapes = setting.granularity, setting.most_batch_tokens
        if shapes not in self._warmed:
            self._warmed.add(shapes)
            lengths = [tokens for tokens in KEPT_WARM_TOKENS if tokens < most_tokens]
            _warm(self._kept, [tokens for tokens in (*lengths, most_tokens) for _ in range(2)])
        yield self._kept

    def measure(
        self, setting: Setting, requests: Sequence[TraceRequest], seed: int, *, is_detailed: bool
    ) -> Measurement:
        """Submit each request at its time, whatever became of the others; wait for all."""
        rng = random.Random(seed)
        prompts = [random_ids(rng, one.prompt_tokens, self.vocab_size) for one in requests]
        try:
            return self._measured(setting, requests, prompts, is_detailed)
        finally:
            if self._kept is None:
                # What `freeze_garbage` keeps would stay for good: an engine's weights and cache,
                # each time.
                gc.unfreeze()
                gc.collect()

    def _measured(
        self,
        setting: Setting,
        requests: Sequence[TraceRequest],
        prompts: Sequence[list[int]],
        is_detailed: bool,
    ) -> Measurement:
        with self._engine(setting, max(one.prompt_tokens for one in requests)) as engine:
            watcher = Watcher()
            engine.subscribe(watcher)
            start_s, sent = _submit_all(engine, requests, prompts)
            served = [
                _served(request, handle, late_s)
                for request, (handle, late_s) in zip(requests, sent, strict=True)
            ]
            stretches = _stretches(engine, start_s) if is_detailed else []
        return summarised(
            served,
            watcher.blocking_s,
            watcher.preemptions,
            late_s=max(late_s for _, late_s in sent),
            stretches=stretches,
            is_detailed=is_detailed,
        )


def _warm(engine: Engine, lengths: Sequence[int]) -> None:
    rng = random.Random(0)
    for tokens in lengths:
        ids = random_ids(rng, tokens, engine.vocab_size)
        engine.submit(Request(ids, FIRST_TOKEN_ONLY)).result(END_TIMEOUT_S)


def _switch(engine: Engine, setting: Setting) -> None:
    """Give an engine another setting once its last run has ended, soon after its last answer."""
    until_s = time.monotonic() + IDLE_TIMEOUT_S
    while True:
        try:
            engine.set_granularity(setting.granularity)
            engine.set_policy(setting.policy, setting.most_batch_tokens)
            return
        except RuntimeError:
            if time.monotonic() > until_s:
                raise
            time.sleep(1e-3)


def _submit_all(
    engine: Engine, requests: Sequence[TraceRequest], prompts: Sequence[list[int]]
) -> tuple[float, list[tuple[Handle | None, float]]]:
    sent: list[tuple[Handle | None, float]] = []
    start_s = time.monotonic() + 0.05
    for number, (one, ids) in enumerate(zip(requests, prompts, strict=True)):
        sampling = SamplingParams(temperature=0.0, max_tokens=one.output_tokens, ignore_eos=True)
        request = Request(ids, sampling, id=str(number))
        time.sleep(max(start_s + one.at_s - time.monotonic(), 0.0))
        late_s = time.monotonic() - start_s - one.at_s
        try:
            sent.append((engine.submit(request, slo_of(one)), late_s))
        except FlowPrefillError:  # refused: never on time
            sent.append((None, late_s))
    return start_s, sent


def _served(request: TraceRequest, handle: Handle | None, late_s: float) -> Served:
    try:
        timings = handle.result(END_TIMEOUT_S).timings if handle is not None else None
    except FlowPrefillError:
        timings = None
    if timings is None or timings.ttft is None:
        return Served(request, math.inf, False)
    ttft_s = timings.ttft + late_s  # counted from its planned time
    is_paced = (timings.mean_itl or 0.0) <= request.tpot_s
    return Served(request, ttft_s, ttft_s <= request.ttft_s and is_paced)


def _stretches(engine: Engine, start_s: float) -> list[Stretch]:
    found: list[Stretch] = []
    for entry in engine.timeline():
        name = entry.run.removeprefix("prefill ")
        number = int(name) if name.isdecimal() else -1
        begin_s, end_s = entry.start_s - start_s, entry.end_s - start_s
        if begin_s < 0:
            continue
        last = found[-1] if found else None
        if last and last.number == number and begin_s - last.end_s <= TOUCHING_S:
            found[-1] = Stretch(number, last.begin_s, end_s)
        else:
            found.append(Stretch(number, begin_s, end_s))
    return found


class UrlBackend:
    """A server that runs already; which policy it has is its own matter."""

    is_fast = False

    def __init__(self, url: str, vocab_size: int) -> None:
        """Remember the address and how many token ids random prompts may use.

        Raises:
            InvalidRequest: that is no URL.
            FlowPrefillError: no server answers there.
        """
        self.name = server_url(url, "--backend")
        check_answers(self.name)
        self._vocab_size = vocab_size

    def solo_s(self, prompt_tokens: int) -> float:  # noqa: ARG002
        """Return NaN: the server does not tell."""
        return math.nan

    def close(self) -> None:
        """Nothing is held between measurements."""

    def measure(
        self,
        setting: Setting,  # noqa: ARG002
        requests: Sequence[TraceRequest],
        seed: int,
        *,
        is_detailed: bool,
    ) -> Measurement:
        """Send each request at its time over HTTP; the setting is that of the server."""
        planned = [_planned(one) for one in requests]
        outcomes, _ = asyncio.run(send_all(self.name, planned, self._vocab_size, seed))
        served = []
        for request, outcome in zip(requests, outcomes, strict=True):
            ttft_s = math.inf
            if outcome.status == "ok" and outcome.ttft_s is not None:
                ttft_s = outcome.ttft_s + outcome.late_s
            is_on_time = ttft_s <= request.ttft_s and (outcome.tpot_s or 0.0) <= request.tpot_s
            served.append(Served(request, ttft_s, is_on_time))
        late_s = max(outcome.late_s for outcome in outcomes)
        return summarised(served, (), 0, late_s=late_s, is_detailed=is_detailed)


def _planned(request: TraceRequest) -> Planned:
    objectives = {"ttft_ms": request.ttft_s * 1e3, "tpot_ms": request.tpot_s * 1e3}
    return Planned(
        request.at_s, request.prompt_tokens, request.output_tokens, request.service_class,
        slo={name: value for name, value in objectives.items() if value < math.inf},
    )  # fmt: skip
