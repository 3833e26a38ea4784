"""`flowprefill bench overload`: ten times the capacity, and thousands of useless connections.

One server process, whose one class rejects what is predicted late. First the capacity is measured
by clients that wait for each reply; then requests come at random times at a multiple of it. Asked
is how well the admitted were predicted, how soon the others were refused, whether Retry-After was
right, and what memory it took. Then some clients ask in turn while idle, half-open and never
reading connections are held.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import random
import re
import socket
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from flowprefill.bench.common import add_model_arguments, check_least, random_ids, say
from flowprefill.bench.http_client import ServerProcess, server_facts, server_process
from flowprefill.bench.report import Report, Row, json_path, print_table
from flowprefill.bench.statistics import median, quantiles
from flowprefill.server.http.connections import raise_file_limit

CLIENTS = 4  # while the capacity is measured
HALF_OPEN = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Len"
LOAD_COLUMNS = {
    "phase": "phase", "requests": "requests", "admitted": "admitted", "refused": "refused",
    "failed": "failed", "ttft_p50_s": "TTFT p50 ms", "ttft_p99_s": "p99 ms",
    "ttft_over_predicted_p50": "/predicted p50", "ttft_over_predicted_p99": "p99  ",
    "refusal_p50_s": "refusal p50 ms", "refusal_p99_s": "p99 ms ",
    "retry_over_truth_p50": "retry/truth p50", "retry_within_2": "within x2 %",
    "rss_max_mib": "RSS MiB",
}  # fmt: skip


@dataclass(slots=True)
class Answer:
    """How one request went; seconds, on this machine's monotonic clock."""

    sent_s: float
    status: int = 0
    took_s: float = 0.0
    ttft_s: float = math.nan
    predicted_s: float = math.nan
    retry_s: float = math.nan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``flowprefill bench overload``."""
    add_model_arguments(parser)
    parser.add_argument("--times", type=float, default=10.0, help="of the capacity, default 10")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each phase, default 30")
    parser.add_argument("--overload-seconds", type=float, metavar="SECONDS",
                        help="of the phase of overload, default --seconds")  # fmt: skip
    parser.add_argument("--prompt-tokens", type=int, default=256, help="default 256")
    parser.add_argument("--output-tokens", type=int, default=4, help="default 4")
    parser.add_argument("--ttft-ms", type=float, default=2000.0, help="objective, default 2000")
    parser.add_argument("--idle", type=int, default=10_000, help="connections, half of them silent")
    parser.add_argument("--never-reading", type=int, default=500, help="clients, default 500")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--json", type=json_path, metavar="FILE", help="write the report there")


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables, write the JSON."""
    if args.quick:
        args.seconds, args.idle, args.never_reading = 1.0, 100, 5
    if args.overload_seconds is None:
        args.overload_seconds = args.seconds
    for name in ("prompt_tokens", "output_tokens", "seconds", "overload_seconds"):
        check_least(name, getattr(args, name), 1)
    for name, least in (("times", 0.01), ("ttft_ms", 1), ("idle", 0), ("never_reading", 0)):
        check_least(name, getattr(args, name), least)
    check_least("threads", args.threads, 0)
    names = ("model", "times", "seconds", "overload_seconds", "prompt_tokens", "output_tokens",
             "ttft_ms", "idle", "never_reading", "seed")  # fmt: skip
    report = Report("overload", {name: getattr(args, name) for name in names})
    settings = {
        "dtype": args.dtype,
        "threads": args.threads,
        "prefix_cache": False,
        "classes": {"default": {"ttft_ms": args.ttft_ms, "admission": "reject"}},
        "server": {"write_timeout_s": 5.0},
    }
    raise_file_limit()
    with server_process(args.model, settings, "info") as server:
        asyncio.run(measure(server, args, report))
        report.extra["log_lines"] = len(server.log.read_text(errors="replace").splitlines())
    print_table("More than the server can do", report.rows, LOAD_COLUMNS)
    say(f"lines of log: {report.extra['log_lines']}")
    report.write(args.json)
    return 0


async def measure(server: ServerProcess, args: argparse.Namespace, report: Report) -> None:
    """Run the phases in turn and add a row for each."""
    vocab_size = (await asyncio.to_thread(server_facts, server.url)).vocab_size
    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(server.url, connector=connector, timeout=timeout) as session:
        client = Client(session, args, vocab_size)
        say("capacity")
        await client.in_turn(CLIENTS, min(args.seconds, 3.0))  # warm
        alone, rss_mib = await client.watched(server, client.in_turn(CLIENTS, args.seconds))
        report.rows.append(row_of("at capacity", alone, rss_mib))
        rate = sum(one.status == 200 for one in alone) / args.seconds
        report.extra["capacity_per_s"] = rate
        say(f"{args.times:g} times {rate:.1f} requests/s")
        answers, rss_mib = await client.watched(
            server, client.at_rate(max(rate, 0.5) * args.times, args.overload_seconds)
        )
        report.rows.append(row_of("overload", answers, rss_mib))
        few, rss_mib = await client.watched(server, client.in_turn(1, args.seconds))
        report.rows.append(row_of("one client", few, rss_mib))
        say(f"{args.idle} idle or half-open connections, {args.never_reading} that never read")
        with useless_connections(server.url, args.idle, args.never_reading):
            few, rss_mib = await client.watched(server, client.in_turn(1, args.seconds))
        report.rows.append(row_of("among useless", few, rss_mib))


