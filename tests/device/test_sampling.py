"""Tokens that decode steps choose on the device are those the host's sampler would have chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from devices import ONE, Device, on
from engines import WAIT_S, prompt_of

from flowprefill import Engine, Request, SamplingParams
from flowprefill.engine.live_run import LiveRun
from flowprefill.engine.sampler import Sampler

OpenEngine = Callable[..., Engine]

SAMPLED = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature": SamplingParams(temperature=0.8, seed=3),
    "filters": SamplingParams(temperature=1.2, top_k=40, top_p=0.9, min_p=0.01, seed=4),
}


@pytest.mark.parametrize("name", SAMPLED)
@on(ONE)
def test_device_and_host_choose_the_same_tokens(
    device: Device, open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    engine = open_engine(prefix_cache=False)
    has_logits = note_logits(device, engine, monkeypatch)
    params = replace(SAMPLED[name], max_tokens=6, ignore_eos=True)
    on_device = engine.submit(Request(prompt_of(40, 1), params)).result(WAIT_S).token_ids
    assert has_logits == [False] * 6
    has_logits.clear()
    with_logprobs = replace(params, logprobs=0)
    on_host = engine.submit(Request(prompt_of(40, 1), with_logprobs)).result(WAIT_S).token_ids
    assert has_logits == [True] * 6
    assert on_device == on_host


@on(ONE)
def test_one_that_needs_logits_leaves_the_others_to_the_device(
    device: Device, open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(prefix_cache=False)
    params = SamplingParams(temperature=0.7, seed=9, max_tokens=5, ignore_eos=True)
    penalised = replace(params, presence_penalty=0.5)
    want = [
        engine.submit(Request(prompt_of(20, 2), params)).result(WAIT_S).token_ids,
        engine.submit(Request(prompt_of(30, 3), penalised)).result(WAIT_S).token_ids,
    ]
    has_logits = note_logits(device, engine, monkeypatch)
    sampled: list[int] = []
    sample = Sampler.sample

    def note(sampler: Sampler, logits: Any) -> Any:
        sampled.append(logits.size)
        return sample(sampler, logits)

    monkeypatch.setattr(Sampler, "sample", note)
    handles = [
        engine.submit(Request(prompt_of(20, 2), params)),
        engine.submit(Request(prompt_of(30, 3), penalised)),
    ]
    assert [handle.result(WAIT_S).token_ids for handle in handles] == want
    assert any(has_logits)
    assert len(sampled) == 5, "those of the penalised one"


@on(ONE)
def test_numbers_that_float32_rounds_to_a_border_fail_no_request(
    device: Device, open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One random number in 30 million is rounded to 1; it ended all sequences of its step."""
    engine = open_engine()
    monkeypatch.setattr(Sampler, "_next_uniform", lambda sampler: 1.0 - 2.0**-53)
    drawn = SamplingParams(max_tokens=3, ignore_eos=True)
    narrow = replace(drawn, top_p=1e-50)
    handles = [
        engine.submit(Request(prompt_of(20, n), params))
        for n in (1, 2)
        for params in (drawn, narrow)
    ]
    for handle in handles:
        assert len(handle.result(WAIT_S).token_ids) == 3


def note_logits(device: Device, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return a list that gets, for every run that has ended, whether it has logits."""
    found: list[bool] = []
    answer = LiveRun.answer

    def note(run: LiveRun, worker: Any, now: float) -> Any:
        found.append(device.module.has_logits(run.run))
        return answer(run, worker, now)

    monkeypatch.setattr(LiveRun, "answer", note)
    return found
