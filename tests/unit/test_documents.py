"""What README, docs and examples tell a reader to type works, and nothing is said twice.

Python blocks and examples run with the embedded model, one process each; commands of flowprefill
are parsed, those of the reports too, flags and make's targets exist, and a real server answers
curl's requests.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from flowprefill import cli
from flowprefill.server.options import ServerOptions

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
LIMIT_S = 250  # of one process on a busy machine; on a quiet one each takes seconds


class Block(NamedTuple):
    """One fenced block of a page."""

    place: str
    language: str
    text: str


def fenced_blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, found.start()) + 1
        yield Block(f"{page.name}:{line}", found[1], found[2])


def shell_commands(block: Block) -> Iterator[list[str]]:
    """Yield the words of each command; a command goes on until its quotes are closed."""
    command = ""
    for line in block.text.splitlines():
        command += line + "\n"
        try:
            words = shlex.split(command, comments=True)
        except ValueError:
            continue
        command = ""
        if words and words[0] in ("flowprefill", "make", "curl", "python"):
            yield words
    assert command == "", f"{block.place}: a quote is not closed"


def named_commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of each command named inside a sentence; `...` stands for any of several."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for command in re.findall(r"`((?:flowprefill|make)\s[^`]*)`", prose):
        if "..." not in command:
            yield re.sub(r"[][]", "", command).split()


def settings_in(page: Path) -> Iterator[str]:
    """Yield the JSON objects that are settings: of what a file of `--config` may have."""
    text, end = page.read_text(), 0
    for found in re.finditer(r'\{"', text):
        if found.start() < end:  # inside of the last one
            continue
        with contextlib.suppress(ValueError):
            value, end = json.JSONDecoder().raw_decode(text, found.start())
            if {"classes", "server"} & set(value):
                yield text[found.start() : end]


BLOCKS = [block for page in PAGES for block in fenced_blocks(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
IN_BLOCKS = [words for one in BLOCKS if one.language in ("", "sh") for words in shell_commands(one)]
COMMANDS = {" ".join(words): words for words in IN_BLOCKS} | {
    " ".join(words): words for page in PAGES for words in named_commands(page)
}
FLOWPREFILL = [words for words in COMMANDS.values() if words[0] == "flowprefill"]
SETTINGS = [text for page in PAGES for text in settings_in(page)]
CURLS = [words for words in IN_BLOCKS if words[0] == "curl"]


def run_python(code: str, folder: Path) -> str:
    """Run `code` as a process of its own and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=folder,
        env=ENVIRONMENT, timeout=LIMIT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_documents_hold_what_is_tested_here() -> None:
    # Were the search above to become blind, the tests below would be empty.
    assert len(PYTHON) >= 1
    assert len(CURLS) >= 1
    assert len(SETTINGS) >= 2
    assert {"make demo", "make test", "flowprefill bench hol --json hol.json"} <= set(COMMANDS)


@pytest.mark.slow
@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.place)
def test_python_block_runs(block: Block, tmp_path: Path) -> None:
    assert run_python(block.text, tmp_path)


@pytest.mark.parametrize("words", FLOWPREFILL, ids=" ".join)
def test_command_of_flowprefill_parses(words: list[str]) -> None:
    if {"--help", "--version"} & set(words):
        with pytest.raises(SystemExit, match="0"):
            cli.build_parser(words[1:]).parse_args(words[1:])
    else:
        assert callable(cli.build_parser(words[1:]).parse_args(words[1:]).run)


