"""`bench compare`: rows are paired by what they measured, numbers become ratios."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flowprefill.bench.compare import differences, ratios
from flowprefill.cli import main


def report(rows: list[dict[str, Any]], **machine: Any) -> dict[str, Any]:
    return {"bench": "prefill", "commit": "a", "machine": machine, "settings": {}, "rows": rows}


def test_rows_are_paired_by_text_and_sizes_and_other_numbers_become_ratios() -> None:
    old = [{"rival": "x", "tokens": 128, "rate": 100.0}, {"rival": "x", "tokens": 512, "rate": 50}]
    new = [
        {"rival": "x", "tokens": 512, "rate": 75.0, "more": 1.0},
        {"rival": "x", "tokens": 128, "rate": None},
        {"rival": "y", "tokens": 512, "rate": 1.0},
    ]
    assert list(ratios(old, new)) == [
        {"row": "x 512", "field": "rate", "old": 50, "new": 75.0, "ratio": 1.5}
    ]


def test_a_number_that_was_zero_has_no_ratio() -> None:
    assert next(ratios([{"a": "x", "n": 0}], [{"a": "x", "n": 3}]))["ratio"] is None


def test_other_machine_and_settings_are_said_but_not_other_loads() -> None:
    old = report([], processor="one", load_before=[1.0])
    new = report([], processor="two", load_before=[2.0]) | {"settings": {"seed": 3}}
    assert list(differences(old, new)) == [
        "machine.processor: one against two",
        "settings.seed: None against 3",
    ]


def test_compare_prints_ratios_and_writes_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = []
    for name, rate in (("old", 100.0), ("new", 90.0)):
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(report([{"tokens": 128, "rate": rate}])))
    out = tmp_path / "ratios.json"
    assert main(["bench", "compare", *map(str, files), "--json", str(out)]) == 0
    assert "0.90" in capsys.readouterr().out
    assert json.loads(out.read_text())["rows"][0]["ratio"] == 0.9


@pytest.mark.parametrize(
    "text",
    [
        "no json", "[]", "{}", '{"rows": []}', '{"bench": "hol", "rows": [1]}',
        '{"bench": "hol", "rows": [], "machine": 5}', '{"bench": 1, "rows": []}', "[" * 100_000,
    ],
    ids=range(8),
)  # fmt: skip
def test_what_is_no_report_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    assert main(["bench", "compare", str(path), str(path)]) == 2
    assert "other.json" in capsys.readouterr().err
