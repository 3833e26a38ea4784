"""`make soak`: hours of mixed requests against one server process; nothing may grow or get lost.

    python tests/soak/soak.py --seconds 7200 --json out/soak.json

Some clients send one random request after another; every half minute comes a burst that the queue
cannot hold. Ends with status 1 and says what was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import statistics
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from traffic import Tally, Traffic

from flowprefill.bench.http_client import ServerProcess, server_process
from flowprefill.bench.report import Report, print_table
from flowprefill.bench.statistics import percentile

SETTINGS = {"kv_cache_gib": 0.12, "max_waiting": 32, "server": {"write_timeout_s": 10}}
CLIENTS, BURST, BURST_EVERY_S = 6, 80, 30.0
SAMPLE_EVERY_S, HEALTH_EVERY_S = 2.0, 0.2
LIMITS = {"rss_growth_mib": 32.0, "more_files": 8, "more_threads": 4}
LOG_LINES = (100, 0.05)  # and so many for each request: clients that leave are logged
COLUMNS = {"quantity": "", "value": "value", "allowed": "allowed", "is_right": "right"}


@dataclass(frozen=True, slots=True)
class Sample:
    """What the kernel says of the server's process at one moment."""

    at_s: float
    rss_mib: float
    files: int
    threads: int


def sample(server: ServerProcess, start_s: float) -> Sample:
    """Look at the server's process."""
    folder = Path(f"/proc/{server.pid}")
    status = (folder / "status").read_text()
    found = {key: int(re.search(rf"{key}:\s+(\d+)", status)[1]) for key in ("VmRSS", "Threads")}  # type: ignore[index]
    return Sample(
        time.monotonic() - start_s, found["VmRSS"] / 1024, len([*(folder / "fd").iterdir()]),
        found["Threads"],
    )  # fmt: skip


async def soak(
    server: ServerProcess, seconds: float, seed: int, tally: Tally
) -> tuple[list[Sample], list[float]]:
    """Send requests for some time; returns the samples, and how long each GET /health took."""
    start_s = time.monotonic()
    samples: list[Sample] = []
    health_s: list[float] = []
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(server.url, connector=connector, timeout=timeout) as session:

        async def repeat(every_s: float, do: Callable[[], Any], at_once: bool = True) -> None:
            if not at_once:
                await asyncio.sleep(every_s)
            while time.monotonic() - start_s < seconds:
                await do()
                await asyncio.sleep(every_s)

        async def look() -> None:
            samples.append(sample(server, start_s))

        async def ask_health() -> None:
            asked_s = time.monotonic()
            async with session.get("/health") as reply:
                if reply.status != 200:
                    tally.fault("health", f"HTTP {reply.status}")
            health_s.append(time.monotonic() - asked_s)

        traffic = Traffic(session, random.Random(seed), tally)

        async def burst() -> None:
            await asyncio.gather(*(traffic.one() for _ in range(BURST)))

        await asyncio.gather(
            *(repeat(0.0, traffic.one) for _ in range(CLIENTS)),
            repeat(BURST_EVERY_S, burst, at_once=False),
            repeat(SAMPLE_EVERY_S, look),
            repeat(HEALTH_EVERY_S, ask_health),
        )
    return samples, health_s


def metric(url: str, name: str) -> float:
    """Sum of one metric's samples on /metrics."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as reply:
        text = reply.read().decode()
    found = re.findall(rf"^flowprefill:{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
    return sum(map(float, found))


def wait_until_empty(url: str) -> dict[str, float]:
    """Wait until no request lives; returns what is left, all 0 if nothing is."""
    gauges = ("num_requests_running", "num_requests_waiting", "num_requests_suspended",
              "num_requests_held", "kv_cache_usage_perc", "workspace_bytes")  # fmt: skip
    for _ in range(120):
        left = {name: metric(url, name) for name in gauges}
        if not any(left.values()):
            break
        time.sleep(0.5)
    return left


def growth(samples: list[Sample], of: str) -> float:
    """Median of the last quarter less that of the third: what chance adds is in both."""
    values = [getattr(one, of) for one in samples]
    quarter = max(len(values) // 4, 1)
    return statistics.median(values[-quarter:]) - statistics.median(values[-2 * quarter : -quarter])


def judge(
    samples: list[Sample], last: Sample, left: dict[str, float], log_lines: int, tally: Tally
) -> list[dict[str, Any]]:
    """Return a row for each thing that must hold."""
    middle = samples[len(samples) // 4 :]
    rows = [
        ("faults", len(tally.wrong), 0),
        ("resident memory, last quarter over third, MiB", growth(samples, "rss_mib"),
         LIMITS["rss_growth_mib"]),
        ("open files at the end, more than at the start", last.files - samples[0].files,
         LIMITS["more_files"]),
        ("threads at the end, more than after a quarter", last.threads - middle[0].threads,
         LIMITS["more_threads"]),
        ("lines of log", log_lines, LOG_LINES[0] + LOG_LINES[1] * sum(tally.kinds.values())),
        *((f"left at the end: {name}", value, 0) for name, value in left.items()),
    ]  # fmt: skip
    return [
        {"quantity": name, "value": value, "allowed": allowed, "is_right": value <= allowed}
        for name, value, allowed in rows
    ]


def main() -> int:
    """Run, print the table, write the JSON; returns 1 if something does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=7200.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    tally = Tally()
    report = Report("soak", {"seconds": args.seconds, "seed": args.seed, "server": SETTINGS})
    with server_process("smollm2-135m", SETTINGS, "info") as server:
        samples, health_s = asyncio.run(soak(server, args.seconds, args.seed, tally))
        left = wait_until_empty(server.url)
        last = sample(server, time.monotonic() - samples[-1].at_s)
        ended = metric(server.url, "requests_total")
        lines = server.log.read_text(errors="replace").splitlines()
    report.rows = judge(samples, last, left, len(lines), tally)
    facts = {
        "requests_by_kind": dict(tally.kinds),
        "outcomes": dict(tally.outcomes),
        "requests_ended_in_the_engine": ended,
        "health_p50_s": percentile(health_s, 0.5),
        "health_p99_s": percentile(health_s, 0.99),
        "health_max_s": max(health_s),
        "rss_mib_first_and_last": [samples[0].rss_mib, last.rss_mib],
        "wrong": tally.wrong,
    }
    report.extra = {**facts, "samples": [[s.at_s, s.rss_mib, s.files, s.threads] for s in samples]}
    print_table(f"Soak of {args.seconds:.0f} s", report.rows, COLUMNS)
    for name, value in facts.items():
        print(f"{name}: {value}")
    if not report.rows[4]["is_right"]:
        print("last lines of the log:", *lines[-20:], sep="\n")
    report.write(args.json)
    return int(not all(row["is_right"] for row in report.rows))


if __name__ == "__main__":
    sys.exit(main())
