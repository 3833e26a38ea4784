"""Whole benches on a tiny model: rows as stated, nothing about times."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import SERVED, save_with_tokenizer, tiny_model

from flowprefill import Engine, EngineConfig, Request, SamplingParams
from flowprefill.bench.goodput import engine_backend
from flowprefill.bench.goodput.engine_backend import EngineBackend, UrlBackend
from flowprefill.bench.goodput.lab import POINT_REQUESTS
from flowprefill.bench.goodput.setting import Setting
from flowprefill.bench.http_client import running_server
from flowprefill.bench.random_model import SHAPES, RandomCheckpoint
from flowprefill.bench.transformers_model import TransformersModel
from flowprefill.cli import main
from flowprefill.errors import ConfigError
from flowprefill.traces import TraceRequest

pytestmark = pytest.mark.slow
ROW_NAMES = {
    "granularity", "short_alone_p50_s", "short_beside_p50_s", "short_beside_p99_s", "long_alone_s",
    "long_beside_s", "blocking_p50_s", "blocking_p99_s", "blocking_max_s", "prefill_tokens_per_s",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with the default model's tokenizer."""
    shape = SERVED | {"max_position_embeddings": 8192, "tie_word_embeddings": True}
    path = tmp_path_factory.mktemp("bench") / "tiny"
    save_with_tokenizer(tiny_model("llama", **shape), path)
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrations are kept in the test's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def bench(folder: Path, tmp_path: Path, name: str, *flags: str) -> dict[str, Any]:
    """Run one and return its report."""
    path = tmp_path / "report.json"
    command = ["bench", name, "--model", str(folder), "--threads", "1", "--dtype", "f32"]
    assert main([*command, *flags, "--json", str(path)]) == 0
    report: dict[str, Any] = json.loads(path.read_text())
    assert {"machine", "commit", "command", "rows", "settings"} <= report.keys()
    return report


def test_hol_measures_every_granularity_in_every_round(folder: Path, tmp_path: Path) -> None:
    flags = ("--rounds", "2", "--long-tokens", "3000", "--shorts", "3", "--short-tokens", "8")
    names = ["none", "operator", "budget:2"]
    chosen = [flag for name in names for flag in ("--granularity", name)]
    report = bench(folder, tmp_path, "hol", *flags, *chosen)
    assert [row["granularity"] for row in report["rows"]] == names
    for row in report["rows"]:
        assert row.keys() >= ROW_NAMES
        assert 2 <= row["shorts"] <= 6
        assert row["prefill_tokens_per_s"] > 0
        assert row["short_beside_p50_s"] <= row["short_beside_p99_s"]
    assert report["rows"][0]["throughput_vs_none"] == 1.0


def test_prefill_measures_transformers_too(folder: Path, tmp_path: Path) -> None:
    report = bench(folder, tmp_path, "prefill", "--rounds", "1", "--tokens", "16", "40")
    found = [(row["engine"], row["tokens"], row["samples"]) for row in report["rows"]]
    engines = ("flowprefill", "transformers f32 eager", "transformers f32 sdpa")
    assert found == [(engine, tokens, 3) for tokens in (16, 40) for engine in engines]
    assert all(row["min"] <= row["tokens_per_s"] <= row["max"] for row in report["rows"])
    assert report["peak_flops_per_s"] > 0


def test_control_counts_what_it_submitted(folder: Path, tmp_path: Path) -> None:
    # So small a model's long prompt may end before one short prompt meets it; hardly six of them.
    report = bench(folder, tmp_path, "control", "--rounds", "6", "--shorts", "3")
    assert [row["granularity"] for row in report["rows"]] == ["budget:2", "budget:0.2"]
    for row in report["rows"]:
        assert 0 < row["samples"] <= 18
        assert 0 < row["submit_to_dispatch_p50_s"] <= row["submit_to_start_p50_s"]


def test_load_answers_every_request_over_http(folder: Path, tmp_path: Path) -> None:
    flags = ("--requests", "6", "--rate", "20", "--cancelled", "0")
    report = bench(folder, tmp_path, "load", *flags)
    everyone = report["rows"][-1]
    assert (everyone["service_class"], everyone["requests"], everyone["failed"]) == ("all", 6, 0)


def test_structured_measures_free_and_bound_requests(folder: Path, tmp_path: Path) -> None:
    report = bench(folder, tmp_path, "structured", "--quick", "--batch", "3")
    free, one, bound = report["rows"]
    assert free["bound_itl_s"] is None
    assert bound["free_itl_s"] is None
    assert free["free_over_all_free"] == 1.0
    assert one["free_itl_s"] > 0
    assert one["bound_tokens_per_s"] > 0
    assert len(report["compile"]) == 5
    assert all(0 < row["compile_p50_s"] <= row["compile_max_s"] for row in report["compile"])


