"""Readers of trace files: each format, what is derived, and how a bad row is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flowprefill.errors import ConfigError
from flowprefill.traces import FORMATS, TraceRequest, read_trace

QWEN = {
    "chat_id": 0, "parent_chat_id": -1, "timestamp": 10.5, "input_length": 100,
    "output_length": 7, "type": "text", "turn": 1,
}  # fmt: skip
FILES = {
    "qwen": ("a.jsonl", json.dumps(QWEN)),
    "mooncake": (
        "a.jsonl",
        '{"timestamp": 10500, "input_length": 100, "output_length": 7, "hash_ids": [1]}',
    ),
    "azure": (
        "a.csv",
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,100,7",
    ),
    "burstgpt": (
        "a.csv",
        "Timestamp,Model,Request tokens,Response tokens,Log Type\n5,GPT-4,100,7,API log",
    ),
    "servegen": ("a.csv", "request_id,timestamp,input_tokens,output_tokens\n0,5.5,100,7"),
    "csv": ("a.csv", "at_s,prompt_tokens,output_tokens\n5,100,7"),
}
CLASSES = {"qwen": "text", "burstgpt": "GPT-4"}


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text + "\n")
    return path


def write_rows(folder: Path, *rows: object) -> Path:
    return write(folder, "trace.jsonl", "\n".join(json.dumps(row) for row in rows))


def test_every_format_is_tested() -> None:
    assert set(FILES) == set(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("is_named", [True, False])
def test_each_format_is_read_and_detected(name: str, is_named: bool, tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, *FILES[name]), name if is_named else "auto")
    assert trace.requests == (TraceRequest(0.0, 100, 7, CLASSES.get(name, "")),)


def test_times_start_at_zero_and_are_sorted(tmp_path: Path) -> None:
    path = write_rows(tmp_path, QWEN | {"timestamp": 9.0}, QWEN | {"timestamp": 7.5})
    assert [one.at_s for one in read_trace(path).requests] == [0.0, 1.5]


def test_qwen_single_turn_step_counts_new_blocks_of_later_text_turns(tmp_path: Path) -> None:
    first = QWEN | {"hash_ids": [], "input_length": 100}  # 7 blocks
    later = first | {"chat_id": 1, "parent_chat_id": 0, "input_length": 330}  # 21 blocks
    search = later | {"type": "search"}
    shrunk = later | {"input_length": 90}
    orphan = later | {"parent_chat_id": 99}
    trace = read_trace(write_rows(tmp_path, first, later, search, shrunk, orphan))
    assert [one.prompt_tokens for one in trace.requests] == [100, 14 * 16, 330, 16, 330]


def test_qwen_rows_without_hash_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    later = QWEN | {"chat_id": 1, "parent_chat_id": 0, "input_length": 330}
    trace = read_trace(write_rows(tmp_path, QWEN, later))
    assert trace.requests[1].prompt_tokens == 330


def mooncake(*times_ms: int) -> list[object]:
    return [{"timestamp": ms, "input_length": 5, "output_length": 0} for ms in times_ms]


def test_mooncake_grid_is_spread_by_seed(tmp_path: Path) -> None:
    path = write_rows(tmp_path, *mooncake(0, 0, 3000, 2999, 9000))
    times = [one.at_s for one in read_trace(path, seed=1).requests]
    assert times == [one.at_s for one in read_trace(path, seed=1).requests]
    assert times != [one.at_s for one in read_trace(path, seed=2).requests]
    assert len(set(times)) == 5
    assert 3.0 < times[-1] < 12.0


def test_mooncake_off_the_grid_keeps_its_times(tmp_path: Path) -> None:
    path = write_rows(tmp_path, *mooncake(0, 1500, 3000))
    assert [one.at_s for one in read_trace(path).requests] == [0.0, 1.5, 3.0]


def test_azure_2024_dates_with_a_zone_are_read(tmp_path: Path) -> None:
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-05-10 00:00:00.009930+00:00,10,0\n2024-05-10 00:00:01.509930+00:00,20,3"
    )
    trace = read_trace(write(tmp_path, "a.csv", text))
    assert trace.span_s == pytest.approx(1.5)
    assert [one.output_tokens for one in trace.requests] == [1, 3]


def test_burstgpt_failed_requests_are_left_out(tmp_path: Path) -> None:
    name, text = FILES["burstgpt"]
    trace = read_trace(write(tmp_path, name, text + "\n6,GPT-4,100,0,API log"))
    assert len(trace.requests) == 1


def test_plain_csv_holds_classes_and_objectives(tmp_path: Path) -> None:
    text = "at_s,prompt_tokens,service_class,ttft_s,tpot_s\n0,10,chat,0.5,\n1,20,,,0.1"
    first, second = read_trace(write(tmp_path, "a.csv", text)).requests
    assert first == TraceRequest(0.0, 10, 1, "chat", ttft_s=0.5)
    assert second == TraceRequest(1.0, 20, tpot_s=0.1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"timestamp": "soon"}, "timestamp: got 'soon', expected a number"),
        ({"timestamp": True}, "timestamp: got True, expected a number"),
        ({"timestamp": -1}, "timestamp: got -1, expected a time >= 0"),
        ({"input_length": 0}, "input_length: got 0, expected an integer >= 1"),
        ({"input_length": 1.5}, "input_length: got 1.5, expected an integer >= 1"),
        ({"input_length": None}, "input_length: got None, expected a number"),
        ({"output_length": -3}, "output_length: got -3, expected an integer >= 0"),
        ({"type": ""}, "type: got '', expected a text"),
    ],
)
def test_bad_field_is_named_with_line_and_value(
    row: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        read_trace(write_rows(tmp_path, QWEN, QWEN | row))
    assert message in str(error.value)
    assert "trace.jsonl:2" in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "[1]", "a.jsonl:1: got '[1]', expected a JSON object"),
        ("a.jsonl", "{", "expected a JSON object"),
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", '{"time": 1}', "fields time, expected those of a known format"),
        ("a.csv", "at_s,prompt_tokens\n0,5\n1", "prompt_tokens: got nothing, expected a number"),
        ("a.csv", "at_s,prompt_tokens,ttft_s\n0,1,0", "ttft_s: got '0', expected seconds > 0"),
        (
            "a.csv",
            "TIMESTAMP,ContextTokens,GeneratedTokens\nnoon,1,1",
            "a.csv:2: TIMESTAMP: got 'noon', expected a date",
        ),
    ],
)
def test_bad_file_is_refused(name: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        read_trace(write(tmp_path, name, text))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b"\xff\xfe"),
        ("a.csv", b"at_s,prompt_tokens\n\xff,1"),
        ("a.csv", b"at_s,prompt_tokens\n0," + b"1" * 200_000),
    ],
)
def test_file_that_is_no_text_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match="expected lines of text in UTF-8"):
        read_trace(tmp_path / name)


def test_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a file that can be read"):
        read_trace(tmp_path)


def test_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected one of auto, qwen, mooncake"):
        read_trace(write_rows(tmp_path, QWEN), "xml")
