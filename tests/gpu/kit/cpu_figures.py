"""What the CPU engine reaches on this machine, next to what the processor can: run.sh's stage cpu.

cpu_figures.py OUT.json LIMIT_S: the ceilings, then prefill and decode of smollm2-135m's shape in
bf16 and int8, by all cores and by two, in order of value until LIMIT_S is over. OUT.json is written
anew after each, so that a killed run leaves what was done. FLOWPREFILL_ISA chooses as everywhere.
cpu_figures.py ceilings: the ceilings alone, as JSON, by a process whose end is not the rest's.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from flowprefill.bench.doctor import ceilings, system_findings
from flowprefill.cli import main as flowprefill
from flowprefill.native import _core

TOKENS = ("128", "512", "2048", "7500")
CORES = len(os.sched_getaffinity(0))
THREADS = sorted({CORES, min(2, CORES)}, reverse=True)
LEAST_S = 4.0  # with less left, no bench is begun


def bench(log: Path, name: str, *flags: str) -> dict[str, Any]:
    """Return the report of one bench, run in this process: torch is imported once."""
    with contextlib.ExitStack() as stack:
        said = stack.enter_context(log.open("a"))
        stack.enter_context(contextlib.redirect_stdout(said))
        stack.enter_context(contextlib.redirect_stderr(said))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        path = Path(folder) / "report.json"
        code = flowprefill(
            ["bench", name, "--device", "cpu", "--rounds", "1", *flags, "--json", str(path)]
        )
        if code:
            raise RuntimeError(f"bench {name} {' '.join(flags)}: status {code}")
        report: dict[str, Any] = json.loads(path.read_text())
        return report


def measured_ceilings() -> dict[str, Any]:
    """Return the ceilings; empty: their process has failed."""
    command = [sys.executable, "-X", "faulthandler", __file__, "ceilings"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        print(f"ceilings: status {done.returncode}")
        return {}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def compact(report: dict[str, Any]) -> dict[str, Any]:
    """Return a report's rows and the peak that their shares are of."""
    extra = report.get("extra", report)
    return {
        "peak": extra.get("peak_flops_per_s", 0.0),
        "rows": report["rows"],
        "decode_rows": extra.get("decode_rows", []),
    }


def summary(where: dict[str, Any]) -> None:
    """Print tokens per second and shares of the peak, all operators of a prompt together."""
    for tokens in sorted({row["tokens"] for row in where["rows"]}):
        rows = [row for row in where["rows"] if row["tokens"] == tokens]
        took_s = sum(row["seconds"] for row in rows)
        gflops = sum(row["gflops"] * row["seconds"] for row in rows) / took_s
        share = gflops * 1e9 / where["peak"] if where["peak"] else 0.0
        print(f"  {tokens:5} tokens {tokens / took_s:9.0f} tokens/s {gflops:7.0f} GFLOP/s,", end="")
        print(f" {share:.1%} of the unit's peak")
    for row in where["decode_rows"]:
        if row["operators"] == "all":
            rate = row["sequences"] / row["seconds"]
            print(f"  decode of {row['sequences']:2} {rate:9.0f} tokens/s, ", end="")
            print(f"{row['of_read']:.0%} of DRAM")


def main() -> int:
    """Measure, print, write."""
    if sys.argv[1] == "ceilings":
        print(json.dumps(ceilings()))
        return 0
    path, end_s = Path(sys.argv[1]), time.monotonic() + float(sys.argv[2])
    found: dict[str, Any] = {"system": system_findings(), "ceilings": measured_ceilings()}
    isa, log = _core.isa(), path.with_suffix(".log")
    path.write_text(json.dumps(found))
    print(found["system"]["processor"], json.dumps(found["ceilings"]), flush=True)
    for name, more in (("where", ("--decode", "1", "16")), ("prefill", ("--only-flowprefill",))):
        for quantization, kind in (("none", "bf16"), ("int8", "int8")):
            for threads in THREADS:
                if end_s - time.monotonic() < LEAST_S:
                    print("the rest is left out: the time is over")
                    return 0
                began_s = time.monotonic()
                flags = (
                    "--device",
                    "cpu",
                    "--quantization",
                    quantization,
                    "--threads",
                    str(threads),
                )
                of = f"{name} {kind} {threads} threads"
                report = bench(log, name, *flags, "--tokens", *TOKENS, *more)
                found[of] = compact(report)
                path.write_text(json.dumps(found, indent=1))
                print(f"--- {of}, {isa}: took {time.monotonic() - began_s:.1f} s")
                if name == "where":
                    summary(found[of])
                sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
