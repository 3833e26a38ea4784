"""What every client's tests are given: the address of a running server and what it serves.

Each file runs in the environment of its own client, so this needs nothing but pytest; `run.py`
starts the server and says by FLOWPREFILL_URL where it is.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

TIMEOUT_S = 120.0
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