class Client:
    """Sends requests of one kind, with random prompts."""

    def __init__(
        self, session: aiohttp.ClientSession, args: argparse.Namespace, vocab_size: int
    ) -> None:
        self._session, self._args, self._vocab_size = session, args, vocab_size
        self._rng = random.Random(args.seed)

    async def in_turn(self, clients: int, seconds: float) -> list[Answer]:
        """Some clients that each wait for the reply before they ask again."""
        end_s = time.monotonic() + seconds
        answers: list[Answer] = []

        async def ask_on() -> None:
            while time.monotonic() < end_s:
                answers.append(await self._ask(self._body()))

        await asyncio.gather(*(ask_on() for _ in range(clients)))
        return answers

    async def at_rate(self, rate: float, seconds: float) -> list[Answer]:
        """Requests at random times, whatever becomes of the others."""
        waits = [self._rng.expovariate(rate) for _ in range(int(rate * seconds))]
        bodies = [self._body() for _ in waits]
        tasks: list[asyncio.Task[Answer]] = []
        due_s = time.monotonic()
        for wait_s, body in zip(waits, bodies, strict=True):
            due_s += wait_s
            await asyncio.sleep(max(due_s - time.monotonic(), 0.0))
            tasks.append(asyncio.create_task(self._ask(body)))
        return list(await asyncio.gather(*tasks))

    async def watched(self, server: ServerProcess, asking: Any) -> tuple[list[Answer], float]:
        """Await answers; returns them and the most memory the server had meanwhile, MiB."""
        task = asyncio.ensure_future(asking)
        most = resident_mib(server.pid)
        while not (await asyncio.wait({task}, timeout=0.2))[0]:
            most = max(most, resident_mib(server.pid))
        return task.result(), most

    def _body(self) -> bytes:
        ids = random_ids(self._rng, self._args.prompt_tokens, self._vocab_size)
        body = {
            "prompt": ids, "max_tokens": self._args.output_tokens, "temperature": 0,
            "ignore_eos": True, "return_metrics": True,
        }  # fmt: skip
        return json.dumps(body).encode()

    async def _ask(self, body: bytes) -> Answer:
        answer = Answer(time.monotonic())
        headers = {"content-type": "application/json"}
        with contextlib.suppress(aiohttp.ClientError, OSError):
            async with self._session.post("/v1/completions", data=body, headers=headers) as reply:
                told = await reply.json()
                answer.status = reply.status
                if reply.status == 200:
                    answer.ttft_s = told["metrics"]["time_to_first_token_ms"] / 1e3
                    answer.predicted_s = (told["metrics"]["predicted_ttft_ms"] or math.nan) / 1e3
                elif "retry-after-ms" in reply.headers:
                    answer.retry_s = float(reply.headers["retry-after-ms"]) / 1e3
        answer.took_s = time.monotonic() - answer.sent_s
        return answer


def resident_mib(pid: int) -> float:
    """Resident memory of a process, MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+)", status)
    return int(found[1]) / 1024 if found else math.nan


def retry_ratios(answers: Sequence[Answer]) -> list[float]:
    """Return Retry-After over the truth, for each refusal that says when to come back.

    The truth is how long it took until the next request was admitted: all are alike. The refusals
    after the last one that was are left out.
    """
    admitted = sorted(one.sent_s for one in answers if one.status == 200)
    ratios = []
    for refused in answers:
        place = bisect_right(admitted, refused.sent_s)
        if not math.isnan(refused.retry_s) and place < len(admitted):
            ratios.append(refused.retry_s / (admitted[place] - refused.sent_s))
    return ratios


def row_of(phase: str, answers: Sequence[Answer], rss_mib: float) -> Row:
    """Return the row of one phase."""
    admitted = [one for one in answers if one.status == 200]
    refused = [one for one in answers if one.status == 429]
    over = sorted(
        one.ttft_s / one.predicted_s for one in admitted if not math.isnan(one.predicted_s)
    )
    ratios = retry_ratios(answers)
    ratio_quantiles = quantiles("ttft_over_predicted", over, (0.5, 0.99))
    return {
        "phase": phase,
        "requests": len(answers),
        "admitted": len(admitted),
        "refused": len(refused),
        "failed": len(answers) - len(admitted) - len(refused),
        **quantiles("ttft", [one.ttft_s for one in admitted], (0.5, 0.99)),
        **{name.removesuffix("_s"): value for name, value in ratio_quantiles.items()},
        **quantiles("refusal", [one.took_s for one in refused], (0.5, 0.99)),
        "retry_over_truth_p50": median(ratios),
        "retry_within_2": (
            sum(0.5 <= ratio <= 2 for ratio in ratios) / len(ratios) if ratios else math.nan
        ),
        "rss_max_mib": rss_mib,
    }


@contextlib.contextmanager
def useless_connections(url: str, idle: int, never_reading: int) -> Iterator[None]:
    """Hold connections: silent ones, ones with half a request, ones that read no reply."""
    host, _, port = url.removeprefix("http://").partition(":")
    address = (host, int(port))
    body = json.dumps({"prompt": "x", "stream": True, "max_tokens": 1000, "ignore_eos": True})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}"
    asking = f"{head}\r\n\r\n{body}"
    with contextlib.ExitStack() as held:

        def hold(sent: bytes) -> socket.socket:
            connection = held.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(address)
            connection.sendall(sent)
            return connection

        for number in range(idle):
            hold(b"" if number % 2 else HALF_OPEN)
        for number in range(never_reading):
            connection = hold(asking.encode())
            if not number and not (got := connection.recv(15)).startswith(b"HTTP/1.1 200"):
                raise RuntimeError(f"a stream was answered {got!r}, expected HTTP/1.1 200")
        yield
