"""Runs that give more than the last row's logits: scores of every row, embeddings of sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from cases import NEWER, Piece, Runner, Saved
from devices import GPUS, Device, on
from test_preemption import Bystander

GetRunner = Callable[..., Runner]
ON_CPU = ("cpu", "cpu-team", "cpu-bf16-team")
IN_EACH_NUMBER = ("cpu", "cpu-bf16-team", *GPUS)
GRANULARITIES = ("none", "layer", "operator", "chunk:16", "budget:0.1")
TOP = 20
SCORE = np.dtype(
    [("lse", "f4"), ("target", "f4"), ("rank", "i4"), ("ids", "i4", TOP), ("logits", "f4", TOP)]
)  # as csrc/graph/prompt_score.h has it
Array = Any


def run_for(native: Runner, pieces: Sequence[Piece], granularity: str, **made: Any) -> Any:
    """Execute a run of another output; returns it."""
    run = native.make(pieces, granularity, **made)
    native.executor.dispatch(run)
    native.wait(run, "finished", "failed")
    assert run.state == "finished", run.error
    return run


def scores_of(native: Runner, pieces: Sequence[Piece], granularity: str) -> Array:
    """Scores of all rows of the pieces, which are computed packed."""
    run = run_for(native, pieces, granularity, output="scores")
    return native.native.scores(run).copy().view(SCORE)[:, 0]


def assert_scores(got: Array, saved: Saved, first: int, tolerance: float, known: int) -> None:
    """Check scores of positions first, first + 1, ... by transformers' log_softmax in float32.

    Args:
        known: how many of the rows have a token that follows.
    """
    logits = torch.tensor(saved.expected[first : first + len(got)])
    expected = torch.log_softmax(logits, dim=-1).numpy()
    rows = np.arange(known)
    targets = np.asarray(saved.ids)[first + 1 : first + 1 + known]
    logprobs = got["target"][:known] - got["lse"][:known]
    assert np.abs(logprobs - expected[rows, targets]).max() < tolerance
    assert np.isnan(got["target"][known:]).all()
    assert (got["rank"][known:] == 0).all()
    top = got["logits"] - got["lse"][:, None]
    assert np.abs(top - -np.sort(-expected)[:, :TOP]).max() < tolerance
    assert np.abs(np.take_along_axis(expected, got["ids"], 1) - top).max() < tolerance
    assert all(len(set(ids)) == TOP for ids in got["ids"].tolist())
    # As many larger logits as the rank says, up to those that are as good as equal.
    wanted = expected[rows, targets][:, None]
    fewest = (expected[:known] > wanted + 2 * tolerance).sum(1) + 1
    most = (expected[:known] > wanted - 2 * tolerance).sum(1)
    assert (fewest <= got["rank"][:known]).all()
    assert (got["rank"][:known] <= most).all()


def tolerance_of(device: Device, saved: Saved) -> float:
    """1e-4 where the device computes float32."""
    if device.dtype == "f32":
        return 1e-4
    return 2 * device.tolerance * float(np.abs(saved.expected).max())


@on(IN_EACH_NUMBER, ["llama-grouped", "llama-wide-head", *NEWER])
def test_scores_are_log_softmax_of_transformers(
    device: Device, case: str, runner: GetRunner
) -> None:
    native = runner(case)
    tolerance = tolerance_of(device, native.saved)
    for granularity in ("none", "chunk:16", "budget:0.1"):
        first, second = native.tables([200, 33])
        pieces: list[Piece] = [(native.ids, 0, first), (native.ids[:33], 0, second)]
        got = scores_of(native, pieces, granularity)
        assert_scores(got[:200], native.saved, 0, tolerance, 199)
        assert_scores(got[200:], native.saved, 0, tolerance, 32)


def test_a_prompt_in_several_runs_has_the_scores_of_one(runner: GetRunner) -> None:
    """The last row of a run is scored by the token that the next one begins with."""
    native = runner("qwen3")
    (table,) = native.tables([200])
    found = []
    for begin, end in ((0, 70), (70, 71), (71, 200)):
        sequence = native.native.BatchSequence(
            rows=end - begin,
            context=begin,
            block_table=table,
            next_token=native.ids[end] if end < 200 else -1,
        )
        batch = native.native.Batch(np.array(native.ids[begin:end], np.int32), [sequence])
        run = native.model.make_run(10_000 + end, batch, native.plan("budget:2"), output="scores")
        native.execute(run)
        found.append(native.native.scores(run).copy().view(SCORE)[:, 0])
    assert_scores(np.concatenate(found), native.saved, 0, 1e-4, 199)


def test_a_token_out_of_the_vocabulary_cannot_follow(runner: GetRunner) -> None:
    native = runner("llama-grouped")
    (table,) = native.tables([16])
    sequence = native.native.BatchSequence(rows=1, context=0, block_table=table, next_token=200)
    batch = native.native.Batch(np.array([1], np.int32), [sequence])
    with pytest.raises(ValueError, match="next_token: got 200, expected a token below 200"):
        native.model.make_run(1, batch, native.plan("none"), output="scores")


def embeddings_of(model: transformers.PreTrainedModel, ids: list[int]) -> Array:
    """Transformers' last hidden states, [tokens, hidden]."""
    with torch.no_grad():
        states: Array = model.base_model(torch.tensor([ids])).last_hidden_state[0].numpy()
    return states


