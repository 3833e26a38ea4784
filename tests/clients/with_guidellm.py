"""guidellm at a constant rate: every request answered, and its TTFT is the server's own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

REQUESTS = 11
TIMEOUT_S = 600.0


def load(url: str, model: str, report: Path) -> tuple[tuple[float, float], list[str]]:
    """Send the requests; returns mean and median TTFT in ms, and the ids of the answers."""
    command = [
        "guidellm", "run", "--backend", f"kind=openai_http,target={url},model={model}",
        "--profile", "kind=constant,rate=1", "--constraint", f"kind=max_requests,count={REQUESTS}",
        "--data", "kind=synthetic_text,prompt_tokens=800,output_tokens=8",
        "--tokenizer", f"kind=hf_auto,model={os.environ['FLOWPREFILL_TOKENIZER']}",
        "--output", f"kind=json,path={report}", "--disable-console",
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=TIMEOUT_S)
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    assert benchmark["requests"]["errored"] == benchmark["requests"]["incomplete"] == []
    # It may stop before it has noted the last answer, and its summary may leave one more out.
    answered = benchmark["requests"]["successful"]
    assert REQUESTS - 1 <= len(answered) <= REQUESTS
    assert {one["output_tokens"] for one in answered} == {8}
    times_ms = [one["time_to_first_token_ms"] for one in answered]
    ttft = statistics.mean(times_ms), statistics.median(times_ms)
    return ttft, [one["response_id"] for one in answered]


def test_ttft(url: str, model: str, tmp_path: Path, assert_ttft_agrees: Callable[..., Any]) -> None:
    report = tmp_path / "report.json"
    assert_ttft_agrees("guidellm", lambda: load(url, model, report))
