"""Prompt log-probabilities and embeddings of the engine, by transformers; tiny model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Tiny
from devices import GPUS, Device, on
from engines import WAIT_S, assert_all_free, greedy, ids_of, prompt_of, start_long

from flowprefill import SLO, Engine, Request, SamplingParams
from flowprefill.errors import InvalidRequest, PromptTooLong, RequestFailed

OpenEngine = Callable[..., Engine]
GRANULARITIES = ("none", "operator", "chunk:16", "budget:2")


@pytest.fixture
def cut_engine(granularity: str, engine: Engine) -> Iterator[Engine]:
    """The engine of all tests here, whose prefills are cut so for this one."""
    engine.set_granularity(granularity)
    yield engine
    engine.set_granularity("budget:2")


def log_softmax(tiny: Tiny, ids: list[int]) -> Any:
    """Log-probabilities of every position, [tokens, vocab]."""
    with torch.no_grad():
        return torch.log_softmax(tiny[1](torch.tensor([ids])).logits[0], dim=-1).numpy()


def last_states(tiny: Tiny, ids: list[int]) -> Any:
    """Transformers' last hidden states, [tokens, hidden]."""
    model: Any = tiny[1]
    with torch.no_grad():
        return model.model(torch.tensor([ids])).last_hidden_state[0].numpy()


def of_length_1(vector: Any) -> Any:
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_prompt_logprobs_are_log_softmax_of_transformers(
    granularity: str, cut_engine: Engine, tiny: Tiny
) -> None:
    engine = cut_engine
    prompt = prompt_of(150, GRANULARITIES.index(granularity))
    expected = log_softmax(tiny, prompt)
    for top in (5, 0):  # the second time the prompt is in the prefix cache, which is not asked
        handle = engine.submit(Request(prompt, greedy(3, prompt_logprobs=top)))
        done = handle.result(WAIT_S)
        found = done.prompt_logprobs
        assert done.token_ids == ids_of(engine, prompt, 3)
        assert handle.cached_tokens == 0
        assert found is not None
        assert found is handle.prompt_logprobs
        assert len(found) == 150
        assert found[0] is None
        wanted = expected[np.arange(149), prompt[1:]]
        assert np.abs(found.logprobs[1:] - wanted).max() < 1e-4
        assert found.top_logprobs.shape == (150, top)
        last = found[-1]
        assert last is not None
        assert last.token_id == prompt[-1]
        assert last.logprob == pytest.approx(wanted[-1], abs=1e-4)
        assert abs(last.rank - int((expected[148] > wanted[-1]).sum()) - 1) <= 2
        best = np.sort(expected[148])[::-1][:top]
        assert [one.logprob for one in last.top_logprobs] == pytest.approx(best, abs=1e-4)
        assert found[1:3] == [found[1], found[2]]
        assert list(found)[1] == found[1]
    assert_all_free(engine)


def test_scored_and_plain_prompts_together(engine: Engine, tiny: Tiny) -> None:
    """Those that come at once are packed by what they ask for; each gets its own answer."""
    prompts = [prompt_of(length, length) for length in (20, 1, 33, 2)]
    plain = [ids_of(engine, prompt, 4) for prompt in prompts]
    start_long(engine, Request(prompt_of(3000), greedy(1)))
    scored = [engine.submit(Request(p, greedy(4, prompt_logprobs=1))) for p in prompts]
    others = [engine.submit(Request(p, greedy(4))) for p in prompts]
    vectors = [engine.embed(p) for p in prompts]
    assert [handle.result(WAIT_S).token_ids for handle in others] == plain
    for prompt, handle, tokens in zip(prompts, scored, plain, strict=True):
        done = handle.result(WAIT_S)
        assert done.token_ids == tokens
        assert done.prompt_logprobs is not None
        wanted = log_softmax(tiny, prompt)[np.arange(len(prompt) - 1), prompt[1:]]
        assert done.prompt_logprobs.logprobs[1:] == pytest.approx(wanted, abs=1e-4)
    for prompt, handle in zip(prompts, vectors, strict=True):
        expected = of_length_1(last_states(tiny, prompt)[-1])
        assert handle.result(WAIT_S).embedding == pytest.approx(expected, abs=1e-4)


def test_a_scored_prompt_that_is_preempted_has_the_same_bits(
    open_engine: OpenEngine,
) -> None:
    engine = open_engine(granularity="operator", prefix_cache=False)
    request = Request(prompt_of(1200), greedy(1, prompt_logprobs=2))
    alone = engine.submit(request).result(WAIT_S).prompt_logprobs
    for _ in range(10):  # again if it ended before this thread had a core
        handle = start_long(engine, Request(prompt_of(1200), greedy(1, prompt_logprobs=2)))
        while not handle.done:
            engine.submit(Request(prompt_of(20), greedy(1)), SLO(ttft=WAIT_S)).result(WAIT_S)
        if handle.result().timings.preemptions:
            break
    again = handle.result().prompt_logprobs
    assert alone is not None
    assert again is not None
    assert handle.timings is not None
    assert handle.timings.preemptions > 0
    assert np.array_equal(again.logprobs, alone.logprobs, equal_nan=True)
    assert np.array_equal(again.top_ids, alone.top_ids)