@on(IN_EACH_NUMBER, ["llama-grouped", *NEWER])
def test_embeddings_are_of_transformers_last_hidden_state(
    device: Device, case: str, runner: GetRunner
) -> None:
    native = runner(case)
    # Eager: sdpa of transformers 5.17 leaves out the soft cap of Gemma 2, without a word.
    model = transformers.AutoModelForCausalLM.from_pretrained(
        native.saved.folder, attn_implementation="eager"
    )
    lengths = (200, 1, 33)
    states = [embeddings_of(model, native.ids[:n]) for n in lengths]
    pieces = [(native.ids[:n], 0, t) for n, t in zip(lengths, native.tables(lengths), strict=True)]
    for granularity in ("none", "chunk:16", "budget:0.1"):
        for output in ("last", "mean"):
            run = run_for(native, pieces, granularity, output=output)
            expected = np.array([s[-1] if output == "last" else s.mean(0) for s in states])
            got = native.native.embeddings(run)
            assert got.shape == expected.shape
            slack = 1e-4 if device.dtype == "f32" else device.tolerance * np.abs(expected).max()
            assert np.abs(got - expected).max() < slack
            with pytest.raises(ValueError, match="has no logits"):
                native.native.logits(run)


@pytest.mark.parametrize("output", ["logits", "scores", "last", "mean"])
@on((*ON_CPU, *GPUS))
def test_outputs_are_bit_equal_when_preempted_at_every_boundary(
    device: Device, output: str, runner: GetRunner
) -> None:
    native = runner("llama-grouped")
    mine, second, others = native.tables([150, 40, 90])
    pieces: list[Piece] = [(native.ids[:150], 0, mine), (native.ids[:40], 0, second)]
    read = {"logits": "logits", "scores": "scores"}.get(output, "embeddings")
    for granularity in device.granularities if device.is_double else GRANULARITIES:
        undisturbed = run_for(native, pieces, granularity, output=output)
        expected = getattr(native.native, read)(undisturbed).copy()
        bystander = Bystander(native, (native.ids[50:130], 0, others), "operator")
        every = range(1, native.make(pieces, granularity, output=output).num_segments)
        run = native.make(pieces, granularity, output=output, pause_at=set(every))
        for boundary in every:
            native.advance(run, boundary)
            bystander()
            run_for(native, [(native.ids[:90], 0, others)], granularity, output=output)
        native.executor.dispatch(run)
        native.wait(run, "finished")
        got = getattr(native.native, read)(run)
        assert np.array_equal(got.view(np.int32), expected.view(np.int32))
        if granularity == "budget:0.1":
            assert bystander.count > (15 if device.is_cuda else 50)  # a GPU cuts larger pieces


@on(ON_CPU)
def test_segments_behind_the_layers_are_within_the_budget(runner: GetRunner) -> None:
    """Priced and sliced by the planner: none is longer than the budget and one least slice."""
    native = runner("llama-grouped")
    (table,) = native.tables([200])
    run = native.make([(native.ids, 0, table)], "budget:0.1", output="scores")
    labels = run.labels()
    scoring = [label for label in labels if label.op in ("lm_head", "score")]
    assert len({label.row_begin for label in scoring if label.op == "score"}) >= 200 // 64
    assert sum(label.predicted_s for label in scoring) > 0
    whole = native.make([(native.ids, 0, table)], "none", output="scores").labels()
    assert len(whole) == 1
    plain = native.make([(native.ids, 0, table)], "none").labels()
    assert whole[0].predicted_s > plain[0].predicted_s
