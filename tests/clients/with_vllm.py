"""`vllm bench serve` at a small rate: every request answered, and its TTFT is the server's own."""

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


def load(
    kind: tuple[str, str], url: str, model: str, folder: Path
) -> tuple[tuple[float, float], int]:
    """Send the requests; returns mean and median TTFT in ms, and of how many."""
    command = [
        "vllm", "bench", "serve", "--backend", kind[0], "--endpoint", kind[1], "--base-url", url,
        "--model", model, "--tokenizer", os.environ["FLOWPREFILL_TOKENIZER"],
        "--dataset-name", "random", "--random-input-len", "800", "--random-output-len", "8",
        "--ignore-eos", "--num-prompts", str(REQUESTS), "--request-rate", "1",
        "--save-result", "--result-dir", str(folder), "--result-filename", "report.json",
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=TIMEOUT_S)
    report = json.loads((folder / "report.json").read_text())
    assert (report["completed"], report["failed"]) == (REQUESTS, 0)
    assert report["total_output_tokens"] == 8 * REQUESTS
    return (report["mean_ttft_ms"], report["median_ttft_ms"]), REQUESTS


@pytest.mark.parametrize(
    "kind", [("openai", "/v1/completions"), ("openai-chat", "/v1/chat/completions")]
)
def test_ttft(
    kind: tuple[str, str],
    url: str,
    model: str,
    tmp_path: Path,
    assert_ttft_agrees: Callable[..., Any],
) -> None:
    name = f"vllm bench serve, {kind[0]}"
    assert_ttft_agrees(name, lambda: load(kind, url, model, tmp_path))