def test_overload_answers_or_refuses_every_request(folder: Path, tmp_path: Path) -> None:
    report = bench(folder, tmp_path, "overload", "--quick", "--prompt-tokens", "64")
    assert [row["phase"] for row in report["rows"]] == [
        "at capacity", "overload", "one client", "among useless",
    ]  # fmt: skip
    for row in report["rows"]:
        assert row["requests"] == row["admitted"] + row["refused"]
        assert row["rss_max_mib"] > 50
    assert report["rows"][-1]["admitted"] > 0
    assert report["log_lines"] < 100


def test_simulate_plays_the_trace_on_the_engine_too(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    engine = ("--against-engine", "--model", str(folder), "--threads", "1", "--dtype", "f32")
    load = ("--requests", "6", "--rate", "20", "--length-scale", "0.01")
    assert main(["simulate", *engine, *load, "--json", str(path)]) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert row["requests"] == 6
    assert row["configuration"] == "slack_edf+budget:2"
    assert 0 <= row["engine_attainment"] <= 1
    assert row["engine_ttft_p50_s"] > 0
    assert row["ttft_p50_s"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("hol", "--granularity", "word"), "granularity: got 'word'"),
        (("hol", "--rounds", "0"), "rounds: got 0"),
        (("hol", "--shorts", "0"), "shorts: got 0"),
        (("control", "--threads", "-1"), "threads: got -1"),
        (("load", "--cancelled", "1"), "cancelled: got 1.0"),
        (("overload", "--times", "-1"), "times: got -1.0"),
        (("overload", "--times", "nan"), "times: got nan"),
        (("overload", "--never-reading", "-1"), "never_reading: got -1"),
        (("overload", "--ttft-ms", "0"), "ttft_ms: got 0.0"),
        (("prefill", "--json", "/nowhere/x.json"), "--json: got '/nowhere/x.json'"),
        (("load", "--trace", "/nowhere.jsonl"), "nowhere.jsonl"),
    ],
)
def test_bad_flags_are_named_before_anything_is_loaded(
    flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *flags]) == 2
    assert message in capsys.readouterr().err


def test_rates_shows_what_was_calibrated_learnt_and_kept(folder: Path, tmp_path: Path) -> None:
    flags = ("--quick", "--factor", "0.1", "--tokens", "100", "400")
    report = bench(folder, tmp_path, "rates", *flags)
    assert [row["tokens"] for row in report["rows"]] == [100, 400]
    for row in report["rows"]:
        assert row["calibrated_error"] == pytest.approx(row["calibrated_s"] / row["executed_s"] - 1)
        assert 0 < row["predicted_s"] < row["calibrated_s"]
        assert row["segment_s"] > 0
    assert [row["rate"] for row in report["rates"]] == ["products", "weights", "attention"]
    for row in report["rates"]:
        assert row["at_start"] == pytest.approx(0.1)
        assert row["learnt"] > 0.1
        assert row["kept"] > 0.1
    assert main(["bench", "rates", "--factor", "0"]) == 2


def test_prompt_longer_than_the_model_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", "hol", "--model", str(folder), "--threads", "1", "--dtype", "f32"]
    assert main([*command, "--long-tokens", "9000"]) == 2
    assert "tokens: got 9000, expected 1 to 8191 tokens" in capsys.readouterr().err


def test_transformers_comparison_names_a_family_that_it_does_not_know(tmp_path: Path) -> None:
    config = transformers.Olmo2Config(
        vocab_size=48, hidden_size=32, intermediate_size=40, num_hidden_layers=1,
        num_attention_heads=4,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="got family olmo2, expected one of llama, mistral"):
        TransformersModel(tmp_path, "f32", 1)


def test_transformers_comparison_runs_the_same_model(folder: Path) -> None:
    ids = [501, 77, 30_000, 4, 1234]
    other = TransformersModel(folder, "f32", 1)
    config = EngineConfig(calibrate=False, dtype="f32", threads=1, kv_cache_gib=0.02)
    with Engine(folder, config) as engine:
        sampling = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        ours = engine.submit(Request(ids, sampling)).result(60).token_ids
    with torch.no_grad():
        theirs = other.inner(input_ids=torch.tensor([ids])).logits
    assert [int(theirs[0, -1].argmax())] == ours
    assert other.prefill_s(ids, "eager") > 0


def test_goodput_on_an_engine_measures_each_setting(folder: Path, tmp_path: Path) -> None:
    flags = ("--backend", "engine", "--quick", "--length-scale", "0.05", "--kv-cache-gib", "0.1")
    settings = ("--setting", "fcfs+none", "--setting", "slack_edf+budget:2")
    out = ("--out", str(tmp_path / "out"), "--budget", "1", "--target", "0.5")
    guess = ("--guess-profile", "smollm2-135m@zen5x2")
    report = bench(folder, tmp_path, "goodput", *flags, *settings, *out, *guess)
    assert [row["setting"] for row in report["rows"]] == ["fcfs+none", "slack_edf+budget:2"]
    assert {row["requests"] % 60 for row in report["by_rate"]} == {0}
    assert all(0 <= row["attainment"] <= 1 for row in report["by_rate"])
    assert report["settings"]["capacity_rps"] > 0
    assert "<svg" in (tmp_path / "out" / "goodput.html").read_text()


