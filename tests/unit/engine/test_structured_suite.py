"""Structured output over many schemas: whatever the logits, a finished text fulfils its schema."""

from __future__ import annotations

import json
import time
from typing import Any

import jsonschema
import numpy as np
import pytest
from schema_generator import EOS, HAND_MADE, TOKENS, VOCAB, random_schema

from flowprefill.engine.grammars import Grammars
from flowprefill.engine.sampler import Sampler
from flowprefill.request import SamplingParams, StructuredOutput

MAX_TOKENS = 600
RANDOM_SCHEMAS = 200


def generate(grammars: Grammars, wanted: StructuredOutput, seed: int) -> tuple[str, bool]:
    """Sample at temperature 1 from random logits; returns the text and whether it has ended."""
    rng = np.random.default_rng(seed)
    params = SamplingParams(structured=wanted, seed=seed)
    constraint = grammars.compile(wanted).start()
    sampler = Sampler(params, VOCAB, [], 0, [EOS], constraint)
    text = b""
    for _ in range(MAX_TOKENS):
        sampled = sampler.sample(rng.standard_normal(VOCAB, dtype=np.float32))
        sampler.prepare()
        if sampled.token_id == EOS:
            return text.decode(), True
        text += TOKENS[sampled.token_id]
        if sampled.is_last:
            return text.decode(), True
    return text.decode("utf-8", "replace"), False


def check(grammars: Grammars, schemas: list[dict[str, Any]]) -> int:
    """Generate twice for each schema; returns how many texts have ended. All of them validate."""
    finished = 0
    for seed, schema in enumerate(schemas):
        wanted = StructuredOutput.from_schema(schema)
        for attempt in range(2):
            text, has_ended = generate(grammars, wanted, 1000 * attempt + seed)
            if has_ended:
                finished += 1
                try:
                    jsonschema.Draft202012Validator(schema).validate(json.loads(text))
                except (ValueError, jsonschema.ValidationError) as error:
                    pytest.fail(f"{json.dumps(schema)} gave {text!r}: {error}")
    return finished


@pytest.mark.slow
def test_random_schemas_finished_text_validates(grammars: Grammars) -> None:
    start = time.perf_counter()
    finished = check(grammars, [random_schema(seed) for seed in range(RANDOM_SCHEMAS)])
    print(f"{finished} texts in {time.perf_counter() - start:.1f} s")
    assert finished > 1.9 * RANDOM_SCHEMAS


@pytest.mark.slow
def test_hand_made_schemas_finished_text_validates(grammars: Grammars) -> None:
    assert len(HAND_MADE) == 30
    assert check(grammars, list(HAND_MADE)) > 1.8 * len(HAND_MADE)
