"""The default model on the reference prompts: greedy tokens through the engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import prompt_of

from flowprefill import Engine, EngineConfig, Request, SamplingParams, _core
from flowprefill.bench.transformers_model import TransformersModel

pytestmark = pytest.mark.slow
REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "reference" / "smollm2.json"
CLOSE = 0.1  # difference of the two best logits from which rounding may not change the choice
NAMES = ("first", "second", "third")


@pytest.fixture(scope="module")
def prompts() -> list[dict[str, Any]]:
    if not REFERENCE.exists():
        pytest.skip(f"no reference outputs at {REFERENCE}")
    found: list[dict[str, Any]] = json.loads(REFERENCE.read_text())["prompts"]
    return found


def engine_of(dtype: str) -> Iterator[Engine]:
    with Engine(config=EngineConfig(dtype=dtype, calibrate=False, kv_cache_gib=0.1)) as engine:
        yield engine


@pytest.fixture(scope="module")
def f32(prompts: list[dict[str, Any]]) -> Iterator[Engine]:
    yield from engine_of("f32")


@pytest.fixture(scope="module")
def bf16(prompts: list[dict[str, Any]]) -> Iterator[Engine]:
    if not _core.has_bf16_gemm():
        pytest.skip("this processor does not multiply bf16 natively")
    yield from engine_of("bf16")


def generate(engine: Engine, ids: list[int], count: int) -> list[int]:
    params = SamplingParams(max_tokens=count, temperature=0.0)
    return engine.submit(Request(ids, params)).result(100.0).token_ids


def margin(engine: Engine, ids: list[int]) -> float:
    """How far the best next token is before the second, in logits."""
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=2)
    (token,) = engine.submit(Request(ids, params)).result(100.0).tokens
    best, second = token.top_logprobs
    return best.logprob - second.logprob


@pytest.mark.parametrize("index", range(3), ids=NAMES)
def test_float32_tokens_are_the_references(
    f32: Engine, prompts: list[dict[str, Any]], index: int
) -> None:
    prompt = prompts[index]
    got = generate(f32, prompt["input_ids"], len(prompt["greedy_ids"]))
    assert got == prompt["greedy_ids"]


@pytest.mark.parametrize("index", range(3), ids=NAMES)
def test_bf16_differs_first_only_where_it_is_close(
    bf16: Engine, f32: Engine, prompts: list[dict[str, Any]], index: int
) -> None:
    prompt = prompts[index]
    wanted = prompt["greedy_ids"]
    got = generate(bf16, prompt["input_ids"], len(wanted))
    if got == wanted:
        return
    same = next(n for n, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b)
    close = margin(f32, prompt["input_ids"] + wanted[:same])
    assert close < CLOSE, f"differs at token {same}, where the margin is {close:.3f}"


def test_scores_and_embeddings_are_those_of_transformers() -> None:
    """In float32, of every token of a prompt of 300 and of each pooling."""
    reference: Any = TransformersModel("smollm2-135m", "f32", threads=2)._model
    ids = prompt_of(300)
    with torch.no_grad():
        logprobs = torch.log_softmax(reference(torch.tensor([ids])).logits[0], dim=-1).numpy()
        states = reference.model(torch.tensor([ids])).last_hidden_state[0].numpy()
    wanted = logprobs[np.arange(299), ids[1:]]
    for engine in engine_of("f32"):
        params = SamplingParams(max_tokens=0, prompt_logprobs=20)
        found = engine.submit(Request(ids, params)).result(100.0).prompt_logprobs
        # Both add up in float32, in another order each, on a prompt of random tokens.
        assert np.abs(found.logprobs[1:] - wanted).max() < 3e-4
        best = -np.sort(-logprobs[:299])[:, :20]
        assert np.abs(found.top_logprobs[1:] - best).max() < 3e-4
        for pooling, vector in (("last", states[-1]), ("mean", states.mean(0))):
            embedding = engine.embed(ids, pooling=pooling).result(100.0).embedding
            assert np.abs(embedding - vector / np.linalg.norm(vector)).max() < 1e-4
