"""EngineConfig: bad values are refused by name, and docs/configuration.md lists every setting."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from flowprefill.config import EngineConfig, Granularity, read_object, settings_table
from flowprefill.errors import ConfigError
from flowprefill.server.options import ServerOptions

ROOT = Path(__file__).resolve().parents[2]


def test_configuration_page_is_the_table_of_the_settings() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert settings_table() in page


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtype", "fp8"), ("quantization", "int4"), ("quantization", None),
        ("device", "tpu"), ("policy", "lifo"), ("granularity", "budget"),
        ("granularity", "chunk:0"), ("granularity", "budget:0"), ("granularity", 3),
        ("threads", -1), ("threads", 1.5), ("threads", True), ("kv_cache_gib", -1),
        ("device", "cuda:"), ("device", "cuda:-1"), ("device", "cuda:x"), ("device", "CUDA"),
        ("device", 0), ("device", "cpu:0"),
        ("block_tokens", 48), ("max_running", -1), ("max_waiting", 0), ("default_ttft_ms", -1),
        ("max_model_len", "long"), ("kv_cache_gib", float("nan")),
        ("max_backlog_s", -1), ("tenant_share", 0), ("tenant_share", 1.5), ("admission", "maybe"),
        ("late_share", 0), ("late_share", 0.5), ("late_share", "none"),
        ("classes", ["chat"]),
    ],
)  # fmt: skip
def test_bad_setting_names_field_value_and_what_is_allowed(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        EngineConfig(**{name: value})
    assert caught.value.param == name
    assert repr(value) in caught.value.message
    assert "expected" in caught.value.message


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:15"])
def test_device_is_taken_as_documented(device: str) -> None:
    assert EngineConfig(device=device).device == device


NUMBERS = [
    (settings, field.name, type(field.default))
    for settings in (EngineConfig, ServerOptions)
    for field in dataclasses.fields(settings)
    if type(field.default) in (int, float) and field.name != "block_tokens"  # one of four
]


@pytest.mark.parametrize(
    ("settings", "name", "kind"), NUMBERS, ids=lambda part: part if isinstance(part, str) else ""
)
def test_limits_that_the_message_states_are_taken(settings: Any, name: str, kind: type) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(**{name: "many"})
    stated = re.search(r"in \[(\S+), (\S+)\]", caught.value.message)
    assert stated is not None, caught.value.message
    for limit in stated.groups():
        assert getattr(settings(**{name: kind(limit)}), name) == kind(limit)


def test_unknown_setting_is_refused() -> None:
    with pytest.raises(ConfigError, match="no_such_key"):
        EngineConfig.from_mapping({"no_such_key": 1})


@pytest.mark.parametrize(
    "text", ["budget:2", "budget:0.5", "chunk:512", "operator", "layer", "none"]
)
def test_granularity_is_written_as_it_is_read(text: str) -> None:
    assert str(Granularity.parse(text)) == text


def test_class_gives_its_slo_in_seconds() -> None:
    config = EngineConfig(classes={"chat": {"ttft_ms": 250, "tpot_ms": 50, "on_miss": "drop"}})
    slo = config.slo_of_class("chat")
    assert (slo.ttft, slo.tpot, slo.on_miss, slo.service_class) == (0.25, 0.05, "drop", "chat")


def test_class_promises_and_allows_what_it_says() -> None:
    spec = {"ttft_ms": 250, "weight": 3, "share": 0.2, "admission": "reject"}
    config = EngineConfig(classes={"chat": spec, "batch": {"background": True}}, admission="demote")
    chat, batch = config.service_class("chat"), config.service_class("batch")
    assert (chat.weight, chat.share, chat.admission) == (3.0, 0.2, "reject")
    assert (batch.weight, batch.is_background, batch.admission) == (1.0, True, "demote")
    assert config.service_class("unheard of").slo.ttft is None
    assert config.class_shares() == {"chat": 0.2}


def test_class_named_background_is_background() -> None:
    with pytest.raises(ConfigError, match=r"classes\.background\.background"):
        EngineConfig(classes={"background": {"weight": 2}})


def test_shares_of_all_classes_leave_time_for_deadlines() -> None:
    classes = {"a": {"share": 0.5}, "b": {"share": 0.5}}
    with pytest.raises(ConfigError, match=r"classes: got 1\.0, expected shares of at most 0\.9"):
        EngineConfig(classes=classes)


def test_late_share_is_what_the_shares_of_classes_leave_room_for() -> None:
    classes = {"a": {"share": 0.4}, "b": {"share": 0.3}}
    assert EngineConfig(classes=classes, late_share=0.1).late_share == 0.1
    with pytest.raises(
        ConfigError, match=r"late_share: got 0\.11, expected at most 0\.100: .* 0\.7"
    ):
        EngineConfig(classes=classes, late_share=0.11)


@pytest.mark.parametrize(
    "spec",
    [
        {"ttft_ms": -1}, {"ttft": 1}, {"on_miss": "explode"}, {"tpot_ms": "fast"}, "fast",
        {"weight": 0}, {"weight": True}, {"weight": float("nan")}, {"share": 1}, {"share": "half"},
        {"background": 1}, {"background": True, "ttft_ms": 100}, {"background": True, "share": 0.1},
        {"admission": "never"}, {"admission": []},
    ],
)  # fmt: skip
def test_bad_class_is_refused_at_start(spec: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="chat"):
        EngineConfig(classes={"chat": spec})


def test_default_objectives_apply_to_requests_that_name_none() -> None:
    assert EngineConfig(default_ttft_ms=500).default_slo().ttft == 0.5
    assert EngineConfig().default_slo().ttft is None
    with_class = EngineConfig(classes={"default": {"ttft_ms": 100}}, default_ttft_ms=500)
    assert with_class.default_slo().ttft == 0.1


def test_every_setting_has_a_help_text() -> None:
    for field in dataclasses.fields(EngineConfig):
        assert field.metadata["doc"], field.name


@pytest.mark.parametrize("text", [r'{"a": "\ud800"}', r'{"\udfff": 1}', '["a"]', "{", "\ufeff{}"])
def test_config_file_holds_an_object_of_valid_text(tmp_path: Path, text: str) -> None:
    file = tmp_path / "settings.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"config file '.*settings.json'"):
        read_object("config file", file)
