"""The README's tables of figures are those of the reports that they name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
UNITS = {"s": 1.0, "ms": 1e-3, "%": 1e-2}


def rows_of(section: str) -> dict[str, list[str]]:
    """Return the rows of the README's table behind a word in bold: first cell -> the others.

    Of a first cell with words in code these alone, joined by `+`.
    """
    text = (ROOT / "README.md").read_text()
    text = text[text.index(f"**{section}") :]
    lines = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert lines is not None
    rows = {}
    for line in lines[0].splitlines()[2:]:
        name, *cells = (cell.strip().strip("*") for cell in line.strip("|").split("|"))
        rows["+".join(re.findall("`(.*?)`", name)) or name] = [cell.strip("* ") for cell in cells]
    return rows


def assert_says(cell: str, value: float) -> None:
    """Hold a cell such as `2.4 ms`, `107 %` or `1.44 x` to a report's value, to its last digit."""
    shown, _, unit = cell.replace(",", "").partition(" ")
    wanted = value / UNITS.get(unit, 1.0)
    digits = len(shown.partition(".")[2])
    assert abs(float(shown) - wanted) <= 0.5001 * 10**-digits, (cell, value)


def report(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return found


def test_waiting_is_that_of_the_report() -> None:
    table = rows_of("Waiting.")
    fields = ("short_alone_p50_s", "short_beside_p50_s", "short_beside_p99_s", "blocking_p99_s",
              "throughput_vs_none")  # fmt: skip
    for row in report("cpu/hol.json")["rows"]:
        cells = table[row["granularity"]]
        for cell, field in zip(cells, fields, strict=True):
            assert_says(cell, row[field])


def test_speed_is_that_of_the_report() -> None:
    rates = {
        (row["work"], row["engine"]): row["tokens_per_s"]
        for row in report("cpu/peers.json")["rows"]
    }
    table = rows_of("Speed.")
    assert len(table) == 6
    for name, cells in table.items():
        kind, of, number, *_ = name.replace(",", "").split()
        work = f"prefill {number}" if kind == "prefill" else f"{kind} {of} {number}"
        ours, openvino, over_openvino, transformers, over_transformers = cells
        mine = rates[work, "flowprefill"]
        assert_says(ours, mine)
        assert_says(openvino, rates[work, "openvino-genai"])
        assert_says(transformers, rates[work, "transformers"])
        assert_says(over_openvino, mine / rates[work, "openvino-genai"])
        assert_says(over_transformers, mine / rates[work, "transformers"])


def test_goodput_is_that_of_the_reports() -> None:
    table = rows_of("Goodput.")
    whole, resamples = report("cpu/goodput.json"), report("cpu/goodput-resamples.json")
    again = {row["setting"]: row["rates_rps"] for row in resamples["rows"]}
    blocking = {row["setting"]: row["blocking_p99_s"] for row in whole["at_one_rate"]["rows"]}
    for row in whole["rows"]:
        setting = row["setting"]
        _, rate, others, blocked = table[setting]
        assert_says(rate, row["max_rate_rps"])
        for cell, value in zip(others.split(", "), again.get(setting, []), strict=False):
            assert_says(cell, value)
        if blocked:
            assert_says(blocked, blocking[setting])


@pytest.mark.parametrize(
    ("row", "name"),
    [("simulated", "qwen-12-samples"), ("the same with decode", "qwen-with-decode")],
)
def test_simulated_goodput_is_that_of_the_reports(row: str, name: str) -> None:
    settings = ("fcfs+none", "slack_edf+chunk:512", "s_edf_paper+operator", "slack_edf+budget:2")
    text = (ROOT / "README.md").read_text()
    found = re.search(rf"^\| {row}.*\n\| ours over it.*$", text, re.MULTILINE)
    assert found is not None
    rates, ratios = (line.strip("|").split("|")[1:] for line in found[0].splitlines())
    rows = {one["setting"]: one for one in report(f"simulation/{name}.json")["rows"]
            if one["target"] == 0.9}  # fmt: skip
    for setting, rate, ratio in zip(settings, rates, ratios, strict=True):
        assert_says(rate.strip(" *"), rows[setting]["max_rate_rps"])
        shown = re.findall(r"[\d.]+", ratio)
        fields = ("ours_over", "ours_over_low", "ours_over_high")
        for cell, field in zip(shown, fields, strict=bool(shown)):
            assert_says(cell, rows[setting][field])
