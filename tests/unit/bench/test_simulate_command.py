"""`flowprefill simulate` as a command: rows, profiles, a trace file, and refused flags."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from flowprefill.bench import simulate_check
from flowprefill.bench.ablation import CHANGES, DECODING
from flowprefill.cli import main
from flowprefill.config import Granularity
from flowprefill.scheduling.cost_model import attention_pairs
from flowprefill.simulation import Profile, WorkCosts
from flowprefill.simulation.measured import fitted
from flowprefill.traces import Trace, TraceRequest


def simulated(tmp_path: Path, *flags: str) -> dict[str, Any]:
    path = tmp_path / "report.json"
    assert main(["simulate", *flags, "--json", str(path)]) == 0
    report: dict[str, Any] = json.loads(path.read_text())
    return report


def test_command_gives_rows_of_each_class_and_of_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--requests", "300", "--rate", "6", "--rate", "9", "--seed", "4")
    several = ("--policy", "slack_edf", "--policy", "fcfs", "--granularity", "budget:2")
    report = simulated(tmp_path, *flags, *several)
    rows = report["rows"]
    assert len(rows) == 2 * 2 * (4 + 1)
    whole = [row for row in rows if row["service_class"] == "all"]
    assert [row["requests"] for row in whole] == [300] * 4
    ours, theirs = (
        next(r for r in whole if r["policy"] == policy and r["rate_rps"] > 8)
        for policy in ("slack_edf", "fcfs")
    )
    assert ours["attainment"] > theirs["attainment"]
    assert theirs["preemptions"] == 0 < ours["preemptions"]
    assert "A800" in report["settings"]["source"]
    assert "slack_edf+budget:2" in capsys.readouterr().out


def test_command_ablates_each_constant_alone_and_puts_it_back(tmp_path: Path) -> None:
    flags = ("--requests", "120", "--rate", "14", "--ablate", "2")
    found = simulated(tmp_path, *flags)["rows"]
    of_prefills = (len(one.values) for one in CHANGES if one.name not in DECODING)
    assert len(found) == 1 + sum(of_prefills)
    few = ("--requests", "4", "--role", "mixed", "--ablate", "2")
    decoding = simulated(tmp_path, *few)["rows"]
    assert len(decoding) == 1 + sum(len(change.values) for change in CHANGES)
    rows = {row["change"]: row for row in found}
    assert rows["nothing"]["difference"] == 0.0
    more = rows["no time for arrivals"]["attainment"] - rows["nothing"]["attainment"]
    assert rows["no time for arrivals"]["difference"] == pytest.approx(more)
    assert len({(row["attainment"], row["ttft_p99_s"]) for row in found}) > 5
    assert simulated(tmp_path, *flags)["rows"][0] == rows["nothing"]


def test_command_same_seed_same_rows(tmp_path: Path) -> None:
    flags = ("--requests", "100", "--noise", "0.3", "--workers", "3", "--rate", "18")
    rows = [simulated(tmp_path, *flags)["rows"] for _ in range(2)]
    for each in rows:
        for row in each:
            row.pop("simulated_per_s", None)
    assert rows[0] == rows[1]


def test_command_reads_a_trace_and_scales_it(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    row = {"input_length": 1000, "output_length": 5, "type": "text"}
    lines = [json.dumps(row | {"timestamp": 0.5 * n}) for n in range(9)]
    path.write_text("\n".join(lines) + "\n")
    flags = ("--trace", str(path), "--length-scale", "0.5", "--profile", "llama-3.1-8b@h100")
    (whole,) = simulated(tmp_path, *flags, "--role", "mixed")["rows"]
    costs = WorkCosts(Profile.load("llama-3.1-8b@h100"), Granularity.parse("budget:2"))
    assert whole["rate_rps"] == pytest.approx(2.0)
    expected = costs.prefill_s(500, attention_pairs(500, 0))
    assert whole["ttft_p50_s"] == pytest.approx(expected, rel=0.02)


def test_command_lists_the_profiles(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--profiles"]) == 0
    shown = capsys.readouterr().out
    assert "data sheet" in " ".join(shown.split())
    for name in ("llama-3.1-8b", "a800"):  # each once, not with each of the others
        assert len(re.findall(rf"^│ {name} ", shown, re.MULTILINE)) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--rate", "0"), "rate: got 0.0"),
        (("--requests", "1"), "requests: got 1"),
        (("--workers", "0"), "workers: got 0"),
        (("--length-scale", "nan"), "length_scale: got nan, expected a number > 0"),
        (("--slo-scale", "0"), "slo_scale: got 0.0"),
        (("--noise", "-1"), "noise: got -1.0"),
        (("--granularity", "word"), "granularity: got 'word'"),
        (("--profile", "word"), "profile: got 'word'"),
        (("--trace", "/nowhere.jsonl"), "trace: got '/nowhere.jsonl', expected a file"),
        (("--role", "decode", "--router", "two_choices"), "predicts first tokens"),
        (("--json", "/nowhere/x.json"), "--json: got '/nowhere/x.json'"),
    ],
)
def test_command_bad_flag_is_named(
    flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", *flags]) == 2
    assert message in capsys.readouterr().err


def test_fit_finds_the_machine_that_was_measured() -> None:
    base = Profile.load("smollm2-135m@zen5x2")
    cut = Granularity.parse("budget:2")
    rates = base.rates
    truth = base.with_rates(
        gemm_flops_per_s=rates.gemm_flops_per_s / 1.5,
        weight_bytes_per_s=rates.weight_bytes_per_s / 1.5,
        attention_flops_per_s=rates.attention_flops_per_s / 2.0,
        run_overhead_s=rates.run_overhead_s * 3.0,
    )
    costs = WorkCosts(truth, cut)
    lengths = (20, 80, 300, 1000, 3000)
    measured = [(n, costs.prefill_s(n, attention_pairs(n, 0))) for n in lengths]
    found = WorkCosts(fitted(base, cut, measured), cut)
    for tokens, seconds in measured:
        assert found.prefill_s(tokens, attention_pairs(tokens, 0)) == pytest.approx(
            seconds, rel=0.03
        )
    with pytest.raises(ValueError, match="three lengths or more"):
        fitted(base, cut, measured[:2])


def test_spread_is_that_of_the_noise() -> None:
    rng = random.Random(2)
    measured = [(n, n * rng.lognormvariate(0.0, 0.2)) for n in (10, 100) for _ in range(200)]
    assert simulate_check.spread_of(measured) == pytest.approx(0.2, rel=0.1)
    assert simulate_check.spread_of([(10, 1.0), (100, 2.0)]) == 0.0


def test_check_row_compares_request_by_request() -> None:
    requests = tuple(TraceRequest(0.1 * n, 100, ttft_s=1.0) for n in range(4))
    row = simulate_check.row_of(
        "x", Trace("t", requests), [0.5, 0.5, 2.0, float("inf")], [0.5, 0.6, 0.9, 3.0]
    )
    assert (row["engine_attainment"], row["attainment"]) == (0.5, 0.75)
    assert row["difference"] == pytest.approx(25.0)
    assert row["ttft_error"] == pytest.approx(0.2)
