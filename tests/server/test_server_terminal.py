"""Commands whose streams are closed, full or of an encoding that lacks characters; signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from fake_engine import WAIT_S

from flowprefill import cli

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "flowprefill"]


def shell(text: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a line of sh in which $F is the command; stdout buffered, as in a shell's pipe."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    environment |= {"F": " ".join(COMMAND), **variables}
    return subprocess.run(
        ["sh", "-c", text], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )


@pytest.mark.parametrize(
    ("line", "status", "error"),
    [
        ("$F --version >&-", 0, ""),
        ("$F serve --port x >&- 2>&-", 2, ""),
        ("$F generate <&-", 2, "prompt: empty"),
        ("$F simulate --profiles > /dev/full", 1, "No space left on device"),
        ("$F explain --url http://127.0.0.1:x", 2, "--url: got 'http://127.0.0.1:x'"),
        ("$F explain --url http://127.0.0.1:9", 1, "/debug/requests: Connection refused"),
    ],
)
def test_any_stream_may_be_closed_or_full(line: str, status: int, error: str) -> None:
    done = shell(line)
    assert (done.returncode, done.stdout) == (status, "")
    assert error in done.stderr
    assert done.stderr.count("\n") == bool(error), done.stderr


def test_text_that_the_encoding_lacks_is_escaped() -> None:
    code = (
        "from flowprefill import cli; "
        "cli.run_generate = lambda args: print(args.prompt) or 0; "
        "import sys; sys.exit(cli.main(['generate', 'caf\\xe9']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, cwd=ROOT, check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, b"caf\\xe9\n")


def test_key_that_no_header_carries_is_not_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWPREFILL_API_KEY", "secret\n")
    assert cli.main(["explain"]) == 2
    error = capsys.readouterr().err
    assert "FLOWPREFILL_API_KEY: got 7 characters" in error
    assert "secret" not in error


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, b"[]"), (200, b'{"requests": [1]}'), (200, b"nothing"), (200, b"[" * 100_000),
        (400, b'{"error": '), (400, b"[" * 100_000), (500, b'{"error": "no object"}'),
    ],
)  # fmt: skip
def test_explain_of_another_server_is_one_line(
    capsys: pytest.CaptureFixture[str], status: int, body: bytes
) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            if status != 200:
                self.send_header("Content-Length", "200000")  # of which not all comes
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        try:
            told = cli.main(["explain", "--url", f"http://127.0.0.1:{other.server_port}"])
            assert told == (1 if status == 200 else 2)
        finally:
            other.shutdown()
            thread.join()
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signal_to_a_bench_ends_its_server_too(tmp_path: Path, number: signal.Signals) -> None:
    told = tmp_path / "told.json"
    code = f"""
import json, signal, subprocess, sys, time
from pathlib import Path
signal.signal({int(number)}, signal.SIG_DFL)  # nohup has it ignored in all that it starts
from flowprefill import cli
from flowprefill.bench import http_client

start = subprocess.Popen
def sleeping(command, **options):
    child = start([sys.executable, "-c", "import time; time.sleep(600)"], **options)
    http_client._wait_until_ready = lambda *_: "http://127.0.0.1:9"
    return child
http_client.subprocess.Popen = sleeping

def run(args):
    with http_client.server_process("m", {{}}) as server:
        told = Path({str(told)!r})
        draft = told.with_suffix(".new")
        draft.write_text(json.dumps([server.pid, str(server.log)]))
        draft.replace(told)
        time.sleep(600)

cli.run_generate = run
sys.exit(cli.main(["generate"]))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    while not told.exists():
        assert process.poll() is None
        threading.Event().wait(0.01)
    server, log = json.loads(told.read_text())
    process.send_signal(number)
    assert process.wait(WAIT_S) == 128 + number
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)
    assert not Path(log).parent.exists()
