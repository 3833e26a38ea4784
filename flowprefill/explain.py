"""`flowprefill explain ID`: asks a server what happened to a request and tells it in sentences."""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

from flowprefill.client import KEY_VARIABLE, bearer, refusal_of, server_url, why_no_answer
from flowprefill.errors import FlowPrefillError, InvalidRequest

TIMEOUT_S = 10.0
DEFAULT_URL = "http://127.0.0.1:8000"
MAX_SHOWN = 8  # of the prefills that a request waited for
Story = Mapping[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "id", nargs="?", help="id of a request, as its reply gave it; left out: list the last ones"
    )
    parser.add_argument("--url", default=DEFAULT_URL, help=f"of the server (default {DEFAULT_URL})")
    parser.add_argument("--api-key", help=f"else from {KEY_VARIABLE}, where the server wants one")
    parser.add_argument("--json", action="store_true", help="print what the server answers instead")


def run(args: argparse.Namespace) -> int:
    """Print the story of one request, or the last requests."""
    path = "/debug/requests"
    if args.id:
        path += "/" + urllib.parse.quote(args.id, safe="")
    url = server_url(args.url) + path
    answer = _fetch(url, bearer(args.api_key))
    if args.json:
        lines = [json.dumps(answer, indent=2)]
    else:
        try:
            lines = list(sentences(answer) if args.id else _short_lines(answer["requests"]))
        except (LookupError, TypeError, AttributeError, ValueError):
            raise FlowPrefillError(f"{url}: not what a server of FlowPrefill answers") from None
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _fetch(url: str, headers: dict[str, str]) -> Any:
    """Get JSON; raises InvalidRequest with what the server says."""
    try:
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        raise InvalidRequest(refusal_of(error)) from None
    except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
        raise FlowPrefillError(f"{url}: {why_no_answer(error)}") from None


def _short_lines(requests: list[Story]) -> Iterator[str]:
    for one in requests:
        first = "" if one["ttft_ms"] is None else f", first token after {_time(one['ttft_ms'])}"
        yield f"{one['id']}  {one['state']}, {one['prompt_tokens']:,} prompt tokens{first}"


def sentences(story: Story) -> Iterator[str]:
    """Tell a story as the server gives it; one line each, with the time since the arrival."""
    yield f"{story['id']}: {_about(story)}."
    predicted = story["predicted_ttft_ms"]
    when = "" if predicted is None else f"; its first token was predicted in {_time(predicted)}"
    yield _line(0.0, f"It arrived{when}.")
    told_wait = False
    for event in story["events"]:
        if event["what"] == "started" and not told_wait:
            told_wait = True
            yield from _waits(story["waited_for"])
        yield _line(event["at_ms"], _told(event))
    if story["events_left_out"]:
        yield f"{'':>12}  (and {story['events_left_out']} more suspensions and resumptions)"
    if not told_wait:
        yield from _waits(story["waited_for"])
    if story["ttft_ms"] is not None:
        yield _line(story["ttft_ms"], f"Its first token was made{_compared(story)}.")
    yield from _ending(story)


def _about(story: Story) -> str:
    parts = [f"{story['prompt_tokens']:,} prompt tokens"]
    if story["cached_tokens"]:
        parts.append(f"{story['cached_tokens']:,} of them found in the prefix cache")
    parts.append(f"class {story['service_class']}")
    if story["tenant"]:
        parts.append(f"tenant {story['tenant']}")
    objective = story["slo"]["ttft_ms"]
    due = "no objective" if objective is None else f"first token due in {_time(objective)}"
    return ", ".join([*parts, due])


def _told(event: Story) -> str:
    because = f": {event['reason']}" if event.get("reason") else ""
    match event["what"]:
        case "demoted":
            return "It was admitted as best effort, since it was predicted to be late."
        case "waits":
            return f"It had to wait for {_work(event)}{because}."
        case "got_memory":
            return "It got the KV blocks that it had waited for."
        case "lost_memory":
            return "It gave its KV blocks up to others and begins anew."
        case "started":
            packed = f", packed with {_work(event)}" if event["count"] else ""
            victims = event.get("preempted", [])
            over = (
                f" It suspended the prefill of {_names(victims, len(victims))}." if victims else ""
            )
            return f"Its prefill started{packed}{because}.{over}"
        case "suspended":
            return f"It was to give way to {_work(event)}{because}."  # it may have ended first
        case "resumed":
            return f"It went on where it had stopped{because}."
        case other:
            return f"{other}{because}."


def _work(event: Story) -> str:
    if event["kind"] == "decode":
        return f"a decode step of {_counted(event['count'], 'sequence')}"
    return f"the prefill of {_names(event['requests'], event['count'])}"


def _names(ids: list[str], count: int) -> str:
    more = count - len(ids)
    return ", ".join(ids) + (f" and {more} more" if more > 0 else "")


def _waits(waited_for: list[Story]) -> Iterator[str]:
    if not waited_for:
        return
    shown = waited_for[:MAX_SHOWN]
    prefills = _counted(len(waited_for), "prefill")
    yield f"{'':>12}  Meanwhile {prefills} of others started or went on:"
    for one in shown:
        names = _names(one["requests"], len(one["requests"]))
        yield f"{_time(one['at_ms']):>12}    {names}: {one['reason']}."
    if len(waited_for) > len(shown):
        yield f"{'':>12}    ... and {len(waited_for) - len(shown)} more."


def _compared(story: Story) -> str:
    predicted, real = story["predicted_ttft_ms"], story["ttft_ms"]
    if predicted is None:
        return ""
    difference = real - predicted
    side = "later" if difference >= 0 else "earlier"
    return f", {_time(abs(difference))} {side} than predicted"


def _ending(story: Story) -> Iterator[str]:
    if story["state"] == "ended":
        met = {True: " Its objectives were met.", False: " Its objectives were missed."}
        why = f" ({story['error']})" if story["error"] else ""
        yield _line(
            story["total_ms"],
            f"It ended: {story['finish_reason']}{why}, "
            f"after {_counted(story['output_tokens'], 'token')}." + met.get(story["slo_met"], ""),
        )
    else:
        yield _line(story["total_ms"], f"Now it is {story['state']}.")
    ran = f"preprocessed {_time(story['preprocess_ms'])}, waited {_time(story['waiting_ms'])}"
    ran += f", computed {_time(story['prefill_run_ms'])}"
    times = story["preemptions"]
    stood = "never suspended"
    if times:
        stood = f"suspended {_counted(times, 'time')} for {_time(story['suspended_ms'])}"
    blocked = story["blocking_ms"]
    blocking = "" if blocked is None else f"; from dispatch to first segment {_time(blocked)}"
    yield f"Of its prefill: {ran}, {stood}{blocking}."


def _line(at_ms: float, text: str) -> str:
    return f"{_time(at_ms):>12}  {text}"


def _time(ms: float) -> str:
    return f"{ms / 1e3:,.3f} s" if ms >= 1e4 else f"{ms:,.1f} ms"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
