"""Logits of every family on every device against transformers, however the work is cut."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import transformers
from cases import CASES, NEWER, Piece, Runner, Saved, reference_logits, relative_error
from devices import EVERY, GRANULARITIES, Device, on
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

GetRunner = Callable[..., Runner]
pytestmark = pytest.mark.timeout(600)  # a test may compute every boundary of every granularity
SOME = ("llama-biases", "mistral-window", "qwen3", *NEWER)
ON_CPU = ("cpu", "cpu-team")
# The runner is that of the session.
SHARED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@on(EVERY, CASES)
def test_whole_prompts_of_every_length(device: Device, case: str, runner: GetRunner) -> None:
    native = runner(case)
    for tokens in device.lengths:
        native.assert_close(native.prefill(native.ids[:tokens], "none", tokens), tokens)


@on(EVERY, SOME)
def test_every_granularity(device: Device, case: str, runner: GetRunner) -> None:
    native = runner(case)
    for granularity, tokens in itertools.product(device.granularities, (1, 17, 64, 129, 200)):
        native.assert_close(native.prefill(native.ids[:tokens], granularity, tokens), tokens)


@on(("cpu",), CASES)
def test_finest_cut_really_is_fine(case: str, runner: GetRunner) -> None:
    native = runner(case)
    run = native.make([(native.ids, 0, native.tables([200])[0])], "budget:0.1")
    operators = {label.op for label in run.labels()}
    before = "attn_round" if case.startswith("olmo2") else "attn_norm"
    assert {before, "qkv_proj", "rope", "attention", "o_proj", "final_norm"} <= operators
    attention = [label for label in run.labels() if label.op == "attention" and label.layer == 0]
    assert len(attention) >= 200 // 16, "attention is sliced by rows"
    native.assert_close(native.execute(run)[0], 200)


@on(("cpu",))
def test_longrope_served_up_to_the_original_context_takes_the_short_factors(
    device: Device, saved: Callable[[Device, str], Saved], open_runner: GetRunner
) -> None:
    """As transformers does while a text has at most so many tokens, here 64."""
    model = saved(device, "phi3-longrope")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        model.folder, attn_implementation="eager"
    )
    expected = reference_logits(theirs, model.ids[:64])
    native = open_runner("phi3-longrope", max_context=64)
    for tokens in (1, 17, 64):
        got = native.prefill(model.ids[:tokens], "operator", tokens)
        assert relative_error(got, expected[tokens - 1]) < device.tolerance
    error = relative_error(expected[63], model.expected[63])
    assert error > device.tolerance, "the factors make a difference"


@on(("cpu-int8",))
def test_sums_of_bytes_have_the_same_bits_however_the_work_is_cut(
    device: Device, saved: Callable[[Device, str], Saved], runner: GetRunner
) -> None:
    """By rows or columns, on one thread or two: they are exact, and rows are quantised alone."""
    native = runner("llama-grouped")
    alone = Runner(dataclasses.replace(device, threads=1), saved(device, "llama-grouped"))
    try:
        wanted = alone.prefill(native.ids[:190], "none")
        for granularity in GRANULARITIES:
            got = native.prefill(native.ids[:190], granularity)
            np.testing.assert_array_equal(got, wanted, err_msg=granularity)
    finally:
        alone.close()


def compute_packed(
    native: Runner, lengths: Sequence[int], contexts: Sequence[int], granularity: str, seed: int = 0
) -> None:
    """Compute the contexts, then the rest of the prompts packed, and check what comes last."""
    tables = native.tables(lengths, seed)
    cached = [(native.ids[:c], 0, t) for c, t in zip(contexts, tables, strict=True) if c]
    if cached:
        native.logits(cached, "none")
    pieces: list[Piece] = [
        (native.ids[c:n], c, t) for n, c, t in zip(lengths, contexts, tables, strict=True)
    ]
    for row, tokens in zip(native.logits(pieces, granularity), lengths, strict=True):
        native.assert_close(row, tokens)


@pytest.mark.parametrize("block_tokens", [16, 64])
@on(EVERY, CASES)
def test_packed_prompts_do_not_see_each_other(
    device: Device, case: str, block_tokens: int, runner: GetRunner
) -> None:
    native = runner(case, block_tokens=block_tokens)
    for granularity in device.granularities[::2]:
        compute_packed(native, (5, 64, 1, 130, 33), (0,) * 5, granularity, seed=3)
    compute_packed(native, (200, 17, 90), (64, 9, 89), device.granularities[2])


@pytest.mark.parametrize("block_tokens", [16, 128])
@on(ON_CPU, CASES)
def test_continued_on_cached_context(case: str, block_tokens: int, runner: GetRunner) -> None:
    native = runner(case, block_tokens=block_tokens)
    for splits in ((100,), (1, 2, 18), (16, 64, 80, 128), (199,), (63, 65)):
        table = native.tables([200], seed=splits[0])[0]
        for begin, end in itertools.pairwise((0, *splits, 200)):
            piece = (native.ids[begin:end], begin, table)
            native.assert_close(native.logits([piece], "budget:2")[0], end)


@on(EVERY, CASES)
def test_decode_steps_of_sequences_with_different_contexts(case: str, runner: GetRunner) -> None:
    native = runner(case)
    contexts = [1, 14, 40, 63, 64, 127, 150, 3, 90]
    tables = native.tables([context + 6 for context in contexts], seed=9)
    prompts = [(native.ids[:n], 0, table) for n, table in zip(contexts, tables, strict=True)]
    for half in (prompts[:5], prompts[5:]):
        native.logits(half, "none")
    for step in range(6):
        pieces: list[Piece] = [
            ([native.ids[n + step]], n + step, table)
            for n, table in zip(contexts, tables, strict=True)
        ]
        got = native.logits(pieces, "budget:2" if step % 2 else "none")
        for row, context in zip(got, contexts, strict=True):
            native.assert_close(row, context + step + 1)


@on(EVERY)
def test_prefill_and_decode_rows_mix_in_one_run(runner: GetRunner) -> None:
    compute_packed(runner("llama-grouped"), (101, 70), (100, 0), "none")


@on(ON_CPU, ("llama-rope-llama3", "qwen2-some-windows", "mistral-window"))
@given(
    borders=st.lists(st.integers(1, 199), max_size=6, unique=True).map(sorted),
    granularity=st.sampled_from(GRANULARITIES),
    seed=st.integers(0, 1000),
)
@settings(max_examples=10, suppress_health_check=SHARED)
def test_any_partition_of_a_prompt(
    case: str, borders: list[int], granularity: str, seed: int, runner: GetRunner
) -> None:
    native = runner(case)
    table = native.tables([200], seed)[0]
    for begin, end in itertools.pairwise((0, *borders, 200)):
        got = native.logits([(native.ids[begin:end], begin, table)], granularity)[0]
        native.assert_close(got, end)


@on(ON_CPU, ("qwen3-biases-tied",))
@given(
    lengths=st.lists(st.integers(1, 120), min_size=1, max_size=8),
    granularity=st.sampled_from(GRANULARITIES),
    seed=st.integers(0, 1000),
)
@settings(max_examples=20, suppress_health_check=SHARED)
def test_any_packing_with_any_context(
    case: str, lengths: list[int], granularity: str, seed: int, runner: GetRunner
) -> None:
    contexts = np.random.default_rng(seed).integers(0, lengths).tolist()
    compute_packed(runner(case), lengths, contexts, granularity, seed)
