"""The command line: flags from settings, one-line errors, generate and serve on a fake engine."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fake_engine import WAIT_S, FakeEngine, Script

from flowprefill import cli
from flowprefill.bench import doctor
from flowprefill.config import EngineConfig
from flowprefill.errors import CheckpointError, NotReady, RequestFailed
from flowprefill.version import __version__

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeEngine]:
    engine = FakeEngine()

    def load(model: str, config: EngineConfig, *_: Any) -> FakeEngine:
        engine.model_id, engine.config = model, config
        return engine

    monkeypatch.setattr(cli, "load_engine", load)
    yield engine
    engine.close(0.0)


def error_of(capsys: pytest.CaptureFixture[str], *argv: str, status: int = 2) -> str:
    """Run a command that must fail; returns its one line."""
    assert cli.main(argv) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("flowprefill: ")
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def parse(*argv: str) -> Namespace:
    return cli.build_parser(argv).parse_args(argv)


def test_help_loads_neither_torch_nor_the_server() -> None:
    code = (
        "import sys; from flowprefill.cli import main; status = main(['--help']); "
        "heavy = {'torch', 'aiohttp', 'rich', 'flowprefill._core'} & set(sys.modules); "
        "sys.exit(f'loaded {heavy}' if heavy or status else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "serve" in done.stdout


def test_serve_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--help"]) == 0
    shown = capsys.readouterr().out
    for name in (*EngineConfig.__dataclass_fields__, "vllm_metrics", "service_tiers", "host"):
        assert "--" + name.replace("_", "-") in shown


@pytest.mark.parametrize("argv", [(), ("bench",)])
def test_no_command_prints_the_help(
    capsys: pytest.CaptureFixture[str], argv: tuple[str, ...]
) -> None:
    assert cli.main(argv) == 0
    bare = capsys.readouterr()
    assert cli.main([*argv, "--help"]) == 0
    assert bare.out == capsys.readouterr().out
    assert "usage: flowprefill" in bare.out
    assert bare.err == ""


@pytest.mark.parametrize("argv", [["--version"], ["doctor", "--json"]])
def test_reader_that_leaves_is_no_error(argv: list[str]) -> None:
    # Buffered, as in a shell's pipe; argparse drops the errors of what it writes at once.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    ours, theirs = os.pipe()
    os.close(ours)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "flowprefill", *argv], stdout=theirs, stderr=subprocess.PIPE,
            text=True, cwd=ROOT, env=environment, check=False,
        )  # fmt: skip
    finally:
        os.close(theirs)
    assert done.stderr == ""
    assert done.returncode == cli.PIPE_CLOSED


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("serve",), "Serve a model over an OpenAI-compatible API."),
        (("doctor",), "What this machine offers."),
        (("bench", "hol"), f"{cli.BENCHES['hol'].capitalize()}."),
    ],
)
def test_help_of_a_command_says_what_it_is(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], line: str
) -> None:
    assert cli.main([*words, "--help"]) == 0
    assert line in " ".join(capsys.readouterr().out.split())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"flowprefill {__version__}\n"


def test_settings_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    values = {
        "threads": 3,
        "policy": "edf",
        "classes": {"batch": {"ttft_ms": 60_000}},
        "server": {"keep_alive_s": 3, "max_choices": 5},
    }
    file.write_text(json.dumps(values))
    args = parse(
        "serve", "--config", str(file), "--policy", "fcfs", "--max-choices", "9",
        "--no-prefix-cache", "--vllm-metrics", "--service-tiers", '{"flex": "batch"}',
        "--served-model-names", "a", "b",
    )  # fmt: skip
    engine, server = cli.read_settings(args)
    assert (engine.threads, engine.policy, engine.prefix_cache) == (3, "fcfs", False)
    assert engine.classes == {"batch": {"ttft_ms": 60_000}}
    assert (server.keep_alive_s, server.max_choices, server.vllm_metrics) == (3, 9, True)
    assert server.service_tiers == {"flex": "batch"}
    assert server.served_model_names == ("a", "b")


def test_settings_default_is_the_dataclass() -> None:
    engine, _ = cli.read_settings(parse("serve"))
    assert engine == EngineConfig()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("bake",), "invalid choice: 'bake'"),
        (("srve",), "did you mean serve? (see flowprefill --help)"),
        (("bench", "goodputt"), "did you mean goodput? (see flowprefill bench --help)"),
        (("serve", "--granularty", "whole"), "did you mean --granularity? (see flowprefill serve"),
        (("serve", "--kv-cach-gib=3"), "did you mean --kv-cache-gib?"),
        (("serve", "--model", "m"), "the model is an argument: flowprefill serve MODEL (see"),
        (("serve", "--max-num-seqs=9"), "unrecognized arguments: --max-num-seqs=9; here it is"),
        (("generate", "smollm2-135m", "hi"), "hi; the prompt is one argument, in quotes"),
        (("serve", "--log-level", "wanring"), "did you mean warning?"),
        (("serve", "--policy", "nope"), "policy: got 'nope', expected one of"),
        (("serve", "--granularity", "chunk:1"), "granularity: got 'chunk:1'"),
        (("serve", "--dtype", "fp8"), "dtype: got 'fp8'"),
        (("serve", "--threads", "many"), "--threads"),
        (("serve", "--threads", "-1"), "threads: got -1"),
        (("serve", "--kv-cache-gib", "-1"), "kv_cache_gib: got -1"),
        (("serve", "--device", "gpu"), "device: got 'gpu', expected auto, cpu, cuda or cuda:N"),
        (("serve", "--port", "70000"), "port: got 70000"),
        (("serve", "--classes", "[1]"), "expected a JSON object"),
        (("serve", "--classes", r'{"\ud800": {}}'), "expected a JSON object"),
        (("serve", "--served-model-names", "caf\udce9"), "served_model_names: got ('caf"),
        (("serve", "--max-body-mib", "-3"), "max_body_mib: got -3"),
        (("serve", "--service-tiers", '{"flex": "x"}'), "service_tiers.flex: got 'x'"),
        (("serve", "--config", "/nowhere.json"), "config file '/nowhere.json': No such file"),
        (("serve", "--config", ""), "config file '': Is a directory"),
        (("serve", "--unheard-of"), "--unheard-of"),
        (("bench", "speed"), "invalid choice: 'speed'"),
        (("generate", "Hi", "--temperature", "9"), "temperature: got 9.0"),
        (("generate", "Hi", "--max-tokens", "0"), "max_tokens: got 0"),
        (("generate", "Hi", "--ttft-ms", "-5"), "slo.ttft"),
        (("generate", ""), "prompt: empty"),
    ],
)
def test_bad_command_line_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], engine: FakeEngine, argv: tuple[str, ...], words: str
) -> None:
    assert words in error_of(capsys, *argv)
    assert engine.submitted == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[]", "expected a JSON object"),
        ('{"treads": 2}', "'treads', expected one of"),
        ('{"threads": "2"}', "threads: got '2'"),
        ('{"calibrate": "no"}', "calibrate: got 'no', expected true or false"),
        ('{"background": 1}', "background: got 1, expected true or false"),
        ('{"prefix_cache": null}', "prefix_cache: got None, expected true or false"),
        ('{"cache_dir": 5}', "cache_dir: got 5, expected a text"),
        ('{"cache_dir": "a\\u0000b"}', "cache_dir: got 'a\\x00b', expected a path"),
        ('{"chat_template": []}', "chat_template: got [], expected a text"),
        ('{"classes": {"a": {"ttft_ms": "9"}}}', "classes.a.ttft_ms: got '9', expected a number"),
        ('{"classes": {"a": {"tpot_ms": 0}}}', "classes.a.tpot_ms: got 0, expected milliseconds"),
        ('{"server": 5}', "server: got 5"),
        ('{"server": {"port": 5}}', "'port', expected one of"),
    ],
)
def test_bad_config_file_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, words: str
) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    assert words in error_of(capsys, "serve", "--config", str(file))


def test_taken_port_is_one_line(capsys: pytest.CaptureFixture[str], engine: FakeEngine) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        error = error_of(capsys, "serve", "--port", port, status=1)
        assert "address already in use" in error


@pytest.mark.parametrize("host", ["", "no-such-host.invalid"])
def test_host_that_is_none_is_one_line(
    capsys: pytest.CaptureFixture[str], engine: FakeEngine, host: str
) -> None:
    error = error_of(capsys, "serve", "--host", host, "--port", "0")
    assert f"host: got {host!r}, expected an address" in error


def test_model_that_does_not_load_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(model: str, config: EngineConfig, *_: Any) -> FakeEngine:
        raise CheckpointError(f"{model}: truncated\nat byte 5")

    monkeypatch.setattr(cli, "load_engine", load)
    served = error_of(capsys, "serve", "m.gguf", "--port", "0", status=1)
    assert "m.gguf: truncated at byte 5" in served
    assert "truncated" in error_of(capsys, "generate", "Hi", "--model", "m.gguf", status=1)


@pytest.mark.parametrize(("host", "shown"), [(None, "127.0.0.1"), ("::1", "[::1]")])
def test_serve_runs_until_a_signal(
    capsys: pytest.CaptureFixture[str],
    engine: FakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    host: str | None,
    shown: str,
) -> None:
    original = engine.subscribe

    def subscribe(observer: Any) -> None:
        original(observer)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(engine, "subscribe", subscribe)
    flags = [] if host is None else ["--host", host]
    assert cli.main(["serve", "some-model", "--port", "0", "--threads", "2", *flags]) == 0
    assert f"serving some-model at http://{shown}:" in capsys.readouterr().err
    assert engine.config.threads == 2
    assert not engine.is_ready


def test_signal_ends_the_loading_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = 0

    class Loading:
        def __init__(self, *_: Any, progress: Callable[[int, int], None]) -> None:
            nonlocal weights
            os.kill(os.getpid(), signal.SIGTERM)
            for weights in range(10_000):
                progress(weights, 10_000)
                time.sleep(0.005)

    monkeypatch.setattr("flowprefill.engine.Engine", Loading)
    assert cli.main(["serve", "some-model", "--port", "0"]) == 0
    assert weights < 9_000


def test_signal_ends_a_load_that_looks_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    has_ended = threading.Event()

    def end(status: int) -> None:
        ended.append(status)
        has_ended.set()

    class Loading:
        def __init__(self, *_: Any, **__: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            assert has_ended.wait(WAIT_S)  # a tokenizer or a calibration, which serve() cannot stop
            raise NotReady("serve() waits no longer")

    monkeypatch.setattr(cli.os, "_exit", end)
    monkeypatch.setattr("flowprefill.engine.Engine", Loading)
    assert cli.main(["serve", "some-model", "--port", "0"]) == 0
    assert ended == [0]


def test_interrupt_ends_generate_while_the_model_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ended(Exception):
        pass

    def end(status: int) -> None:
        raise Ended(status)

    def load(*_: Any) -> FakeEngine:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(WAIT_S)
        raise AssertionError("loads on")

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(cli.os, "_exit", end)
    monkeypatch.setattr(cli, "load_engine", load)
    with pytest.raises(Ended, match="130"):
        cli.main(["generate", "Hi"])
    assert signal.getsignal(signal.SIGINT) is before


def test_sigterm_ends_serve_before_it_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ended(Exception):
        pass

    def end(status: int) -> None:
        raise Ended(status)

    def build(_arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(WAIT_S)
        raise AssertionError("goes on")

    monkeypatch.setattr(cli.os, "_exit", end)
    monkeypatch.setattr(cli, "build_parser", build)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises(Ended, match="0"):
            cli.main(["serve"])
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_interrupt_while_the_command_is_imported_leaves_no_traceback() -> None:
    code = """
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "flowprefill.cli":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
runpy.run_module("flowprefill", run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_generate_streams_the_text(capsys: pytest.CaptureFixture[str], engine: FakeEngine) -> None:
    argv = ["generate", "Hi", "--max-tokens", "5", "--stop", "x", "--ttft-ms", "250", "--timings"]
    assert cli.main(argv) == 0
    captured = capsys.readouterr()
    assert captured.out == "Hello\n"
    assert "ttft  8.00 ms" in captured.err
    assert "preemptions  1" in captured.err
    assert "()" not in captured.err
    assert "None" not in captured.err
    handle = engine.submitted[0]
    assert handle.slo.ttft == 0.25
    assert handle.request.sampling.stop == ("x",)
    assert handle.request.add_special_tokens
    assert not engine.is_ready


def test_generate_chat_reads_stdin(
    capsys: pytest.CaptureFixture[str], engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hi")))
    assert cli.main(["generate", "--chat"]) == 0
    assert capsys.readouterr().out == "Hello world\n"
    assert engine.submitted[0].request.prompt == "<user>Hi<assistant>"
    assert not engine.submitted[0].request.add_special_tokens


def test_generate_stdin_that_is_not_utf8_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    assert "byte 3 of stdin is not UTF-8" in error_of(capsys, "generate")


def test_generate_failed_run_is_one_line(
    capsys: pytest.CaptureFixture[str], engine: FakeEngine
) -> None:
    engine.script = Script(error=RequestFailed("qkv, layer 3"))
    assert "qkv, layer 3" in error_of(capsys, "generate", "Hi", status=1)


def test_generate_interrupt_cancels_and_ends(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.script = Script(gate=threading.Event())

    def interrupt(_tokens: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_print_tokens", interrupt)
    assert cli.main(["generate", "Hi"]) == 130
    assert engine.ends[0].finish_reason == "cancelled"


@pytest.mark.slow
def test_doctor_json_names_what_matters(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["flowprefill"] == __version__
    assert found["cores_available"] >= 1
    assert found["gemm_f32_gflops"] > 0
    assert found["gemm_bf16_gflops"] > 0
    assert len(found["openmp"]) == 1
    assert isinstance(found["instruction_sets"], list)
    assert found["default_model"]
    assert found["device"].startswith(("cpu: ", "cuda:"))
    assert isinstance(found["gpus"], list)


@pytest.mark.parametrize(
    ("gpus", "device", "shown"),
    [
        ([], "cpu: no NVIDIA driver", []),
        (
            [(False, "Old GPU has compute capability 7.5"), (True, "New GPU")],
            "cuda:1: New GPU",
            ["cuda:0 Old GPU has compute capability 7.5 (not usable)", "cuda:1 New GPU"],
        ),
    ],
)
def test_doctor_tells_the_device_and_of_each_gpu_why(
    monkeypatch: pytest.MonkeyPatch, gpus: list[tuple[bool, str]], device: str, shown: list[str]
) -> None:
    module: Any = ModuleType("flowprefill._cuda")
    module.architectures = "80-real"
    module.device_count = lambda: len(gpus)
    module.availability = lambda index: gpus[index] if gpus else (False, "no NVIDIA driver")
    monkeypatch.setitem(sys.modules, "flowprefill._cuda", module)
    assert doctor.gpu_findings() == {
        "device": device, "cuda_module": "compiled for 80-real", "gpus": shown,
    }  # fmt: skip


def test_doctor_says_how_to_build_the_module_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flowprefill._cuda", None)
    found = doctor.gpu_findings()
    assert "FLOWPREFILL_CUDA=1" in found["cuda_module"]
    assert found["device"].startswith("cpu: ")
    assert found["gpus"] == []


def test_doctor_table_is_printed_and_paths_are_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = "/a/folder" * 20
    monkeypatch.setenv("COLUMNS", "40")
    peak = {"f32_gflops": 2.0, "reads": {"4 MiB": 9.0}}
    found = {"gemm_bf16_gflops": 1.0, "peak": peak, "native": True, "model": path}
    monkeypatch.setattr(doctor, "examine", lambda: found)
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "gemm bf16 gflops" in shown
    lines = [line.rstrip() for line in shown.splitlines()]
    for cell in ("f32 gflops: 2.0", "reads: 4 MiB 9.0", "yes"):  # each ends a line of its own
        assert any(line.endswith(cell) for line in lines), cell
    assert path in "".join(shown.split())


@pytest.mark.parametrize(
    ("cpuinfo", "flags"),
    [
        (
            "processor: 0\nflags\t\t: fpu avx2 amx_tile amx_bf16 zzz\n",
            ["avx2", "amx_tile", "amx_bf16"],
        ),
        ("Features\t: fp asimd bf16\n", ["asimd", "bf16"]),
        ("", []),
    ],
)
def test_doctor_isa_flags_of_cpuinfo(cpuinfo: str, flags: list[str]) -> None:
    assert doctor.isa_flags(cpuinfo) == flags


def test_doctor_openmp_libraries_of_maps() -> None:
    maps = "7f00 r-xp /opt/torch/lib/libgomp-a34b3233.so.1\n7f01 r-xp /usr/lib/libc.so.6\n"
    assert doctor.openmp_libraries(maps + maps) == ["libgomp-a34b3233.so.1"]
