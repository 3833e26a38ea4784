"""A server in a process of its own, and a client that sends planned requests; for `load`."""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import aiohttp

from flowprefill.bench.arrivals import Planned
from flowprefill.bench.common import random_ids
from flowprefill.client import bearer, server_url, why_no_answer
from flowprefill.errors import FlowPrefillError
from flowprefill.terminal import unwinding_signals

READY = re.compile(r"^serving .* at (http://\S+)$")
STOP_TIMEOUT_S = 30
FACTS_TIMEOUT_S = 10


@dataclass
class Outcome:
    """How one request went, as its client saw it; seconds.

    Attributes:
        late_s: how much later than planned it was sent.
        ttft_s: from sending to the first token; None if there was none.
        token_times_s: when tokens came, after sending.
        status: ``ok``, ``cancelled``, or what was wrong.
    """

    planned: Planned
    late_s: float = 0.0
    token_times_s: list[float] = field(default_factory=list)
    status: str = "ok"

    @property
    def ttft_s(self) -> float | None:
        """From sending to the first token; None if there was none."""
        return self.token_times_s[0] if self.token_times_s else None

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after the first; None with fewer than two."""
        times = self.token_times_s
        return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None

    def meets(self, objectives: Mapping[str, float]) -> bool:
        """Tell whether it was answered within ``ttft_ms`` and ``tpot_ms``, where stated."""
        if self.status != "ok" or self.ttft_s is None:
            return False
        in_time = self.ttft_s * 1e3 <= objectives.get("ttft_ms", float("inf"))
        return in_time and (self.tpot_s or 0.0) * 1e3 <= objectives.get("tpot_ms", float("inf"))


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """A running server: where it listens, its process, and the file of its log."""

    url: str
    pid: int
    log: Path


@contextmanager
def server_process(
    model: str, settings: Mapping[str, Any], log_level: str = "error"
) -> Iterator[ServerProcess]:
    """Start ``flowprefill serve`` on a free port; stops it in the end.

    Raises:
        FlowPrefillError: it ended before it was ready; with its last words.
    """
    with unwinding_signals(), tempfile.TemporaryDirectory() as folder:
        config, file = Path(folder) / "config.json", Path(folder) / "log"
        config.write_text(json.dumps(dict(settings)))
        command = [
            sys.executable, "-m", "flowprefill", "serve", model,
            "--port", "0", "--config", str(config), "--log-level", log_level,
        ]  # fmt: skip
        with file.open("w+", encoding="utf-8", errors="replace") as log:
            process = subprocess.Popen(command, stderr=log, stdin=subprocess.DEVNULL)
            try:
                yield ServerProcess(_wait_until_ready(process, log), process.pid, file)
            finally:
                _stop(process)


@contextmanager
def running_server(model: str, settings: Mapping[str, Any]) -> Iterator[str]:
    """Start ``flowprefill serve`` as server_process does; gives its URL."""
    with server_process(model, settings) as process:
        yield process.url


def _wait_until_ready(process: subprocess.Popen[bytes], log: IO[str]) -> str:
    while True:
        log.seek(0)
        lines = log.read().splitlines()
        for line in lines:
            match = READY.match(line)
            if match:
                return match[1]
        if process.poll() is not None:
            raise FlowPrefillError(f"the server ended early: {' '.join(lines[-3:])}")
        time.sleep(0.05)


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a running server says about itself in ``/server_info``."""

    model: str
    max_model_len: int
    vocab_size: int
    policy: str
    granularity: str


def check_answers(url: str) -> None:
    """Raise FlowPrefillError if no server answers at a URL, whatever it says."""
    try:
        with urllib.request.urlopen(url, timeout=FACTS_TIMEOUT_S):
            pass
    except urllib.error.HTTPError:
        pass
    except (OSError, http.client.HTTPException) as error:
        raise FlowPrefillError(f"{url}: {why_no_answer(error)}") from None


def server_facts(url: str, api_key: str = "") -> ServerFacts:
    """Ask a running server what it serves.

    Raises:
        InvalidRequest: that is no URL or no key.
        FlowPrefillError: there is no server of FlowPrefill at ``url``.
    """
    request = urllib.request.Request(server_url(url) + "/server_info", headers=bearer(api_key))
    try:
        with urllib.request.urlopen(request, timeout=FACTS_TIMEOUT_S) as reply:
            told = json.load(reply)
        settings = told["engine_settings"]
        return ServerFacts(
            str(told["model"]), int(told["max_model_len"]), int(told["vocab_size"]),
            str(settings["policy"]), str(settings["granularity"]),
        )  # fmt: skip
    except OSError as error:
        message = f"url: {url}/server_info: {why_no_answer(error)}"
        raise FlowPrefillError(message, param="url") from None
    except (http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        message = f"url: {url}/server_info: {type(error).__name__}: {error}"
        raise FlowPrefillError(message, param="url") from None


async def send_all(
    url: str, planned: Sequence[Planned], vocab_size: int, seed: int, api_key: str = ""
) -> tuple[list[Outcome], float]:
    """Send every request at its time, whatever became of the others.

    Args:
        vocab_size: prompts are random token ids below it.
        api_key: sent with every request; empty for none.

    Returns:
        The outcomes, in the order planned; seconds from the first sending to the last end.
    """
    rng = random.Random(seed)
    bodies = [_body(one, random_ids(rng, one.prompt_tokens, vocab_size)) for one in planned]
    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        url, connector=connector, timeout=timeout, headers=bearer(api_key)
    ) as session:
        start_s = time.monotonic()
        tasks = [
            asyncio.create_task(_send(session, one, body, start_s))
            for one, body in zip(planned, bodies, strict=True)
        ]
        return list(await asyncio.gather(*tasks)), time.monotonic() - start_s


def _body(planned: Planned, ids: list[int]) -> bytes:
    body = {
        "prompt": ids,
        "max_tokens": planned.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "slo": {"class": planned.service_class} if planned.slo is None else dict(planned.slo),
    }
    return json.dumps(body).encode()


async def _send(
    session: aiohttp.ClientSession, planned: Planned, body: bytes, start_s: float
) -> Outcome:
    outcome = Outcome(planned)
    await asyncio.sleep(max(start_s + planned.at_s - time.monotonic(), 0.0))
    sent_s = time.monotonic()
    outcome.late_s = sent_s - start_s - planned.at_s
    try:
        async with asyncio.timeout(planned.cancel_after_s):
            await _stream(session, body, sent_s, outcome)
    except TimeoutError:
        outcome.status = "cancelled"
    except (aiohttp.ClientError, OSError) as error:
        outcome.status = f"{type(error).__name__}: {error}"
    return outcome


async def _stream(
    session: aiohttp.ClientSession, body: bytes, sent_s: float, outcome: Outcome
) -> None:
    headers = {"content-type": "application/json"}
    async with session.post("/v1/completions", data=body, headers=headers) as response:
        if response.status != 200:
            outcome.status = f"HTTP {response.status}"
            return
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                outcome.status = str(event["error"].get("message", "error"))
            elif event.get("choices"):
                outcome.token_times_s.append(time.monotonic() - sent_s)
