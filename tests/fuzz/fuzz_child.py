"""Runs mutations in a process of its own, with bounded memory, and bounded time for each.

    PYTHONPATH=.:tests/server python tests/fuzz/fuzz_child.py FIRST COUNT KIND...

Whatever a mutation is, it loads, or is refused by an error of ours. Prints `KIND INDEX` before
each, so that it is known which one ends this process; the same numbers make the same mutations. Of
bodies there are four times as many.
"""

from __future__ import annotations

import faulthandler
import http.client
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutations
from fake_engine import FakeEngine, Script
from running_server import RunningServer

from flowprefill.config import EngineConfig
from flowprefill.errors import FlowPrefillError
from flowprefill.models.chat_template import ChatTemplate
from flowprefill.models.checkpoint import open_checkpoint
from flowprefill.models.model_config import rope_inverse_frequencies
from flowprefill.server.options import ServerOptions

SEEDS = Path(__file__).parent / "seeds"
MEMORY = 2 << 30  # bytes, in addition to what the process has once all is imported
HTTP = "http"
BODIES_PER_FILE = 4
LIMIT_S = 60  # of one mutation: twice what a template gets
FILES: dict[str, mutations.Mutation] = {
    "config.json": mutations.of_json,
    "tokenizer.json": mutations.of_json,
    "generation_config.json": mutations.of_json,
    "model.safetensors": mutations.of_safetensors,
    "quantised/config.json": mutations.of_json,
    "quantised/model.safetensors": mutations.of_safetensors,
    "model.gguf": mutations.of_gguf,
    "chat_template.jinja": mutations.of_template,
}
PROMPT = "Hello  world 123\u00a0\u00e9\n" * 20
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi " * 50}]
PATHS = (
    "/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize",
    "/debug/requests/x",
)  # fmt: skip
HEADERS: dict[str, list[str]] = {
    "x-slo-ttft-ms": ["1", "0", "nan", "1e999", "x", "\u00e9"],
    "x-slo-class": ["a", "b", ""],
    "x-request-id": ["id", "x" * 300, "\x7f"],
    "Content-Type": ["application/json", "text/plain", "application/json; charset=utf-16", ";"],
    "Content-Encoding": ["gzip", "identity"],
    "Authorization": ["Bearer x", "Basic \u00ff"],
    "Expect": ["100-continue"],
    "Host": ["localhost", "evil.test", "[::1", "\u00ff", ":"],
    "Origin": ["https://evil.test", "null", "http://[", "x"],
}
GOOD_STATUS = {200, 400, 401, 403, 404, 405, 408, 413, 415, 417, 429, 503}


def rng_of(kind: str, index: int) -> random.Random:
    """Return the random numbers of one mutation."""
    return random.Random(f"{kind} {index}")


class Files:
    """Mutates one file of a model and reads all that an engine reads of it."""

    def __init__(self, kind: str, folder: Path) -> None:
        self._kind, self._mutate = kind, FILES[kind]
        self._raw = (SEEDS / kind).read_bytes()
        self._folder = folder
        if kind == "model.gguf":
            self._file = self._source = folder / kind
        else:
            for seed in (*SEEDS.iterdir(), *(SEEDS / kind).parent.iterdir()):
                if seed.is_file():
                    shutil.copy(seed, folder / seed.name)
            (folder / "model.gguf").unlink()
            self._file, self._source = folder / Path(kind).name, folder

    def run(self, index: int) -> None:
        """Read the file after one mutation."""
        changed = self._mutate(self._raw, rng_of(self._kind, index))
        self._file.write_bytes(changed)
        try:
            if self._kind == "chat_template.jinja":
                self._render(changed)
            else:
                self._read()
        except FlowPrefillError:
            pass

    def _render(self, template: bytes) -> None:
        try:
            text = template.decode()
        except UnicodeDecodeError:
            open_checkpoint(self._source)
            return
        ChatTemplate(text, {"bos_token": "<s>"}).render(MESSAGES)

    def _read(self) -> None:
        checkpoint = open_checkpoint(self._source)
        tokenizer = checkpoint.tokenizer
        tokenizer.check_fits(PROMPT, 10_000)
        tokenizer.decode(tokenizer.encode(PROMPT))
        rope_inverse_frequencies(checkpoint.config)
        for _, tensor in checkpoint.weights():
            assert tensor.numel() >= 0


class Bodies:
    """Sends mutated bodies to a server."""

    def __init__(self, kind: str, folder: Path) -> None:
        del folder
        self._kind = kind
        self._seeds: list[Any] = json.loads((SEEDS / "bodies.json").read_bytes())
        engine = FakeEngine(EngineConfig(classes={"a": {"ttft_ms": 5}}))
        engine.max_model_len = 2000
        engine.script = Script(text="Hi")
        logging.disable(logging.WARNING)
        self._server = RunningServer(engine, ServerOptions(service_tiers={"flex": "a"}))

    def run(self, index: int) -> None:
        """Send one body; the reply must be a good one or an error of ours, and the server live."""
        rng = rng_of(self._kind, index)
        seed = rng.choice(self._seeds)
        raw = mutations.of_json(json.dumps(seed).encode(), rng)
        headers = {"Content-Type": "application/json"}
        for name in rng.sample(sorted(HEADERS), rng.choice((0, 0, 0, 1, 2))):
            headers[name] = rng.choice(HEADERS[name])
        path = rng.choice(PATHS)
        method = "GET" if path.startswith("/debug") else "POST"
        if rng.random() < 0.05:
            method = rng.choice(("GET", "PUT", "OPTIONS", "POST"))
        self._send(method, path, raw, headers)
        if index % 50 == 0:
            assert self._server.get("/health").status == 200

    def _send(self, method: str, path: str, raw: bytes, headers: dict[str, str]) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=LIMIT_S)
        try:
            connection.request(method, path, raw, headers)
            reply = connection.getresponse()
            body = reply.read()
        except (http.client.BadStatusLine, ConnectionError, ValueError):
            return  # the client's own refusal, or a connection that is closed on what is no HTTP
        finally:
            connection.close()
        assert reply.status in GOOD_STATUS, f"status {reply.status}: {body[:500]!r}"
        if reply.status != 200:
            assert json.loads(body)["error"]["message"]


def main(first: int, count: int, kinds: list[str]) -> None:
    """Run the mutations; a signal or an exception ends the process."""
    faulthandler.enable()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    for kind in kinds:
        times = BODIES_PER_FILE if kind == HTTP else 1
        make: Callable[[str, Path], Files | Bodies] = Bodies if kind == HTTP else Files
        with tempfile.TemporaryDirectory() as folder:
            runner = make(kind, Path(folder))
            for index in range(first * times, (first + count) * times):
                print(kind, index, flush=True)
                signal.alarm(LIMIT_S)  # its default action ends the process
                runner.run(index)
                signal.alarm(0)
    print("done", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
    os._exit(0)  # the server's threads are waited for by no one
