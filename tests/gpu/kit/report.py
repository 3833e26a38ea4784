"""Puts the outcome of run.sh into one file, <card>-<commit>.json, in its folder of results.

run.sh, after every stage:  report.py OUT LOGS COMMIT
Without a GPU there is no card, and no file.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET


def table(path: Path) -> list[list[str]]:
    """Return the fields of a file of tabs; empty if it is not there."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return [line.split("\t") for line in lines]


def tests(paths: list[Path]) -> dict[str, Any]:
    """Return what files of test results say: counts, and the names of what failed."""
    cases, missing = [], []
    for path in paths:
        try:
            cases += ET.parse(path).iter("testcase")
        except (FileNotFoundError, ET.ParseError) as error:  # not run, or killed
            missing.append(f"{path.stem}: {error}")
    cases = [c for c in cases if c.get("status") != "notrun"]
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = [c for c in cases if c.find("skipped") is not None]
    return {
        "run": len(cases) - len(skipped),
        "skipped": len(skipped),
        "failed": [f"{c.get('classname')}.{c.get('name')}" for c in failed],
        "missing": missing,
    }


def main() -> int:
    """Write the file if the benches named a card."""
    out, logs, commit = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    names = (
        "model_bench", "fp8_bench", "peer_bench", "goodput",
        "cpu_figures", "cpu_figures_avx512", "cpu_peers", "cpu_peers_two",
    )  # fmt: skip
    model, fp8, peer, goodput, cpu, cpu_avx512, cpu_peers, cpu_peers_two = (
        json.loads(path.read_text()) if path.exists() else {}
        for path in (logs / f"{name}.json" for name in names)
    )
    kernels = table(logs / "kernels.log")
    named = [row[1] for row in kernels if row[0] == "device" and len(row) > 1]
    listed = table(logs.parent / "tests")
    engine = goodput.get("settings", {}).get("engine") or {}
    cards = [report["gpu"]["name"] for report in (model, fp8, peer) if report]
    card = [*named, *cards, engine.get("gpu", "")][0]
    if not card:
        return 0
    report = {
        "card": card,
        "commit": commit,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "stages": table(out / "summary.tsv"),
        "tests": {
            "gpu_test": tests([logs / "gpu_test" / f"{row[0]}.xml" for row in listed]),
            "pytest": tests([logs / "pytest.xml", logs / "alone.xml"]),
            "cpu": tests([logs / "cpu_pytest.xml"]),
        },
        "cpu": cpu,
        "cpu_without_amx": cpu_avx512,
        "cpu_peers": cpu_peers,
        "cpu_peers_two": cpu_peers_two,
        "model": model,
        "model_fp8": fp8,
        "peer": peer,
        "goodput": goodput,
        "kernels": kernels,
        "ceilings": table(logs / "ceilings.log"),
    }
    name = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    (out / f"{name}-{commit}.json").write_text(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
