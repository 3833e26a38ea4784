"""Profiles: all built-in ones are whole, say where they come from, and bad files are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flowprefill.config import Granularity
from flowprefill.errors import ConfigError
from flowprefill.simulation import Profile, WorkCosts
from flowprefill.simulation.profile import FOLDER


@pytest.mark.parametrize("name", Profile.names())
def test_profile_built_in_says_its_source_and_plans(name: str) -> None:
    profile = Profile.load(name)
    assert "Shape: config.json" in profile.source
    assert len(profile.source) > 100
    costs = WorkCosts(profile, Granularity.parse("budget:2"))
    assert 0 < costs.prefill_s(500, 125_250.0) < costs.prefill_s(5000, 12_502_500.0)
    assert costs.bounds(5000, 12_502_500.0)[-1] == 1.0


@pytest.mark.parametrize(
    ("name", "tokens", "tokens_per_s"),
    [  # public sums of operator times, in docs/simulation.md
        ("llama-3.1-8b@h100", 2048, 47e3),
        ("llama-3.1-8b@h100", 8192, 41e3),
        ("llama-3.1-8b@h100", 16384, 36e3),
        ("llama-3.1-8b@h100", 32768, 30e3),
        ("llama-3.1-8b@a100", 2048, 16.7e3),
        ("llama-3.1-8b@a100", 8192, 14.6e3),
    ],
)
def test_profile_gives_the_published_prefill_rates(
    name: str, tokens: int, tokens_per_s: float
) -> None:
    costs = WorkCosts(Profile.load(name), Granularity("none"))
    seconds = costs.prefill_s(tokens, tokens * (tokens + 1) / 2)
    assert tokens / seconds == pytest.approx(tokens_per_s, rel=0.1)


def test_profile_mixture_reads_all_experts_in_a_prefill_and_some_in_a_step() -> None:
    profile = Profile.load("qwen3-30b-a3b@h100")
    assert profile.shape.linear_flops_per_token == pytest.approx(2 * 2.7e9, rel=0.1)
    assert profile.shape.weight_bytes == pytest.approx(2 * 29.9e9, rel=0.05)
    assert profile.shape.read_bytes(1) == pytest.approx(
        profile.shape.linear_flops_per_token, rel=0.01
    )
    assert profile.shape.read_bytes(1000) == pytest.approx(profile.shape.weight_bytes)
    costs = WorkCosts(profile, Granularity("none"))
    assert costs.prefill_s(256, 0.0) == pytest.approx(
        profile.shape.weight_bytes / profile.rates.weight_bytes_per_s, rel=0.15
    )


def test_profile_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"got 'gpt@h100'.*llama-3.1-8b.*h200"):
        Profile.load("gpt@h100")


def _file(path: Path, **changes: object) -> str:
    machine = json.loads((FOLDER / "machine-h100.json").read_text()) | changes
    model = json.loads((FOLDER / "model-smollm2-135m.json").read_text())
    path.write_text(json.dumps({"model": model, "machine": machine}))
    return str(path)


def test_profile_of_a_file_is_read(tmp_path: Path) -> None:
    profile = Profile.load(_file(tmp_path / "own.json", gemm_flops_per_s=1e12))
    assert profile.rates.gemm_flops_per_s == 1e12
    assert profile.with_rates(run_overhead_s=0.5).rates.run_overhead_s == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gemm_flops_per_s": 0}, "gemm_flops_per_s: got 0, expected a number > 0"),
        ({"memory_bytes_per_s": "fast"}, "memory_bytes_per_s: got 'fast'"),
        ({"cuts": 3}, "cuts: got 3, expected 'cuda' or an object"),
        ({"cuts": {"row_step": 0}}, "cuts: row_step: got 0"),
        ({"cuts": {"rows": 1}}, "cuts: __init__"),
        ({"threads": 0}, "threads: got 0"),
    ],
)
def test_profile_bad_file_is_named(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Profile.load(_file(tmp_path / "own.json", **changes))


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_profile_damaged_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad.json"):
        Profile.load(str(path))
    with pytest.raises(ConfigError, match="No such file"):
        Profile.load(str(tmp_path / "none.json"))
