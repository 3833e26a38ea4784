"""Structured output of requests on a real engine, among others, from many threads."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable

import pytest
from devices import ONE, on
from engines import WAIT_S, assert_all_free, prompt_of

from flowprefill import Engine, InvalidRequest, Request, SamplingParams, StructuredOutput

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "age": {"enum": [1, 2]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@on(ONE)
def test_text_fulfils_its_schema_among_free_ones(open_engine: Callable[..., Engine]) -> None:
    engine = open_engine()
    wanted = StructuredOutput.from_schema(PERSON)
    free = [
        engine.submit(Request(prompt_of(9, seed), SamplingParams(max_tokens=30, ignore_eos=True)))
        for seed in range(3)
    ]
    bound = SamplingParams(structured=wanted, seed=4, max_tokens=200)
    done = engine.submit(Request(prompt_of(20), bound)).result(WAIT_S)
    assert done.finish_reason == "stop"
    assert json.loads(done.text)["age"] in (1, 2)
    assert [len(handle.result(WAIT_S).tokens) for handle in free] == [30, 30, 30]
    assert_all_free(engine)


def test_text_stops_with_its_structure_whatever_the_stops_say(engine: Engine) -> None:
    wanted = StructuredOutput.from_schema(PERSON)
    params = SamplingParams(structured=wanted, seed=4, max_tokens=200, logprobs=2, min_tokens=150)
    done = engine.submit(Request(prompt_of(20), params)).result(WAIT_S)
    assert done.finish_reason == "stop"
    assert json.loads(done.text)["age"] in (1, 2)
    assert all(token.logprob is not None for token in done.tokens)


def test_the_token_that_ends_a_structure_is_no_part_of_its_text(engine: Engine) -> None:
    (end, *_) = engine.tokenizer.eos_ids
    params = SamplingParams(
        structured=StructuredOutput("regex", "a+"), ignore_eos=True, skip_special_tokens=False,
        logit_bias={end: 100}, temperature=0, max_tokens=9,
    )  # fmt: skip
    done = engine.submit(Request(prompt_of(9), params)).result(WAIT_S)
    assert done.finish_reason == "stop"
    assert done.token_ids[-1] == end
    assert set(done.text) == {"a"}


def test_same_seed_same_text_in_a_batch(engine: Engine) -> None:
    wanted = StructuredOutput.from_schema(PERSON)
    params = SamplingParams(structured=wanted, seed=11, max_tokens=100)
    alone = engine.submit(Request(prompt_of(9), params)).result(WAIT_S).token_ids
    free = SamplingParams(max_tokens=40, seed=1, ignore_eos=True)
    others = [engine.submit(Request(prompt_of(9, seed), free)) for seed in range(3)]
    among_others = engine.submit(Request(prompt_of(9), params)).result(WAIT_S).token_ids
    assert among_others == alone
    assert [len(other.result(WAIT_S).tokens) for other in others] == [40, 40, 40]


def test_length_cuts_a_structured_text(engine: Engine) -> None:
    params = SamplingParams(structured=StructuredOutput("regex", "a{50}"), max_tokens=3)
    assert engine.submit(Request(prompt_of(5), params)).result(WAIT_S).finish_reason == "length"


def test_bad_grammar_is_refused_at_submit(engine: Engine) -> None:
    params = SamplingParams(structured=StructuredOutput("regex", "[a", param="regex"))
    with pytest.raises(InvalidRequest, match="regex: invalid regular expression: unclosed"):
        engine.submit(Request(prompt_of(5), params))


def test_compiles_from_many_threads(engine: Engine) -> None:
    results: list[str] = []

    def ask(number: int) -> None:
        wanted = StructuredOutput.from_choices([f"answer {number % 3}"])
        handle = engine.submit(Request(prompt_of(5), SamplingParams(structured=wanted)))
        results.append(handle.result(WAIT_S).text)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert sorted(results) == sorted(f"answer {number % 3}" for number in range(9))
