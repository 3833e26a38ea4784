"""`flowprefill bench load --url`: a server that already runs is measured as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from running_server import RunningServer, StartServer

from flowprefill import cli

FEW = ("--requests", "6", "--rate", "0", "--cancelled", "0")


def test_running_server_gets_objectives_and_is_reported(
    server: RunningServer, engine: FakeEngine, tmp_path: Path
) -> None:
    file = tmp_path / "load.json"
    assert cli.main(["bench", "load", "--url", server.url, *FEW, "--json", str(file)]) == 0
    assert len(engine.submitted) == 6
    assert {handle.slo.ttft for handle in engine.submitted} <= {0.5, 4.0, 30.0}
    report = json.loads(file.read_text())
    assert report["settings"]["model"] == "fake-model"
    assert report["settings"]["url"] == server.url
    total = report["rows"][-1]
    assert (total["service_class"], total["requests"], total["failed"]) == ("all", 6, 0)
    assert (total["policy"], total["granularity"]) == (engine.config.policy, "auto")


def test_running_server_with_tenants_gets_the_key(start_server: StartServer) -> None:
    engine = FakeEngine()
    server = start_server(engine, tenants={"team": {"key": "secret-key-of-the-team"}})
    flags = ["bench", "load", "--url", server.url, *FEW]
    assert cli.main([*flags, "--api-key", "secret-key-of-the-team"]) == 0
    assert len(engine.submitted) == 6


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        (("--url", "http://127.0.0.1:9"), 1, "9/server_info: Connection refused"),
        (("--url", "nowhere"), 2, "url: got 'nowhere', expected http://HOST:PORT"),
        (("--url", ""), 2, "url: got '', expected http://HOST:PORT"),
        (("--url", "http://127.0.0.1:9", "--policy", "edf"), 2, "with --policy or --granularity"),
    ],
)
def test_bad_url_is_one_line(
    capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], status: int, words: str
) -> None:
    assert cli.main(["bench", "load", *flags]) == status
    assert words in capsys.readouterr().err
