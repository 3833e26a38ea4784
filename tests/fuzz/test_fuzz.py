"""Damaged model files and bodies, in a process with bounded memory: loaded or refused, no more.

A short run by default; `make test-fuzz` makes 500 mutations of each file and 2,000 bodies. A run
that failed is repeated by the command in its message.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = Path(__file__).parent / "fuzz_child.py"
ROOT = CHILD.parents[2]
KINDS = (
    "config.json", "tokenizer.json", "generation_config.json", "model.safetensors",
    "quantised/config.json", "quantised/model.safetensors", "model.gguf", "chat_template.jinja",
    "http",
)  # fmt: skip
COUNT = int(os.environ.get("FLOWPREFILL_FUZZ", "20"))
# Starting a process takes seconds: a short run makes do with one.
GROUPS = [KINDS] if COUNT < 100 else [(kind,) for kind in KINDS]
LIMIT_S = 600 + COUNT  # far more than a quiet machine needs


def run(first: int, count: int, *kinds: str) -> None:
    """Run mutations in a child; what ends it early is told with the mutation that did."""
    arguments = [str(first), str(count), *kinds]
    try:
        child = subprocess.run(
            [sys.executable, str(CHILD), *arguments],
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'server'}"},
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=LIMIT_S,
        )
    except subprocess.TimeoutExpired as error:
        last = (error.stdout or b"").decode().splitlines()[-1:]
        pytest.fail(f"not done in {LIMIT_S} s, last was {last}")
    lines = child.stdout.splitlines()
    if child.returncode != 0 or lines[-1:] != ["done"]:
        kind, index = (lines or ["none 0"])[-1].split()
        again = f"PYTHONPATH=.:tests/server python tests/fuzz/fuzz_child.py {index} 1 {kind}"
        pytest.fail(f"status {child.returncode}: {again}\n{child.stderr[-4000:]}", pytrace=False)


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S + 10)
@pytest.mark.parametrize("kinds", GROUPS, ids="+".join)
def test_any_damage_is_refused_by_an_error_of_ours(kinds: tuple[str, ...]) -> None:
    run(0, COUNT, *kinds)