@pytest.mark.parametrize("text", SETTINGS)
def test_settings_start_a_server(text: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    file.write_text(text)
    arguments = ["serve", "--config", str(file)]
    cli.read_settings(cli.build_parser(arguments).parse_args(arguments))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lists_begin_after_an_empty_line(page: Path) -> None:
    """Or after a heading: else the site shows them as a part of the paragraph before."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for before, line in itertools.pairwise(prose.splitlines()):
        if line.startswith(("- ", "1. ")):
            assert before == "" or before.startswith(("#", "- ", "  ")), line


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    """Return the flags of a parser and of the commands that it has."""
    found: set[str] = set()
    for action in parser._actions:
        found.update(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            found.update(*(flags_of(command) for command in action.choices.values()))
    return found


def test_flags_that_are_named_exist() -> None:
    """Each by some command: `--max-body-mib`, or `--quantization int8`."""
    benches = [["bench", name] for name in cli.BENCHES]
    commands = [["chat"], ["explain"], ["doctor"], ["simulate"], *benches]
    known = set().union(*(flags_of(cli.build_parser(command)) for command in commands))
    named = {flag for page in PAGES for flag in re.findall(r"`(--[a-z][a-z-]+)", page.read_text())}
    assert "--max-body-mib" in named
    assert named - known == set()


def test_settings_of_the_server_are_in_the_documents() -> None:
    text = "".join(page.read_text() for page in PAGES)
    for field in dataclasses.fields(ServerOptions):
        flag = field.name.replace("_", "-")
        assert re.search(rf"--(no-)?{flag}\b|`{field.name}`", text), field.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_item_of_a_list_is_there_twice(page: Path) -> None:
    """As where two changes of one item were merged into both."""
    items = [line[:40] for line in page.read_text().splitlines() if line.startswith("- ")]
    assert [begin for begin, count in Counter(items).items() if count > 1] == []


REPORTS = [*sorted((ROOT / "benchmarks/results").rglob("*.json"))]


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.name)
def test_command_of_a_report_still_parses(
    report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = json.loads(report.read_text())
    for part in (found, *found.values()):
        words = shlex.split(part.get("command", "")) if isinstance(part, dict) else []
        if "bench" in words:
            monkeypatch.chdir(tmp_path)  # where the folders that it wrote to are
            for word in words:
                if not word.startswith("/"):
                    Path(word).parent.mkdir(parents=True, exist_ok=True)
            words = words[words.index("bench") :]
            cli.build_parser(words).parse_args(words)


def test_targets_of_make_exist() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {words[1] for words in COMMANDS.values() if words[0] == "make"}
    assert named - targets == set()


EXAMPLES = {path.name[0]: path for path in sorted((ROOT / "examples").glob("*.py"))}


def run_example(number: str, folder: Path) -> str:
    return run_python(EXAMPLES[number].read_text(), folder)


def test_every_example_is_tested() -> None:
    assert set(EXAMPLES) == set("123456")


@pytest.mark.slow
def test_example_1_answers(tmp_path: Path) -> None:
    printed = run_example("1", tmp_path)
    assert "Paris" in printed
    assert "first token after" in printed


@pytest.mark.slow
def test_example_2_long_prompt_is_preempted(tmp_path: Path) -> None:
    """With times that any machine meets: the short ones come at once, and have a minute."""
    code = EXAMPLES["2"].read_text()
    for usual, changed in (("sleep(0.5)", "sleep(0.05)"), ("ttft=60", ""), ("ttft=0.5", "ttft=60")):
        assert code.count(usual) == 1
        code = code.replace(usual, changed)
    printed = run_python(code, tmp_path)
    assert len(re.findall(r"^short: first token after", printed, re.MULTILINE)) == 3
    preemptions = re.search(r"^long: .* s, (\d+) preemptions", printed, re.MULTILINE)
    assert preemptions is not None
    assert int(preemptions[1]) >= 1


@pytest.mark.slow
def test_example_3_ends_ten_requests_and_frees_their_blocks(tmp_path: Path) -> None:
    lines = run_example("3", tmp_path).splitlines()
    assert [line.partition(":")[0] for line in lines[:10]] == [str(n) for n in range(10)]
    assert "0: '(cancelled)'" in lines
    assert lines[10] == "KV blocks in use: 0"


@pytest.mark.slow
def test_example_4_shorter_prompts_end_first(tmp_path: Path) -> None:
    printed = run_example("4", tmp_path)
    ends = [float(one) for one in re.findall(r"first token after ([\d.]+) s", printed)]
    assert len(ends) == 4
    assert ends == sorted(ends, reverse=True)


@pytest.mark.slow
def test_example_6_answers_in_the_wanted_form(tmp_path: Path) -> None:
    first, second = run_example("6", tmp_path).splitlines()
    assert re.fullmatch(r"\{'city': .*, 'population': \d+\}", first)
    assert second in ("red", "green", "blue")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of `flowprefill serve` with the embedded model."""
    command = [sys.executable, "-m", "flowprefill", "serve", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        assert process.stderr is not None
        try:
            said = ""
            while not (address := re.search(r"http://\S+", said)):
                said = process.stderr.readline()
                assert said, f"the server ended with status {process.wait()}"
            wait_until_ready(address[0])
            yield address[0]
        finally:
            process.terminate()
            process.stderr.read()


def wait_until_ready(address: str) -> None:
    end = time.monotonic() + LIMIT_S
    while True:
        try:
            with urllib.request.urlopen(f"{address}/ready", timeout=LIMIT_S):
                return
        except urllib.error.HTTPError as loading:
            if loading.code != 503 or time.monotonic() > end:
                raise
            time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize("words", CURLS, ids=lambda words: words[1])
def test_server_answers_curl(words: list[str], server: str) -> None:
    options = dict(zip(words[2::2], words[3::2], strict=True))
    assert set(options) <= {"-H", "-d"}
    name, _, value = options["-H"].partition(": ")
    url = server + words[1].removeprefix("localhost:8000")
    request = urllib.request.Request(url, options["-d"].encode(), {name: value})
    with urllib.request.urlopen(request, timeout=LIMIT_S) as reply:
        assert '"choices"' in reply.read().decode()


@pytest.mark.slow
def test_example_5_streams_from_the_server(server: str, tmp_path: Path) -> None:
    code = EXAMPLES["5"].read_text().replace("http://127.0.0.1:8000", server)
    assert len(run_python(code, tmp_path).split()) > 5
