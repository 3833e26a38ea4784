"""OpenAI's client for node: `node_client.mjs` asks, this says what must hold."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

PACKAGE = "openai@6"
SCRIPT = Path(__file__).with_name("node_client.mjs")
needs_node = pytest.mark.skipif(
    not (shutil.which("node") and shutil.which("npm")), reason="node and npm are not installed"
)


@pytest.fixture(scope="module")
def answers(url: str, model: str) -> dict[str, Any]:
    folder = Path.cwd() / "node"  # in the environment of this client
    folder.mkdir(exist_ok=True)
    if not (folder / "node_modules/openai").exists():
        subprocess.run(
            ["npm", "install", "--silent", "--no-audit", "--no-fund", PACKAGE],
            cwd=folder, check=True, timeout=300,
        )  # fmt: skip
    shutil.copy(SCRIPT, folder)
    environment = {**os.environ, "URL": f"{url}/v1", "MODEL": model}
    done = subprocess.run(
        ["node", SCRIPT.name], cwd=folder, env=environment, check=False, timeout=300,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@needs_node
def test_chat_whole_and_streamed_agree(answers: dict[str, Any]) -> None:
    assert answers["whole"] == answers["streamed"] != ""


@needs_node
def test_tool_and_schema(answers: dict[str, Any]) -> None:
    for text in (answers["tool"], answers["schema"]):
        assert set(json.loads(text)) == {"city", "unit"}


@needs_node
def test_responses(answers: dict[str, Any]) -> None:
    assert answers["response"] == answers["response_streamed"] != ""


@needs_node
def test_error_and_abort(answers: dict[str, Any]) -> None:
    assert answers["error"] == [400, "temperature"]
    assert answers["aborted"] is True
