"""Tests of StopChecker: examples, then any split of any text against a plain definition."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowprefill.engine.stop import ReleasedText, StopChecker
from flowprefill.request import SamplingParams

EOS = 2


def run(params: SamplingParams, pieces: list[str]) -> tuple[str, str | None, int]:
    """Feed one token per piece; return released text, finish reason, tokens used."""
    checker = StopChecker(params, [EOS])
    released = ""
    for count, piece in enumerate(pieces, start=1):
        may_end = checker.may_end_with(100)
        verdict = checker.push(100, piece)
        assert may_end or verdict.finish_reason is None
        released += verdict.text
        if verdict.finish_reason is not None:
            return released, verdict.finish_reason, count
    return released + checker.flush(), None, len(pieces)


def test_push_without_stops_releases_at_once() -> None:
    checker = StopChecker(SamplingParams())
    assert checker.push(5, "hello") == ReleasedText("hello", None)


def test_push_holds_back_start_of_stop_and_releases_when_it_cannot_be() -> None:
    checker = StopChecker(SamplingParams(stop=("END",)))
    assert checker.push(5, "the E") == ReleasedText("the ", None)
    assert checker.push(5, "N") == ReleasedText("", None)
    assert checker.push(5, "T") == ReleasedText("ENT", None)


def test_push_stop_string_across_pieces_is_removed() -> None:
    assert run(SamplingParams(stop=("END",)), ["a", " E", "N", "D tail"]) == ("a ", "stop", 4)


def test_push_stop_string_included_when_asked_for_and_nothing_held_back() -> None:
    params = SamplingParams(stop=("END",), include_stop_str_in_output=True)
    checker = StopChecker(params)
    assert checker.push(5, "a E") == ReleasedText("a E", None)
    assert checker.push(5, "ND tail") == ReleasedText("ND", "stop")


def test_push_first_completed_of_several_wins() -> None:
    params = SamplingParams(stop=("b", "abc"))
    assert run(params, ["xabc"]) == ("xa", "stop", 1)
    assert run(params, ["xa", "bc"]) == ("xa", "stop", 2)


def test_push_longest_of_those_completed_together_wins() -> None:
    assert run(SamplingParams(stop=("c", "abc")), ["xa", "bc"]) == ("x", "stop", 2)


@pytest.mark.parametrize("token_id", [EOS, 7])
def test_push_stop_token_ends_and_releases_held_text(token_id: int) -> None:
    checker = StopChecker(SamplingParams(stop=("END",), stop_token_ids=(7,)), [EOS])
    checker.push(5, "EN")
    assert checker.reason_of(token_id) == "stop"
    assert checker.push(token_id, "") == ReleasedText("EN", "stop")


def test_push_ignore_eos_goes_on_but_stop_token_ids_count() -> None:
    checker = StopChecker(SamplingParams(ignore_eos=True, stop_token_ids=(7,)), [EOS])
    assert [checker.may_end_with(token_id) for token_id in (EOS, 7)] == [False, True]
    assert checker.push(EOS, "") == ReleasedText("", None)
    assert checker.push(7, "") == ReleasedText("", "stop")


@pytest.mark.parametrize(("asked", "room"), [(2, None), (None, 2), (2, 9), (9, 2)])
def test_push_limit_ends_with_length_and_releases_held_text(
    asked: int | None, room: int | None
) -> None:
    checker = StopChecker(SamplingParams(max_tokens=asked, stop=("END",)), [EOS], room)
    assert checker.reason_of(5) is None
    assert checker.may_end_with(5)  # by its text
    assert checker.push(5, "a") == ReleasedText("a", None)
    assert checker.reason_of(5) == "length"
    assert checker.push(5, "EN") == ReleasedText("EN", "length")


def test_push_stop_at_the_limit_is_stop() -> None:
    params = SamplingParams(max_tokens=1, stop=("END",))
    assert StopChecker(params, [EOS]).push(5, "xEND") == ReleasedText("x", "stop")
    assert StopChecker(params, [EOS]).push(EOS, "") == ReleasedText("", "stop")


def test_push_min_tokens_ignores_earlier_stops() -> None:
    checker = StopChecker(SamplingParams(min_tokens=3, stop=("END",)), [EOS])
    assert checker.push(EOS, "aEND") == ReleasedText("aEND", None)
    assert checker.push(5, "xEN") == ReleasedText("x", None)
    assert checker.push(5, "Dy") == ReleasedText("", "stop")


def test_push_min_tokens_occurrence_overlapping_an_ignored_one() -> None:
    params = SamplingParams(min_tokens=2, stop=("abab",))
    assert run(params, ["xabab", "ab"]) == ("xab", "stop", 2)


def test_push_after_the_end_raises() -> None:
    checker = StopChecker(SamplingParams(max_tokens=1))
    checker.push(5, "a")
    with pytest.raises(AssertionError, match="after the last"):
        checker.push(5, "b")


def test_push_huge_stop_strings_hold_back_only_what_matches() -> None:
    checker = StopChecker(SamplingParams(stop=("a" * 1_000_000, "ab" * 500_000)))
    assert checker.push(5, "xaaa") == ReleasedText("x", None)
    assert checker.push(5, "bab") == ReleasedText("aa", None)
    assert checker.flush() == "abab"


STOPS = st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4)
PIECES = st.lists(st.text("abc", max_size=6), max_size=8)


def expected(
    stops: list[str], pieces: list[str], *, include: bool, min_tokens: int
) -> tuple[str, str | None]:
    """The definition, plainly: earliest end, then longest, ends before token min_tokens ignored."""
    text = "".join(pieces)
    first_end = len("".join(pieces[: max(min_tokens - 1, 0)])) + 1
    for end in range(first_end, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            start = end - max(map(len, found))
            return text[: end if include else start], "stop"
    return text, None


@given(STOPS, PIECES, st.booleans(), st.integers(0, 4))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_released_text_is_the_text_before_the_first_stop(
    stops: list[str], pieces: list[str], include: bool, min_tokens: int
) -> None:
    params = SamplingParams(
        stop=tuple(stops), include_stop_str_in_output=include, min_tokens=min_tokens
    )
    released, reason, _ = run(params, pieces)
    wanted = expected(stops, pieces, include=include, min_tokens=min_tokens)
    assert (released, reason) == wanted


@given(STOPS, PIECES)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_held_back_text_is_no_more_than_needed(stops: list[str], pieces: list[str]) -> None:
    checker = StopChecker(SamplingParams(stop=tuple(stops)))
    text = released = ""
    for piece in pieces:
        verdict = checker.push(5, piece)
        text, released = text + piece, released + verdict.text
        if verdict.finish_reason is not None:
            return
        held = text[len(released) :]
        prefixes = {stop[:end] for stop in stops for end in range(len(stop))}
        assert held == max((p for p in prefixes if text.endswith(p)), key=len)