def test_goodput_of_a_shape_needs_no_model_and_loads_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    monkeypatch.setattr(
        engine_backend, "Engine", lambda *args: made.append(Engine(*args)) or made[-1]
    )
    path = tmp_path / "report.json"
    flags = ["--backend", "engine", "--shape", "tiny", "--one-engine", "--device", "cpu"]
    load = ["--length-scale", "0.05", "--kv-cache-gib", "0.1", "--point-s", "0.01"]
    settings = ["fcfs+none", "slack_edf+chunk:32", "slack_edf+budget:0.5"]
    flags += ["--target", "0.5", "--rate-step", "1.5", "--budget", "0.5", "--requests", "90"]
    flags += [flag for one in settings for flag in ("--setting", one)]
    command = ["bench", "goodput", *flags, *load, "--ours", settings[-1], "--json", str(path)]
    assert main(command) == 0
    report = json.loads(path.read_text())
    assert [row["setting"] for row in report["rows"]] == settings
    assert len(made) == 1
    assert not made[0].is_ready
    served = {row["setting"]: row for row in report["by_rate"]}
    assert served.keys() == set(settings)
    for row in served.values():
        assert POINT_REQUESTS <= row["requests"] <= 90
        assert row["failed"] == 0
        assert row["median_ttft_s"] > 0
        assert sum(one["attainment"] > 0 for one in row["by_class"].values()) > 0
    assert report["settings"]["engine"]["rates"]["gemm_flops_per_s"] > 0


def test_goodput_writes_what_was_measured_before_its_engine_failed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.json"
    original = EngineBackend._measured

    def once(backend: EngineBackend, *args: Any) -> Any:
        assert backend._kept is not None
        measured = original(backend, *args)
        backend._kept._core.has_failed = True
        return measured

    monkeypatch.setattr(EngineBackend, "_measured", once)
    flags = ["--backend", "engine", "--one-engine", "--model", str(folder), "--device", "cpu"]
    flags += ["--quick", "--length-scale", "0.05", "--kv-cache-gib", "0.1", "--rate-step", "1.5"]
    assert main(["bench", "goodput", *flags, "--json", str(path)]) != 0
    assert [row["requests"] for row in json.loads(path.read_text())["by_rate"]] == [60]


def test_a_checkpoint_of_random_weights_has_a_tokenizer_of_bytes() -> None:
    tokenizer = RandomCheckpoint("tiny", SHAPES["tiny"]()).tokenizer
    ids = tokenizer.encode("né 東")
    assert ids == list("né 東".encode())
    assert tokenizer.decode([*ids, 500]) == "né 東"


def test_goodput_engine_backend_serves_equal_requests_and_times_them(folder: Path) -> None:
    backend = EngineBackend(str(folder), dtype="f32", threads=1, kv_cache_gib=0.1)
    requests = [
        TraceRequest(0.01 * n, 40 + n, 1 + n % 3, "ab"[n % 2], ttft_s=30.0) for n in range(12)
    ]
    hopeless = TraceRequest(0.2, 40, 1, "c", ttft_s=1e-6)
    measured = backend.measure(
        Setting("slack_edf", "budget:2"), [*requests, hopeless], 1, is_detailed=True
    )
    assert measured.by_class == {"a": 1.0, "b": 1.0, "c": 0.0}
    assert (measured.requests, measured.failed) == (13, 0)
    assert [len(times_s) for times_s in measured.ttft_s.values()] == [6, 6, 1]
    assert {one.number for one in measured.stretches} <= set(range(-1, 13))
    assert measured.stretches
    assert gc.get_freeze_count() == 0  # else each measurement would keep its engine's memory
    assert backend.solo_s(100) > 0


def test_goodput_engine_backend_measures_prefills_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_backend, "first_token_s", lambda engine, ids: len(ids) / 1000)
    backend = EngineBackend(str(folder), dtype="f32", threads=1, kv_cache_gib=0.1)
    found = [backend.solo_s(tokens) for tokens in (1, 16, 100, 2000, 5000)]
    assert found == pytest.approx([0.016, 0.016, 0.1, 2.0, 5.0])


def test_goodput_url_backend_states_objectives_itself(folder: Path) -> None:
    requests = [TraceRequest(0.0, 30, 2, "a", ttft_s=30.0), TraceRequest(0.1, 30, ttft_s=1e-6)]
    with running_server(str(folder), {"dtype": "f32", "threads": 1}) as url:
        backend = UrlBackend(url, vocab_size=1000)
        measured = backend.measure(Setting("slack_edf", "budget:2"), requests, 1, is_detailed=False)
    assert measured.by_class == {"a": 1.0, "": 0.0}
    assert measured.failed == 0
