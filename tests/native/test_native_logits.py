"""Native logits of every family against transformers in float32, however the work is cut."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from native_models import CASES, NEWER, Piece, Runner, Saved, plan, reference_logits, relative_error

TOLERANCE = 1e-4  # largest difference over the largest logit
# Around the borders of row blocks (16), chunks (32), tiles (64) and tiles of two threads (128).
LENGTHS = (1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 200)
GRANULARITIES = ("none", "layer", "operator", "chunk:16", "chunk:32", "budget:2", "budget:0.1")
GetRunner = Callable[..., Runner]
GetSaved = Callable[[str], Saved]


@pytest.mark.parametrize("case", CASES)
def test_whole_prompts_of_every_length(case: str, runner: GetRunner, saved: GetSaved) -> None:
    native, model = runner(case), saved(case)
    errors = {
        n: relative_error(native.prefill(model.ids[:n], plan("none"), n), model.expected[n - 1])
        for n in LENGTHS
    }
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("case", ["llama-biases", "mistral-window", "qwen3", *NEWER])
def test_every_granularity(
    case: str, granularity: str, threads: int, runner: GetRunner, saved: GetSaved
) -> None:
    native, model = runner(case, threads=threads), saved(case)
    for tokens in (1, 17, 64, 129, 200):
        got = native.prefill(model.ids[:tokens], plan(granularity), tokens)
        assert relative_error(got, model.expected[tokens - 1]) < TOLERANCE, tokens


@pytest.mark.parametrize("case", CASES)
def test_finest_cut_really_is_fine(case: str, runner: GetRunner, saved: GetSaved) -> None:
    native, model = runner(case), saved(case)
    run = native.make([(model.ids, 0, native.tables([200])[0])], plan("budget:0.1"))
    operators = {label.op for label in run.labels()}
    before = "attn_round" if case.startswith("olmo2") else "attn_norm"
    assert {before, "qkv_proj", "rope", "attention", "o_proj", "final_norm"} <= operators
    attention = [label for label in run.labels() if label.op == "attention" and label.layer == 0]
    assert len(attention) >= 200 // 16, "attention is sliced by rows"
    assert relative_error(native.execute(run)[0], model.expected[199]) < TOLERANCE


def test_longrope_served_up_to_the_original_context_takes_the_short_factors(
    saved: GetSaved,
) -> None:
    """As transformers does while a text has at most so many tokens, here 64."""
    folder, ids = saved("phi3-longrope").folder, saved("phi3-longrope").ids[:64]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    expected = reference_logits(theirs, ids)
    native = Runner(folder, max_context=64)
    for tokens in (1, 17, 64):
        got = native.prefill(ids[:tokens], plan("operator"), tokens)
        assert relative_error(got, expected[tokens - 1]) < TOLERANCE
    native.close()
    long = saved("phi3-longrope").expected
    assert relative_error(expected[63], long[63]) > TOLERANCE, "the factors make a difference"


@pytest.mark.parametrize("block_tokens", [16, 64, 128])
@pytest.mark.parametrize("case", CASES)
def test_packed_prompts_do_not_see_each_other(
    case: str, block_tokens: int, runner: GetRunner, saved: GetSaved
) -> None:
    native, model = runner(case, block_tokens=block_tokens), saved(case)
    lengths = (5, 64, 1, 130, 33)
    tables = native.tables(lengths, seed=3)
    pieces = [(model.ids[:n], 0, table) for n, table in zip(lengths, tables, strict=True)]
    for granularity in ("none", "operator", "chunk:32", "budget:2"):
        got = native.logits(pieces, plan(granularity))
        for row, tokens in enumerate(lengths):
            assert relative_error(got[row], model.expected[tokens - 1]) < TOLERANCE, granularity


@pytest.mark.parametrize("block_tokens", [16, 64])
@pytest.mark.parametrize("case", CASES)
def test_continued_on_cached_context(
    case: str, block_tokens: int, runner: GetRunner, saved: GetSaved
) -> None:
    native, model = runner(case, block_tokens=block_tokens), saved(case)
    for splits in ((100,), (1, 2, 18), (16, 64, 80, 128), (199,), (63, 65)):
        table = native.tables([200], seed=splits[0])[0]
        borders = (0, *splits, 200)
        for begin, end in itertools.pairwise(borders):
            piece = (model.ids[begin:end], begin, table)
            got = native.logits([piece], plan("budget:2"))[0]
            assert relative_error(got, model.expected[end - 1]) < TOLERANCE, (splits, end)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_decode_steps_of_sequences_with_different_contexts(
    case: str, threads: int, runner: GetRunner, saved: GetSaved
) -> None:
    native, model = runner(case, threads=threads), saved(case)
    contexts = [1, 14, 40, 63, 64, 127, 150, 3, 90]
    tables = native.tables([context + 6 for context in contexts], seed=9)
    native.logits(
        [(model.ids[:n], 0, table) for n, table in zip(contexts, tables, strict=True)], plan("none")
    )
    for step in range(6):
        pieces: list[Piece] = [
            ([model.ids[n + step]], n + step, table)
            for n, table in zip(contexts, tables, strict=True)
        ]
        got = native.logits(pieces, plan("budget:2" if step % 2 else "none"))
        for row, context in enumerate(contexts):
            assert relative_error(got[row], model.expected[context + step]) < TOLERANCE


def test_prefill_and_decode_rows_mix_in_one_run(runner: GetRunner, saved: GetSaved) -> None:
    native, model = runner("llama-grouped", threads=2), saved("llama-grouped")
    first, second = native.tables([101, 70])
    native.logits([(model.ids[:100], 0, first)], plan("none"))
    got = native.logits([([model.ids[100]], 100, first), (model.ids[:70], 0, second)], plan("none"))
    assert relative_error(got[0], model.expected[100]) < TOLERANCE
    assert relative_error(got[1], model.expected[69]) < TOLERANCE


@given(
    borders=st.lists(st.integers(1, 199), max_size=6, unique=True).map(sorted),
    granularity=st.sampled_from(GRANULARITIES),
    seed=st.integers(0, 1000),
    threads=st.sampled_from((1, 2)),
    case=st.sampled_from(("llama-rope-llama3", "qwen2-some-windows", "mistral-window")),
)
@settings(max_examples=60)
def test_any_partition_of_a_prompt(
    borders: list[int],
    granularity: str,
    seed: int,
    threads: int,
    case: str,
    runner: GetRunner,
    saved: GetSaved,
) -> None:
    native, model = runner(case, threads=threads), saved(case)
    table = native.tables([200], seed)[0]
    got = np.empty(0, dtype=np.float32)
    for begin, end in zip([0, *borders], [*borders, 200], strict=True):
        got = native.logits([(model.ids[begin:end], begin, table)], plan(granularity))[0]
    assert relative_error(got, model.expected[199]) < TOLERANCE


@given(
    lengths=st.lists(st.integers(1, 120), min_size=1, max_size=8),
    granularity=st.sampled_from(GRANULARITIES),
    seed=st.integers(0, 1000),
    threads=st.sampled_from((1, 2)),
)
@settings(max_examples=40)
def test_any_packing_with_any_context(
    lengths: list[int],
    granularity: str,
    seed: int,
    threads: int,
    runner: GetRunner,
    saved: GetSaved,
) -> None:
    case = "qwen3-biases-tied"
    native, model = runner(case, threads=threads), saved(case)
    tables = native.tables(lengths, seed)
    contexts = np.random.default_rng(seed).integers(0, lengths).tolist()
    cached = [(model.ids[:c], 0, t) for c, t in zip(contexts, tables, strict=True) if c]
    if cached:
        native.logits(cached, plan("none"))
    pieces = [(model.ids[c:n], c, t) for n, c, t in zip(lengths, contexts, tables, strict=True)]
    got = native.logits(pieces, plan(granularity))
    for row, tokens in enumerate(lengths):
        assert relative_error(got[row], model.expected[tokens - 1]) < TOLERANCE
