"""aiperf at a constant rate: every request answered, and its TTFT is the server's own."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REQUESTS = 11
TIMEOUT_S = 600.0
TOKENIZER = "flowprefill/tokenizer"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A hub cache with the tokenizer: aiperf takes no folder while HF_HUB_OFFLINE is set."""
    repository, revision = tmp_path / "models--flowprefill--tokenizer", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(revision)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / revision).symlink_to(os.environ["FLOWPREFILL_TOKENIZER"])
    return tmp_path


def load(kind: str, url: str, model: str, cache: Path) -> tuple[tuple[float, float], int]:
    """Send the requests; returns mean and median TTFT in ms, and of how many."""
    command = [
        "aiperf", "profile", "--model", model, "--url", url, "--endpoint-type", kind,
        "--streaming", "--tokenizer", TOKENIZER, "--synthetic-input-tokens-mean", "800",
        "--output-tokens-mean", "8", "--request-rate", "1", "--request-count", str(REQUESTS),
        "--ui", "none", "--output-artifact-dir", str(cache / "report"),
    ]  # fmt: skip
    environment = os.environ | {"HF_HUB_CACHE": str(cache)}
    subprocess.run(command, env=environment, check=True, timeout=TIMEOUT_S)
    report = json.loads((cache / "report/profile_export_aiperf.json").read_text())
    assert report["request_count"]["avg"] == REQUESTS
    assert report["request_error_rate"]["avg"] == 0
    ttft = report["time_to_first_token"]
    return (ttft["avg"], ttft["p50"]), REQUESTS


@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_ttft(
    kind: str, url: str, model: str, cache: Path, assert_ttft_agrees: Callable[..., Any]
) -> None:
    assert_ttft_agrees(f"aiperf, {kind}", lambda: load(kind, url, model, cache))
