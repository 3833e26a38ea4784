"""Structured output: its kinds, what is refused, its bounds, and what samplers make of it."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from schema_generator import EOS, HAND_MADE, TOKENS, VOCAB
from test_structured_suite import generate

from flowprefill import InvalidRequest, SamplingParams, StructuredOutput
from flowprefill.engine import grammar_process
from flowprefill.engine.grammars import Grammars
from flowprefill.engine.sampler import Sampler
from flowprefill.errors import ProcessNotStarted
from flowprefill.request import StructuredKind


def test_choice_gives_one_of_the_texts(grammars: Grammars) -> None:
    choices = ['say "x"', "back\\slash", "two\nlines", "ünï\N{PARTY POPPER}", "/re/ | <x>"]
    wanted = StructuredOutput.from_choices(choices)
    texts = {generate(grammars, wanted, seed) for seed in range(40)}
    assert texts == {(choice, True) for choice in choices}


def test_regex_matches_the_whole_text(grammars: Grammars) -> None:
    text, has_ended = generate(grammars, StructuredOutput("regex", r"(ab|c){2}\d"), 1)
    assert has_ended
    assert text[-1].isdigit()
    assert text[:-1] in ("abab", "abc", "cab", "cc")


@pytest.mark.parametrize(
    "grammar",
    ['start: "yes" | "no"', 'root ::= "yes" | word\nword ::= "no"', "start: /yes|no/"],
)
def test_grammar_is_lark_or_gbnf(grammars: Grammars, grammar: str) -> None:
    assert generate(grammars, StructuredOutput("grammar", grammar), 5) in {
        ("yes", True),
        ("no", True),
    }


@pytest.mark.parametrize(
    "grammar",
    [
        r'root ::= "\u00e9" [\u0430-\u044f] "\U0001D49C\u0041" "\\u0041"',
        r'start: "\u00e9" /[\u0430-\u044f]/ "\ud835\udc9cA" "\\u0041"',
    ],
)
def test_letters_may_be_written_by_their_number(grammars: Grammars, grammar: str) -> None:
    text, has_ended = generate(grammars, StructuredOutput("grammar", grammar), 2)
    assert has_ended
    assert re.fullmatch("é[\u0430-\u044f]\U0001d49cA\\\\u0041", text)


def test_the_schema_true_takes_any_json(grammars: Grammars) -> None:
    texts = [generate(grammars, StructuredOutput("json_schema", "true"), seed) for seed in range(9)]
    done = [json.loads(text) for text, has_ended in texts if has_ended]
    assert done


def test_json_object_starts_as_one(grammars: Grammars) -> None:
    text, _ = generate(grammars, StructuredOutput("json_object"), 3)
    assert text.startswith("{")


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (StructuredOutput("regex", "(?=a)b"), "look-ahead"),
        (StructuredOutput("regex", "[a"), "unclosed character class"),
        (StructuredOutput("regex", r"\bfoo\b"), r"^response_format: invalid regex [^\n]*$"),
        (StructuredOutput("regex", "[a&&b]"), "response_format: no text fulfils it"),
        (StructuredOutput("json_schema", '{"type": "text"}'), "Invalid type: text"),
        (StructuredOutput("json_schema", '{"not": {}}'), "Unimplemented keys"),
        (StructuredOutput("json_schema", "{"), "not JSON"),
        (StructuredOutput("json_schema", "[1]"), "expected a JSON schema"),
        (StructuredOutput("json_schema", '{"enum": []}'), "Unsatisfiable"),
        (StructuredOutput("json_schema", "false"), "no text fulfils it"),
        (StructuredOutput("json_schema", '{"items":' * 5000 + "1" + "}" * 5000), "nested|recurs"),
        (StructuredOutput("grammar", 'start: "a" unknown'), "unknown"),
        (StructuredOutput("grammar", "root ::= ("), "Lark nor GBNF|Unexpected"),
        (StructuredOutput("grammar", "start: " + "(" * 5000 + '"a"' + ")" * 5000), "nested"),
        (StructuredOutput("regex", "(" * 5000 + "a" + ")" * 5000), "nest"),
    ],
)
def test_what_cannot_be_compiled_is_refused_by_name(
    grammars: Grammars, wanted: StructuredOutput, message: str
) -> None:
    named = StructuredOutput(wanted.kind, wanted.text, param="response_format")
    for _ in range(2):  # the second time it is remembered
        with pytest.raises(InvalidRequest, match=message) as caught:
            grammars.compile(named)
        assert caught.value.param == "response_format"
        assert len(caught.value.message) < 500


@pytest.mark.slow
def test_damaged_grammars_are_compiled_or_refused(grammars: Grammars) -> None:
    rng = random.Random(5)
    sources: list[tuple[StructuredKind, str]] = [
        *(("json_schema", json.dumps(schema)) for schema in HAND_MADE),
        ("grammar", 'start: "yes" | "no" B\nB: /[0-9]+/'),
        ("grammar", 'root ::= "a" | b*\nb ::= [a-z]{2,3}'),
        ("grammar", 'start: "a" %json {"type":"object"} <[3]>'),
        ("regex", r"(ab|c){2}\d+\p{L}x?"),
    ]
    for _ in range(300):
        kind, text = rng.choice(sources)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(text))
            text = text[:at] + rng.choice('{}[]()"\\:|*+?^$%@/\n09a\0') + text[at + 1 :]
        try:
            grammars.compile(StructuredOutput(kind, text)).start().forbidden()
        except InvalidRequest as error:
            assert error.param == "structured"  # noqa: PT017


def test_what_compiles_for_ever_is_stopped(grammars: Grammars) -> None:
    wanted = StructuredOutput("json_schema", '{"type": "integer", "multipleOf": 1000003}')
    with pytest.raises(InvalidRequest, match="too long or too much memory"):
        grammars.compile(wanted)
    assert generate(grammars, StructuredOutput("regex", "ab"), 0) == ("ab", True)


def test_a_process_that_does_not_start_is_no_fault_of_the_grammar(
    grammars: Grammars, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "worker.py").write_text("import no_such_module")
    grammars.close()
    wanted = StructuredOutput("regex", "not seen before")
    with monkeypatch.context() as patch:
        patch.setattr(grammar_process, "WORKER", tmp_path / "worker.py")
        grammars.warm()  # a server that serves all else starts
        with pytest.raises(ProcessNotStarted):
            grammars.compile(wanted)
    assert grammars.compile(wanted)  # and nothing of it was kept


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("jsn", "x", "one of"),
        ("regex", "", "not empty"),
        ("regex", "a" * 200_000, "at most 131072"),
    ],
)
def test_structured_output_checks_itself(kind: str, text: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        StructuredOutput(kind, text)  # type: ignore[arg-type]


@pytest.mark.parametrize("choices", [[], ["a", ""], "ab", [1]])
def test_choices_are_texts(choices: list[str]) -> None:
    with pytest.raises(InvalidRequest, match="non-empty strings"):
        StructuredOutput.from_choices(choices)


def test_text_is_free_until_after(grammars: Grammars) -> None:
    wanted = StructuredOutput("regex", "[0-9]{3}", after="ab12")
    constraint = grammars.compile(wanted).start()
    pieces = [TOKENS.index(piece) for piece in (b"x", b"ab", b"ab", b"12")]
    for token_id in pieces:
        assert constraint.forbidden() is None
        assert not constraint.accept(token_id)
    forbidden = constraint.forbidden()
    assert forbidden is not None
    assert sorted(TOKENS[i] for i in np.flatnonzero(~forbidden)) == sorted(
        [*(b"%d" % digit for digit in range(10)), b"12", b"34"]
    )
    assert [constraint.accept(TOKENS.index(piece)) for piece in (b"12", b"7")] == [False, True]


def test_no_token_goes_past_the_end_of_the_free_text(grammars: Grammars) -> None:
    """The grammar sees no part of a token, so what comes behind the mark in one token is lost."""
    constraint = grammars.compile(StructuredOutput("regex", "[0-9]{3}", after="a1")).start()
    assert constraint.forbidden() is None
    constraint.accept(TOKENS.index(b"a"))
    forbidden = constraint.forbidden()
    assert forbidden is not None
    assert [TOKENS[i] for i in np.flatnonzero(forbidden)] == [b"12"]
    constraint.accept(TOKENS.index(b"b"))
    assert constraint.forbidden() is None
    within = grammars.compile(StructuredOutput("regex", "[0-9]{3}", after="te")).start()
    forbidden = within.forbidden()
    assert forbidden is not None
    assert [TOKENS[i] for i in np.flatnonzero(forbidden)] == [b"item"]


def test_constrained_sampler_takes_the_logits_path(grammars: Grammars) -> None:
    params = SamplingParams(temperature=0)
    constraint = grammars.compile(StructuredOutput("regex", "ab")).start()
    assert Sampler(params, VOCAB, [], 0, [EOS]).on_device() is not None
    assert Sampler(params, VOCAB, [], 0, [EOS], constraint).on_device() is None


def test_bias_rules_a_token_in_or_out() -> None:
    logits = np.zeros(VOCAB, np.float32)
    for bias, expected in (({7: 100.0}, 7), ({0: -100.0, VOCAB + 5: 100.0}, 1)):
        sampler = Sampler(SamplingParams(temperature=0, logit_bias=bias), VOCAB, [], 0)
        assert sampler.on_device() is None
        assert sampler.sample(logits).token_id == expected


@pytest.mark.parametrize("bias", [{-1: 1.0}, {1: 101.0}, {1: "a"}, dict.fromkeys(range(1025), 1)])
def test_bias_out_of_range_is_refused(bias: dict[int, float]) -> None:
    with pytest.raises(InvalidRequest, match="logit_bias"):
        SamplingParams(logit_bias=bias)
