"""The engine as users see it: handles, sampling, stops, logprobs, refusals; tiny model."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Tiny
from devices import DEVICES, ONE, Device, on
from engines import (
    VOCAB,
    WAIT_S,
    KeptLogits,
    Spinning,
    assert_all_free,
    greedy,
    ids_of,
    prompt_of,
    wait_for,
)
from tiny_models import SERVED, save_with_tokenizer, tiny_model

from flowprefill import SLO, Engine, Request, SamplingParams
from flowprefill.engine import calibration
from flowprefill.errors import InvalidRequest, PromptTooLong, RequestCancelled
from flowprefill.scheduling import MachineRates

OpenEngine = Callable[..., Engine]


@on(ONE)
def test_greedy_tokens_and_logits_are_those_of_transformers(
    device: Device, open_engine: OpenEngine, tiny: Tiny
) -> None:
    for granularity in ("none", *device.preemptible):
        engine = open_engine(granularity=granularity, prefix_cache=False)
        assert engine.describe()["device"].startswith("cuda" if device.is_cuda else "cpu")
        kept = KeptLogits(engine)
        for tokens in device.lengths[::5]:
            prompt = prompt_of(tokens, tokens)
            ids = ids_of(engine, prompt, 6)
            with torch.no_grad():
                logits = tiny[1](torch.tensor([prompt + ids])).logits[0].numpy()
            expected = logits[tokens - 1 : tokens + 5]
            slack = device.tolerance * np.abs(expected).max()
            assert np.abs(np.concatenate(kept.rows) - expected).max() < slack
            assert (expected[np.arange(6), ids] >= expected.max(axis=1) - slack).all()
            kept.rows.clear()
        assert_all_free(engine)
        engine.close()


@on(ONE)
def test_packed_prompts_and_decode_steps_do_not_disturb_each_other(open_engine: OpenEngine) -> None:
    engine = open_engine(prefix_cache=False)
    prompts = [prompt_of(tokens, seed) for seed, tokens in enumerate((5, 64, 130, 17))]
    alone = [ids_of(engine, prompt, 5) for prompt in prompts]
    handles = [engine.submit(Request(prompt, greedy(5))) for prompt in prompts]
    assert [handle.result(WAIT_S).token_ids for handle in handles] == alone
    assert_all_free(engine)


@on(ONE)
def test_held_request_makes_no_tokens_and_goes_on_bit_identically(open_engine: OpenEngine) -> None:
    engine = open_engine()
    requests = [Request(prompt_of(60, n), greedy(300, logprobs=2)) for n in range(2)]
    alone = [engine.submit(replace(one, id=f"a{one.id}")).result(WAIT_S) for one in requests]
    handle = engine.submit(requests[0])
    next(iter(handle))
    handle.hold()
    wait_for(lambda: not engine._core._runs, "its last step ends")
    tokens = handle.output_tokens
    assert 0 < tokens < 300
    others = engine.submit(requests[1]).result(WAIT_S)
    assert handle.output_tokens == tokens
    assert (engine.stats().held, engine.stats().running) == (1, 0)
    handle.resume()
    assert [handle.result(WAIT_S).tokens, others.tokens] == [one.tokens for one in alone]
    assert_all_free(engine)


@pytest.mark.parametrize(
    "settings", [{}, {"kv_cache_gib": 0.001}, {"max_model_len": 20, "max_batch_tokens": 8}]
)
@on(ONE)
def test_an_engine_calibrates_itself_and_serves(
    open_engine: OpenEngine,
    set_options: Callable[..., None],
    tmp_path: Path,
    settings: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calibration, "TOO_SLOW", math.inf)  # so small a model's times scatter
    set_options(measures_gemms=False)  # takes minutes on the double; C++ tests do it
    engine = open_engine(calibrate=True, granularity="budget:2", **settings)
    assert len(list(tmp_path.glob("rates-*.json"))) == 1
    assert engine.rates != MachineRates()
    assert len(ids_of(engine, prompt_of(10), 3)) == 3
    assert_all_free(engine)
    again = open_engine(calibrate=True, granularity="budget:2", **settings)
    assert again.rates == engine.rates


def test_iterating_awaiting_and_result_agree(engine: Engine) -> None:
    request = Request(prompt_of(50), greedy(6))
    handle = engine.submit(request)
    seen: list[list[int]] = [[], []]

    def read(index: int) -> None:
        seen[index] = [token.token_id for token in handle]

    readers = [threading.Thread(target=read, args=(index,)) for index in range(2)]
    for reader in readers:
        reader.start()
    completion = handle.result(WAIT_S)
    for reader in readers:
        reader.join()
    assert seen == [completion.token_ids] * 2
    assert completion.text == "".join(token.text for token in completion.tokens)
    assert completion.finish_reason == "length"
    assert completion.prompt_tokens == handle.prompt_tokens == 50
    assert handle.done
    assert handle.timings == completion.timings


async def test_asyncio_sees_the_same(engine: Engine) -> None:
    prompts = [prompt_of(20 + n, n) for n in range(8)]
    handles = [engine.submit(Request(prompt, greedy(5))) for prompt in prompts]

    async def stream(index: int) -> list[int]:
        return [token.token_id async for token in handles[index]]

    streams = await asyncio.gather(*(stream(index) for index in range(8)))
    completions = await asyncio.gather(*handles)
    assert [completion.token_ids for completion in completions] == streams
    for prompt, got in zip(prompts, streams, strict=True):
        expected = await asyncio.to_thread(ids_of, engine, prompt, 5)
        assert got == expected


def test_submitting_from_many_threads(engine: Engine) -> None:
    results: dict[int, list[int]] = {}

    def work(seed: int) -> None:
        for step in range(3):
            results[seed * 3 + step] = ids_of(engine, prompt_of(30 + seed, seed * 3 + step), 4)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 24
    for key, got in results.items():
        assert got == ids_of(engine, prompt_of(30 + key // 3, key), 4)


def test_text_prompts_are_tokenised(engine: Engine) -> None:
    text = "Once upon a time"
    ids = engine.tokenizer.encode(text)
    by_text = engine.submit(Request(text, greedy(5))).result(WAIT_S)
    assert by_text.prompt_tokens == len(ids)
    assert by_text.token_ids == ids_of(engine, ids, 5)


# ---- ends of generation --------------------------------------------------------------------------


def test_stop_string_ends_and_is_cut(engine: Engine) -> None:
    prompt = prompt_of(40, 8)
    whole = engine.submit(Request(prompt, greedy(12))).result(WAIT_S)
    stop = whole.text[len(whole.text) // 2 :][:3]
    cut = engine.submit(Request(prompt, greedy(12, stop=(stop,)))).result(WAIT_S)
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]
    kept = engine.submit(
        Request(prompt, greedy(12, stop=(stop,), include_stop_str_in_output=True))
    ).result(WAIT_S)
    assert kept.text == cut.text + stop


def test_stop_token_and_min_tokens(engine: Engine) -> None:
    prompt = prompt_of(33, 9)
    free = ids_of(engine, prompt, 8)
    stopped = engine.submit(Request(prompt, greedy(8, stop_token_ids=(free[2],)))).result(WAIT_S)
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free[: free.index(free[2]) + 1]
    late = greedy(8, stop_token_ids=(free[2],), min_tokens=6)
    completion = engine.submit(Request(prompt, late)).result(WAIT_S)
    assert len(completion.token_ids) >= 6
    assert free[2] not in completion.token_ids[:5]


def test_end_of_sequence_and_ignoring_it(open_engine: Callable[..., Engine]) -> None:
    engine = open_engine()
    prompt = prompt_of(21, 4)
    free = ids_of(engine, prompt, 6)
    engine.tokenizer.eos_ids = (free[3],)
    params = SamplingParams(max_tokens=6, temperature=0.0)
    ended = engine.submit(Request(prompt, params)).result(WAIT_S)
    assert ended.finish_reason == "stop"
    assert ended.token_ids == free[: free.index(free[3]) + 1]
    assert ids_of(engine, prompt, 6) == free


def test_without_max_tokens_it_ends_at_the_models_length(
    open_engine: Callable[..., Engine],
) -> None:
    engine = open_engine(max_model_len=60)
    completion = engine.submit(
        Request(prompt_of(50), SamplingParams(temperature=0.0, ignore_eos=True))
    ).result(WAIT_S)
    assert completion.finish_reason == "length"
    assert len(completion.token_ids) == 10


def test_longrope_takes_the_factors_of_the_contexts_that_are_served(tmp_path: Path) -> None:
    save_with_tokenizer(tiny_model("llama", **SERVED), tmp_path)
    path = tmp_path / "config.json"
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
               "original_max_position_embeddings": 64}  # fmt: skip
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_scaling": scaling}))
    for served, is_long in ((64, False), (65, True), (0, True)):
        with DEVICES["cpu"].open_engine(tmp_path, max_model_len=served) as engine:
            assert engine.model_config.rope_scaling.is_long is is_long


# ---- sampling ------------------------------------------------------------------------------------


def test_seed_decides_whatever_else_runs(engine: Engine) -> None:
    params = SamplingParams(max_tokens=10, temperature=1.0, seed=42, ignore_eos=True)
    prompt = prompt_of(45, 1)
    alone = engine.submit(Request(prompt, params)).result(WAIT_S).token_ids
    others = [engine.submit(Request(prompt_of(10 + n, 50 + n), greedy(20))) for n in range(9)]
    together = [engine.submit(Request(prompt, params)) for _ in range(3)]
    assert [handle.result(WAIT_S).token_ids for handle in together] == [alone] * 3
    for other in others:
        other.result(WAIT_S)
    another = SamplingParams(max_tokens=10, temperature=1.0, seed=43, ignore_eos=True)
    assert engine.submit(Request(prompt, another)).result(WAIT_S).token_ids != alone


def test_without_a_seed_requests_differ(engine: Engine) -> None:
    params = SamplingParams(max_tokens=8, temperature=1.5, ignore_eos=True)
    handles = [engine.submit(Request(prompt_of(30), params)) for _ in range(3)]
    assert len({tuple(handle.result(WAIT_S).token_ids) for handle in handles}) == 3


def test_logprobs_are_log_softmax_of_the_model(engine: Engine, tiny: Tiny) -> None:
    prompt = prompt_of(70, 2)
    completion = engine.submit(Request(prompt, greedy(5, logprobs=4))).result(WAIT_S)
    ids = prompt + completion.token_ids
    with torch.no_grad():
        wanted = torch.log_softmax(tiny[1](torch.tensor([ids])).logits[0].float(), -1).numpy()
    for index, token in enumerate(completion.tokens):
        row = wanted[len(prompt) + index - 1]
        assert token.logprob == pytest.approx(row[token.token_id], abs=1e-3)
        assert [t.token_id for t in token.top_logprobs] == np.argsort(-row)[:4].tolist()
        for top in token.top_logprobs:
            assert top.logprob == pytest.approx(row[top.token_id], abs=1e-3)


def test_penalties_change_what_repeats(engine: Engine) -> None:
    prompt = prompt_of(25, 6)
    repeating = engine.submit(Request(prompt, greedy(30, repetition_penalty=0.01 + 0.2))).result(
        WAIT_S
    )
    assert len(set(repeating.token_ids)) < 30, "a penalty below 1 favours what was there"
    distinct = engine.submit(
        Request(prompt, greedy(30, repetition_penalty=10.0, frequency_penalty=2.0))
    ).result(WAIT_S)
    assert len(set(distinct.token_ids)) == 30


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1, VOCAB, 2**40, True, 1.5, "a"])
def test_bad_token_ids_are_named(engine: Engine, bad: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"token ids in 0..{VOCAB - 1}") as caught:
        engine.submit(Request([5, bad, 6], greedy(1)))
    assert caught.value.param == "prompt"
    assert repr(bad) in str(caught.value)
    assert_all_free(engine)


def test_what_is_no_request_and_no_slo_is_named(engine: Engine) -> None:
    submit: Callable[..., Any] = engine.submit
    with pytest.raises(InvalidRequest, match=r"request: got \[1, 2\], expected a Request"):
        submit([1, 2])
    with pytest.raises(InvalidRequest, match=r"slo: got 0\.25, expected an SLO"):
        submit(Request([1, 2]), 0.25)
    with pytest.raises(InvalidRequest, match=r"slo: got .chat., .* name of a class: none is conf"):
        submit(Request([1, 2]), "chat")
    assert_all_free(engine)


def test_a_text_is_a_prompt_and_a_name_its_class(open_engine: Callable[..., Engine]) -> None:
    engine = open_engine(classes={"chat": {"ttft_ms": 60_000.0, "weight": 2.0}})
    handle = engine.submit("Hello", "chat")
    assert "0 tokens, going on" in repr(handle) or "ended" in repr(handle)
    assert handle.result(60).timings.slo_met
    assert repr(handle).startswith(f"<Handle {handle.request_id}, ")
    assert engine.story(handle.request_id)["service_class"] == "chat"


def test_prompt_too_long_says_the_numbers(open_engine: Callable[..., Engine]) -> None:
    engine = open_engine(max_model_len=300, kv_cache_gib=0.001, block_tokens=16)
    with pytest.raises(
        PromptTooLong, match=r"got 300 tokens, expected at most 299.*length is 300"
    ) as no:
        engine.submit(Request(prompt_of(300), greedy(1)))
    assert no.value.param == "prompt"
    with pytest.raises(PromptTooLong, match=r"got 11 on a prompt of 290 .*at most 10") as much:
        engine.submit(Request(prompt_of(290), greedy(11)))
    assert much.value.param == "max_tokens"
    assert len(ids_of(engine, prompt_of(299), 1)) == 1
    assert len(ids_of(engine, prompt_of(290), 10)) == 10


def test_prompt_that_no_cache_can_hold_is_refused(open_engine: Callable[..., Engine]) -> None:
    engine = open_engine(kv_cache_gib=0.001, block_tokens=16)
    capacity = engine.stats().kv_blocks_total * 16
    assert capacity < engine.max_model_len
    with pytest.raises(PromptTooLong, match=f"KV cache {capacity} tokens"):
        engine.submit(Request(prompt_of(capacity), greedy(1)))
    assert len(ids_of(engine, prompt_of(capacity - 1), 1)) == 1
    # More was asked for than there is room: as many tokens as fit.
    completion = engine.submit(Request(prompt_of(capacity - 20), greedy(500))).result(WAIT_S)
    assert completion.finish_reason == "length"
    assert len(completion.token_ids) == 20
    assert_all_free(engine)


def test_id_of_a_live_request_is_refused_and_free_again_later(engine: Engine) -> None:
    handle = engine.submit(Request(prompt_of(3000), greedy(5000), id="same"))
    with pytest.raises(InvalidRequest, match="id: got 'same'"):
        engine.submit(Request(prompt_of(3), greedy(1), id="same"))
    handle.cancel()
    with pytest.raises(RequestCancelled):
        handle.result(WAIT_S)
    assert engine.submit(Request(prompt_of(3), greedy(1), id="same")).result(WAIT_S)


def test_too_many_waiting_are_refused(
    open_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flowprefill.errors import Overloaded

    engine = open_engine(max_waiting=2, policy="fcfs")
    Spinning(engine, monkeypatch, from_tokens=9000)
    running = engine.submit(Request(prompt_of(9000), greedy(1)))
    waiting = [engine.submit(Request(prompt_of(600, n), greedy(1))) for n in range(2)]
    with pytest.raises(Overloaded) as caught:
        engine.submit(Request(prompt_of(600, 5), greedy(1)))
    assert caught.value.retry_after_s > 0
    running.cancel()
    for handle in waiting:
        handle.result(WAIT_S)
    assert_all_free(engine)


def test_slo_and_timings_of_a_quiet_engine(engine: Engine) -> None:
    request = Request(prompt_of(200, 77), greedy(4))
    timings = engine.submit(request, SLO(ttft=30.0, tpot=30.0)).result(WAIT_S).timings
    assert timings.slo_met is True
    assert timings.preemptions == 0
    assert timings.suspended == 0.0
    assert timings.ttft is not None
    assert timings.predicted_ttft is not None
    assert 0 < timings.prefill_run <= timings.ttft <= timings.total
    assert timings.mean_itl is not None
    assert timings.mean_itl > 0
    hopeless = engine.submit(Request(prompt_of(2000, 78), greedy(1)), SLO(ttft=1e-5))
    assert hopeless.result(WAIT_S).timings.slo_met is False
    assert engine.submit(Request([9], greedy(1))).result(WAIT_S).timings.slo_met is None
