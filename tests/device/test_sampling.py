"""Tokens that decode steps choose on the device are those the host's sampler would have chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from devices import GPUS, Device, on
from engines import WAIT_S, prompt_of

from flowprefill import Engine, Request, SamplingParams

OpenEngine = Callable[..., Engine]

SAMPLED = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature": SamplingParams(temperature=0.8, seed=3),
    "filters": SamplingParams(temperature=1.2, top_k=40, top_p=0.9, min_p=0.01, seed=4),
}


@pytest.mark.parametrize("name", SAMPLED)
@on(GPUS)
def test_device_and_host_choose_the_same_tokens(
    device: Device, open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    engine = open_engine(prefix_cache=False)
    fetched: list[bool] = []
    outcomes = engine._worker.outcomes

    def note(run: Any) -> Any:
        fetched.append(device.module.has_logits(run))
        return outcomes(run)

    monkeypatch.setattr(engine._worker, "outcomes", note)
    params = replace(SAMPLED[name], max_tokens=6, ignore_eos=True)
    on_device = engine.submit(Request(prompt_of(40, 1), params)).result(WAIT_S).token_ids
    assert fetched == [True, False, False, False, False, False], "the prefill's logits only"
    fetched.clear()
    with_logprobs = replace(params, logprobs=0)
    on_host = engine.submit(Request(prompt_of(40, 1), with_logprobs)).result(WAIT_S).token_ids
    assert fetched == [True] * 6
    assert on_device == on_host


@on(GPUS)
def test_one_that_needs_logits_brings_them_for_the_whole_step(open_engine: OpenEngine) -> None:
    engine = open_engine(prefix_cache=False)
    params = SamplingParams(temperature=0.7, seed=9, max_tokens=5, ignore_eos=True)
    alone = engine.submit(Request(prompt_of(20, 2), params)).result(WAIT_S).token_ids
    handles = [
        engine.submit(Request(prompt_of(20, 2), params)),
        engine.submit(Request(prompt_of(30, 3), replace(params, presence_penalty=0.5))),
    ]
    assert handles[0].result(WAIT_S).token_ids == alone
    assert len(handles[1].result(WAIT_S).token_ids) == 5