@pytest.mark.parametrize("top", [None, 0, 3])
def test_nothing_is_generated_with_max_tokens_0(top: int | None, engine: Engine) -> None:
    sampling = SamplingParams(max_tokens=0, prompt_logprobs=top)
    handle = engine.submit(Request(prompt_of(40), sampling), SLO(ttft=30.0))
    assert list(handle) == []
    done = handle.result(WAIT_S)
    assert (done.text, done.tokens, done.finish_reason) == ("", (), "length")
    assert (done.prompt_logprobs is None) == (top is None)
    assert done.timings.ttft is not None
    assert done.timings.slo_met
    assert_all_free(engine)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_are_of_transformers_last_hidden_state(
    pooling: Any, granularity: str, cut_engine: Engine, tiny: Tiny
) -> None:
    engine = cut_engine
    for tokens in (1, 40, 150):
        prompt = prompt_of(tokens, GRANULARITIES.index(granularity) + 10)
        states = last_states(tiny, prompt)
        expected = of_length_1(states[-1] if pooling == "last" else states.mean(0))
        for _ in range(2):  # the second time a part is in the prefix cache
            handle = engine.embed(prompt, SLO(ttft=30.0), pooling=pooling)
            done = handle.result(WAIT_S)
            assert done.embedding is not None
            assert done.embedding.dtype == np.float32
            assert np.abs(done.embedding - expected).max() < 1e-4
            assert (done.tokens, done.finish_reason, done.prompt_tokens) == ((), "stop", tokens)
            assert done.timings.slo_met
        is_in_cache = pooling == "last" and tokens > engine.config.block_tokens
        assert (handle.cached_tokens > 0) == is_in_cache
    assert_all_free(engine)


def test_an_embedding_may_take_the_models_whole_length(open_engine: OpenEngine) -> None:
    engine = open_engine(max_model_len=64)
    assert engine.embed(prompt_of(64)).result(WAIT_S).embedding is not None
    assert engine.submit(Request(prompt_of(64), SamplingParams(max_tokens=0))).result(WAIT_S)
    with pytest.raises(PromptTooLong, match="expected at most 63"):
        engine.submit(Request(prompt_of(64), SamplingParams(max_tokens=1)))
    with pytest.raises(PromptTooLong, match="expected at most 64"):
        engine.embed(prompt_of(65))


def test_nan_ends_only_the_request_that_has_it(open_engine: OpenEngine, poisoned: Path) -> None:
    engine = open_engine(folder=poisoned)
    bad = [*prompt_of(5), 7, *prompt_of(5)]
    with pytest.raises(RequestFailed, match=r"scoring prompt token \d+: NaN"):
        engine.submit(Request(bad, SamplingParams(max_tokens=0, prompt_logprobs=1))).result(WAIT_S)
    for pooling in ("last", "mean"):
        with pytest.raises(RequestFailed, match="the embedding's length is nan"):
            engine.embed(bad, pooling=pooling).result(WAIT_S)
    good = engine.submit(Request(prompt_of(5), greedy(1, prompt_logprobs=1))).result(WAIT_S)
    assert good.prompt_logprobs is not None
    assert math.isfinite(good.prompt_logprobs.logprobs[4])
    assert_all_free(engine)


@on(GPUS)
def test_a_gpu_s_scores_and_embeddings_are_of_transformers(
    device: Device, open_engine: OpenEngine, tiny: Tiny
) -> None:
    engine = open_engine()
    prompt = prompt_of(150, 3)
    logprobs, states = log_softmax(tiny, prompt), last_states(tiny, prompt)
    done = engine.submit(Request(prompt, greedy(3, prompt_logprobs=5))).result(WAIT_S)
    assert done.token_ids == ids_of(engine, prompt, 3)
    assert done.prompt_logprobs is not None
    slack = 2 * device.tolerance * float(np.abs(logprobs).max())
    wanted = logprobs[np.arange(149), prompt[1:]]
    assert np.abs(done.prompt_logprobs.logprobs[1:] - wanted).max() < slack
    for pooling, expected in (("last", states[-1]), ("mean", states.mean(0))):
        found = engine.embed(prompt, pooling=pooling).result(WAIT_S)
        assert np.abs(found.embedding - of_length_1(expected)).max() < device.tolerance
    assert_all_free(engine)


@pytest.mark.parametrize("value", [-1, 21, True, 1.0])
def test_a_bad_count_of_prompt_logprobs_is_refused(value: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"prompt_logprobs: got .* an integer in 0\.\.20"):
        SamplingParams(prompt_logprobs=value)


def test_an_unknown_pooling_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="pooling: got 'max', expected 'last' or 'mean'"):
        Request([1], pooling="max")  # type: ignore[arg-type]
