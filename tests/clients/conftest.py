"""What every client's tests are given: the address of a running server and what it serves.

Each file runs in the environment of its own client, so this needs nothing but pytest; `run.py`
starts the server and says by FLOWPREFILL_URL where it is.
"""

from __future__ import annotations

import json
import os
import statistics
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

TIMEOUT_S = 120.0
ROUNDS = 3  # of a load tool: what else the machine does delays the tool, not the server's figure
TOLERANCE = 0.05
Ttft = tuple[float, float]  # mean and median over a round's requests, ms
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}


@pytest.fixture(scope="session")
def url() -> str:
    """The server's address, without a path."""
    return os.environ["FLOWPREFILL_URL"]


@pytest.fixture(scope="session")
def model(url: str) -> str:
    """What the server calls its model."""
    with urllib.request.urlopen(f"{url}/v1/models", timeout=TIMEOUT_S) as reply:
        return str(json.load(reply)["data"][0]["id"])


@pytest.fixture(scope="session")
def post(url: str) -> Callable[[str, dict[str, Any]], tuple[int, Any]]:
    """Send JSON without any client: (path, body) -> (status, reply)."""

    def send(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(url + path, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    return send


@pytest.fixture(scope="session")
def weather() -> dict[str, Any]:
    """A schema with bounds, so that a small model's answer ends."""
    return WEATHER


@pytest.fixture
def assert_ttft_agrees(
    url: str, capsys: pytest.CaptureFixture[str]
) -> Callable[[str, Callable[[], tuple[Ttft, int | list[str]]]], None]:
    """Let a load tool measure up to three times: once its TTFT is the server's own.

    What measures returns the tool's figures, and for which requests: their ids, or how many were
    the last that came (a tool's trial ones come first).
    """

    def check(tool: str, measure: Callable[[], tuple[Ttft, int | list[str]]]) -> None:
        for _ in range(ROUNDS):
            told, requests = measure()
            own = server_ttft(url, requests)
            with capsys.disabled():
                print(f"{tool}: TTFT {shown(told)}, the server's own {shown(own)}")
            if told == pytest.approx(own, rel=TOLERANCE):
                return
        pytest.fail(f"{tool}: in no round within {TOLERANCE:.0%} of the server's TTFT")

    return check


def server_ttft(url: str, requests: int | list[str]) -> Ttft:
    """Mean and median of the server's own figures for these requests, or for so many last ones."""
    with urllib.request.urlopen(f"{url}/debug/requests", timeout=TIMEOUT_S) as reply:
        known = json.load(reply)["requests"]  # the newest first
    if isinstance(requests, int):
        chosen = known[:requests]
        assert len(chosen) == requests
    else:
        chosen = [one for one in known if one["id"] in requests]
        assert len(chosen) == len(requests)
    assert all(one["state"] == "ended" for one in chosen)
    times_ms = [one["ttft_ms"] for one in chosen]
    return statistics.mean(times_ms), statistics.median(times_ms)


def shown(ttft: Ttft) -> str:
    return f"mean {ttft[0]:.1f} ms, p50 {ttft[1]:.1f} ms"
