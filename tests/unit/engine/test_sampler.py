"""Tests of Sampler against a plain float64 reference: draws, penalties, masks, logprobs, errors."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from flowprefill.engine.draw import draw_position, top_k_ids, top_p_ids
from flowprefill.engine.sampler import Sampler
from flowprefill.errors import RequestFailed
from flowprefill.request import SamplingParams

Logits = NDArray[np.float32]
GREEDY = SamplingParams(temperature=0.0)


def make(
    params: SamplingParams, vocab: int, prompt: tuple[int, ...] = (0,), seed: int = 1
) -> Sampler:
    return Sampler(params, vocab, prompt, seed, eos_token_ids=(2,))


def random_logits(seed: int, vocab: int, scale: float = 3.0) -> Logits:
    return (np.random.default_rng(seed).standard_normal(vocab) * scale).astype(np.float32)


def reference(
    logits: Logits, params: SamplingParams, prompt: tuple[int, ...], output: tuple[int, ...]
) -> tuple[NDArray[np.float64], bool]:
    """Return the distribution to draw from, and whether a filter was a close call."""
    x = logits.astype(np.float64).tolist()
    for token in {*prompt, *output}:
        factor = params.repetition_penalty
        x[token] = x[token] / factor if x[token] > 0 else x[token] * factor
    for token, count in Counter(output).items():
        x[token] -= params.presence_penalty + params.frequency_penalty * count
    if len(output) < params.min_tokens:
        for token in (2, *params.stop_token_ids):
            x[token] = -math.inf
    top = max(x)
    p = {i: math.exp((v - top) / params.temperature) for i, v in enumerate(x)}
    order = sorted(p, key=lambda i: (-p[i], i))
    close = any(abs(v / params.min_p - 1) < 1e-4 for v in p.values()) if params.min_p else False
    order = [i for i in order if p[i] >= params.min_p]
    if params.top_k and params.top_k < len(order):
        close |= p[order[params.top_k - 1]] < p[order[params.top_k]] * (1 + 1e-4)
        order = order[: params.top_k]
    if params.top_p < 1:
        sums = np.cumsum([p[i] for i in order]) / sum(p[i] for i in order)
        kept = int(np.searchsorted(sums, params.top_p)) + 1
        close |= bool(np.abs(sums - params.top_p).min() < 1e-5)
        order = order[:kept]
    result = np.zeros(len(x))
    result[order] = [p[i] for i in order]
    return result / result.sum(), close


class FixedUniform:
    """Stands in for the generator, so that a test can walk through the whole distribution."""

    def __init__(self, value: float) -> None:
        self.value = value

    def random(self) -> float:
        return self.value


def drawn_from(
    logits: Logits,
    params: SamplingParams,
    prompt: tuple[int, ...],
    output: tuple[int, ...],
    u: float,
) -> int:
    sampler = make(replace(params, logprobs=None), logits.size, prompt)
    for token in output:  # force the output so far: a huge logit wins against everything
        forced = np.zeros(logits.size, dtype=np.float32)
        forced[token] = 1e9
        sampler.sample(forced)
    sampler._uniform = FixedUniform(u)  # type: ignore[assignment]
    return sampler.sample(logits).token_id


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.2, 0.7, 1.0, 1.6]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.99, 0.99999, 1.0]),
    top_k=st.sampled_from([0, 1, 3, 50, 100_000]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    presence_penalty=st.sampled_from([0.0, 1.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.8, -0.5]),
)


@given(PARAMS, st.integers(0, 10**6), st.sampled_from([1, 7, 300, 5000]))
@settings(max_examples=250, deadline=None, derandomize=True)
def test_sample_inverts_the_reference_distribution(
    params: SamplingParams, seed: int, vocab: int
) -> None:
    logits = random_logits(seed, vocab)
    prompt, output = (0, vocab // 2), (vocab - 1, vocab // 3, vocab - 1)
    wanted, close = reference(logits, params, prompt, output)
    if close:
        return
    edges = wanted.cumsum()
    for u in np.random.default_rng(seed).random(4):
        token = drawn_from(logits, params, prompt, output, float(u))
        assert wanted[token] > 0, "drew a token that a filter removed"
        low = edges[token] - wanted[token]
        assert low - 1e-5 <= u <= edges[token] + 1e-5


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=1500), st.data())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_top_k_with_many_ties_keeps_the_lowest_ids(values: list[int], draw: st.DataObject) -> None:
    k = draw.draw(st.integers(1, len(values)))
    logits = np.array(values, dtype=np.float32)
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    assert top_k_ids(logits, k).tolist() == sorted(order[:k])


@given(
    st.lists(
        st.tuples(st.sampled_from([0, -1, -7, -8, -14, -15]), st.sampled_from([1, 3, 400, 3000])),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from([0.25, 0.5, 0.75, 0.875, 0.999]),
    st.integers(0, 10**6),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_top_p_keeps_the_fewest_and_lowest_ids_however_small_they_are(
    runs: list[tuple[int, int]], p: float, seed: int
) -> None:
    """A few large weights, or none but thousands of small ones; all are powers of two."""
    exponents = np.repeat(*np.array(runs).T).astype(np.float64)
    np.random.default_rng(seed).shuffle(exponents)
    weights = np.exp2(exponents - exponents.max())  # sums are exact
    order = np.argsort(-weights, kind="stable")
    needed = int(np.searchsorted(np.cumsum(weights[order]), p * weights.sum())) + 1
    assert top_p_ids(weights.astype(np.float32), p).tolist() == sorted(order[:needed].tolist())


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6, top_p=0.9),
        SamplingParams(top_k=5),
        SamplingParams(min_p=0.05, temperature=1.5),
        SamplingParams(top_k=20, top_p=0.8, min_p=0.01),
    ],
)
def test_sample_frequencies_fit_the_distribution(params: SamplingParams) -> None:
    """Chi-square over 10,000 draws with a fixed seed; the bound is 6 standard deviations."""
    logits, draws = random_logits(3, 200, 2.0), 10_000
    wanted, _ = reference(logits, params, (), ())
    sampler = make(params, 200, seed=11)
    counts = np.bincount([sampler.sample(logits).token_id for _ in range(draws)], minlength=200)
    assert counts[wanted == 0].sum() == 0
    common = wanted * draws >= 5
    seen = np.append(counts[common], counts[~common].sum())
    fits = np.append(wanted[common], wanted[~common].sum()) * draws
    seen, fits = seen[fits > 0], fits[fits > 0]
    freedom = seen.size - 1
    assert ((seen - fits) ** 2 / fits).sum() < freedom + 6 * math.sqrt(2 * max(freedom, 1))


def test_greedy_takes_the_first_of_the_largest() -> None:
    assert make(GREEDY, 4).sample(np.array([0, 5, 5, 1], dtype=np.float32)).token_id == 1
    tiny = SamplingParams(temperature=1e-9)
    assert make(tiny, 4).sample(np.array([0, 5, 5, 1], dtype=np.float32)).token_id == 1


def test_sample_leaves_the_logits_unchanged() -> None:
    params = SamplingParams(
        top_p=0.5, top_k=9, min_p=0.01, repetition_penalty=1.5, min_tokens=2, logprobs=3
    )
    logits = random_logits(5, 100)
    logits.setflags(write=False)
    before = logits.copy()
    make(params, 100).sample(logits)
    assert np.array_equal(logits, before)


def test_seed_reproduces_and_the_request_wins_over_the_engine() -> None:
    logits = random_logits(1, 1000)
    first, same, other = (make(SamplingParams(seed=s), 1000, seed=9) for s in (-5, -5, 6))
    runs = [[s.sample(logits).token_id for _ in range(30)] for s in (first, same, other)]
    assert runs[0] == runs[1] != runs[2]
    engine, again = (make(SamplingParams(), 1000, seed=9) for _ in range(2))
    assert [engine.sample(logits) for _ in range(9)] == [again.sample(logits) for _ in range(9)]


def test_min_tokens_rules_out_eos_and_stop_tokens_until_then() -> None:
    params = replace(GREEDY, min_tokens=2, stop_token_ids=(3, 99))
    sampler = make(params, 4)
    logits = np.array([0, 1, 5, 7], dtype=np.float32)
    assert [sampler.sample(logits).token_id for _ in range(3)] == [1, 1, 3]
    ignoring = make(replace(params, ignore_eos=True), 4)
    assert ignoring.sample(logits).token_id == 2, "an ignored eos ends nothing: it may come"


@pytest.mark.parametrize("outside", [-1, -(2**31), 4, 2**32 - 1])
def test_ends_outside_the_vocabulary_rule_nothing_out(outside: int) -> None:
    params = replace(GREEDY, min_tokens=2)
    sampler = Sampler(params, 4, (0,), 0, (outside,))
    logits = np.array([0, 1, 5, 7], dtype=np.float32)
    assert sampler.sample(logits).token_id == 3
    assert sampler.on_device() is not None


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_top_p_0_is_greedy_after_the_penalties(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, top_p=0.0)
    logits = random_logits(3, 500)
    sampler = make(params, 500, seed=5)
    assert {sampler.sample(logits).token_id for _ in range(20)} == {int(logits.argmax())}
    device = sampler.on_device()
    assert device is not None
    assert device.temperature == 0
    penalised = make(replace(params, presence_penalty=2.0), 500, seed=5)
    first, second = (penalised.sample(np.array([1, 0.5], np.float32).repeat(250)).token_id
                     for _ in range(2))  # fmt: skip
    assert (first, second) == (0, 1)


def test_presence_and_frequency_penalties_count_output_only() -> None:
    logits = np.array([4.0, 3.5, 3.0], dtype=np.float32)
    presence = make(replace(GREEDY, presence_penalty=0.7), 3, prompt=(0, 0))
    assert [presence.sample(logits).token_id for _ in range(3)] == [0, 1, 0]
    frequency = make(replace(GREEDY, frequency_penalty=0.3), 3, prompt=(0, 0))
    assert [frequency.sample(logits).token_id for _ in range(4)] == [0, 0, 1, 0]


def test_repetition_penalty_covers_prompt_and_output_of_both_signs() -> None:
    sampler = make(replace(GREEDY, repetition_penalty=2.0), 3, prompt=(0,))
    assert sampler.sample(np.array([4, 3, -1], dtype=np.float32)).token_id == 1
    assert sampler.sample(np.array([-1, -1, -1.5], dtype=np.float32)).token_id == 2


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(seed=4)])
def test_penalties_bring_no_token_back_that_is_ruled_out(params: SamplingParams) -> None:
    sampler = make(replace(params, repetition_penalty=2.0, presence_penalty=1.0), 4, prompt=(0, 1))
    with pytest.raises(RequestFailed, match="every token is ruled out"):
        sampler.sample(np.full(4, -np.inf, dtype=np.float32))


def test_penalties_over_many_distinct_tokens() -> None:
    """More output tokens than the record starts with; each greedy token is new."""
    sampler = make(replace(GREEDY, presence_penalty=2.0), 300)
    logits = np.zeros(300, dtype=np.float32)
    assert [sampler.sample(logits).token_id for _ in range(300)] == list(range(300))


def test_extreme_settings_stay_finite() -> None:
    logits = np.array([1e38, -1e38, 3e38, 0.0], dtype=np.float32)
    params = SamplingParams(temperature=1e-5, repetition_penalty=1e-30, presence_penalty=-2.0)
    assert make(params, 4, prompt=(0, 1)).sample(logits).token_id in (0, 2)
    assert make(SamplingParams(top_p=1e-12), 4).sample(logits).token_id == 2
    assert make(SamplingParams(top_p=1 - 1e-16, min_p=1.0), 4).sample(logits).token_id == 2


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(seed=4, temperature=0.8)])
def test_logprobs_are_of_the_unpenalised_distribution(params: SamplingParams) -> None:
    params = replace(params, logprobs=4, repetition_penalty=1.7, min_tokens=1, top_k=2)
    logits = random_logits(8, 500)
    logits[[10, 20]] = logits.max() + 1  # a tie at the top
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact - exact.max()).sum()) + exact.max()
    sampled = make(params, 500, prompt=(10,)).sample(logits)
    assert sampled.logprob == pytest.approx(exact[sampled.token_id], abs=1e-5)
    best = np.argsort(-exact, kind="stable")[:4]
    assert [t.token_id for t in sampled.top_logprobs] == best.tolist()
    assert [t.logprob for t in sampled.top_logprobs] == pytest.approx(exact[best], abs=1e-5)


def test_logprobs_zero_gives_only_the_chosen() -> None:
    sampled = make(replace(GREEDY, logprobs=0), 8).sample(random_logits(1, 8))
    assert sampled.logprob is not None
    assert sampled.top_logprobs == ()
    assert make(GREEDY, 8).sample(random_logits(1, 8)).logprob is None


def test_logprobs_more_than_the_vocabulary() -> None:
    sampled = make(replace(GREEDY, logprobs=20), 8).sample(random_logits(1, 8))
    assert len(sampled.top_logprobs) == 8


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(top_p=0.9)])
def test_bad_logits_fail_the_request_and_name_it(params: SamplingParams) -> None:
    sampler = make(params, 100)
    sampler.sample(random_logits(2, 100))
    logits = random_logits(2, 100)
    logits[[7, 9]] = np.nan
    with pytest.raises(RequestFailed, match="output token 1: 2 of 100 logits are NaN"):
        sampler.sample(logits)
    logits[[7, 9]] = np.inf
    with pytest.raises(RequestFailed, match="a logit is infinite"):
        sampler.sample(logits)
    with pytest.raises(RequestFailed, match="every token is ruled out"):
        sampler.sample(np.full(100, -np.inf, dtype=np.float32))


def test_wrong_shape_raises() -> None:
    with pytest.raises(ValueError, match=r"got shape \(5,\), expected \(4,\)"):
        make(GREEDY, 4).sample(np.zeros(5, dtype=np.float32))


@given(PARAMS, st.integers(0, 10**6))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_device_and_host_draw_the_same_numbers(params: SamplingParams, seed: int) -> None:
    plain = replace(
        params, repetition_penalty=1, presence_penalty=0, frequency_penalty=0, seed=seed
    )
    host, device = make(plain, 50), make(plain, 50)
    rng = np.random.default_rng(seed)
    for _ in range(3):
        logits = rng.normal(size=50).astype(np.float32)
        asked = device.on_device()
        assert asked is not None
        assert asked == device.on_device(), "asking again costs no number"
        assert asked[:4] == (plain.temperature, plain.top_k, plain.top_p, plain.min_p)
        chosen = make(plain, 50)
        chosen._uniform = FixedUniform(asked[4])  # type: ignore[assignment]
        token = chosen.sample(logits).token_id
        assert device.accept(token).token_id == host.sample(logits).token_id


def test_device_is_not_asked_where_it_needs_what_only_the_host_has() -> None:
    assert make(SamplingParams(temperature=0.0), 8).on_device() == (0.0, 0, 1.0, 0.0, 0.0)
    for params in (
        SamplingParams(logprobs=0),
        SamplingParams(repetition_penalty=1.2),
        SamplingParams(presence_penalty=0.5),
    ):
        assert make(params, 8).on_device() is None
    sampler = make(SamplingParams(min_tokens=1, stop_token_ids=(3,), temperature=0.0), 8)
    assert sampler.on_device() is None, "the mask is not known to the device"
    sampler.sample(np.arange(8, dtype=np.float32))
    assert sampler.on_device() is not None


def test_device_that_found_no_token_fails_the_request() -> None:
    sampler = make(SamplingParams(), 8)
    asked = sampler.on_device()
    with pytest.raises(RequestFailed, match="output token 0: there is no token to choose"):
        sampler.accept(-1)
    assert sampler.on_device() == asked


def test_draw_position_never_lands_on_weight_zero() -> None:
    weights = np.zeros(1000, dtype=np.float32)
    weights[[3, 500]] = 0.3, 0.1
    for uniform, position in ((0.0, 3), (0.74, 3), (0.76, 500), (1 - 2**-53, 500), (1.0, 500)):
        assert draw_position(weights, uniform) == position
