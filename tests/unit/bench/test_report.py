"""The JSON every bench writes: one object that others can read, without NaN."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path

import pytest

from flowprefill.bench import report
from flowprefill.bench.report import Report, commit, json_path, print_table

MACHINE = {"processor": "made up", "cores_available": 2}


def test_report_written_has_machine_commit_command_and_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/flowprefill", "bench", "hol", "--seed", "2"])
    monkeypatch.setattr(sys, "orig_argv", ["python", *sys.argv])
    made = Report("hol", {"rounds": 3}, machine=dict(MACHINE))
    made.rows.append({"granularity": "none", "short_beside_p50_s": 1.5, "blocking_max_s": math.nan})
    made.extra["peak"] = math.inf
    made.write(tmp_path / "out.json")
    read = json.loads((tmp_path / "out.json").read_text())
    assert read["rows"] == [
        {"granularity": "none", "short_beside_p50_s": 1.5, "blocking_max_s": None}
    ]
    assert read["machine"].items() >= MACHINE.items()
    assert len(read["machine"]["load_before"]) == len(read["machine"]["load_after"]) == 3
    assert read["command"] == "flowprefill bench hol --seed 2"
    assert read["settings"] == {"rounds": 3}
    assert read["peak"] is None
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", read["started"])


def test_command_of_a_module_is_shown_as_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = ["/usr/bin/python3", "-m", "flowprefill.bench.demo", "--out", "a b"]
    monkeypatch.setattr(sys, "orig_argv", typed)
    assert report.command() == "python -m flowprefill.bench.demo --out 'a b'"


def test_commit_is_a_hash_or_the_version() -> None:
    assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?|version \S+", commit())


def test_commit_outside_of_a_checkout_is_the_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "SOURCES", tmp_path)
    assert commit().startswith("version ")


def test_machine_says_what_timings_depend_on() -> None:
    found = report.machine()
    assert found["processor"]
    assert found["cores_available"] >= 1
    assert found["memory_gib"] > 0
    assert found["torch"]


def test_json_path_in_a_missing_folder_is_refused_before_measuring(tmp_path: Path) -> None:
    assert json_path(str(tmp_path / "x.json")) == tmp_path / "x.json"
    for text in (str(tmp_path / "none" / "x.json"), str(tmp_path)):
        with pytest.raises(
            argparse.ArgumentTypeError, match="expected a file in an existing folder"
        ):
            json_path(text)


def test_report_that_cannot_be_written_is_told_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report.os, "access", lambda path, _: path != tmp_path)  # root may all
    with pytest.raises(argparse.ArgumentTypeError, match="expected a file that may be written"):
        json_path(str(tmp_path / "x.json"))
    (tmp_path / "y.json").touch()
    assert json_path(str(tmp_path / "y.json")) == tmp_path / "y.json"


def test_table_shows_seconds_as_milliseconds(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"name": "a", "time_s": 0.0123, "share": 0.5, "rate": 1234.5, "none": None}]
    columns = {"name": "name", "time_s": "t ms", "share": "%", "rate": "r", "none": "n"}
    print_table("Title", rows, columns)
    shown = capsys.readouterr().out
    for text in ("Title", "12.3", "50.0", "1,234", "-"):
        assert text in shown
