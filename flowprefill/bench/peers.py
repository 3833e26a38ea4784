"""`flowprefill bench prefill --peers`: prefill and decode next to other engines.

Each in a process of its own, because its threads would slow ours; in turn within every
round, so that a change of the machine's speed meets all; and stopped between its turns, because
some wait for their next request in a loop, on a core that the others are measured on. All open
the same checkpoint in bf16 (those named int8 round its weights to 8 bits) and get the same random
prompts of ids. A row of decode is the time of some tokens for each sequence, less the time of the
first one: of several, which are submitted at once, it has the steps of some while the others are
prefilled. A row of steps is the time of as many further tokens, when all decode.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from flowprefill.bench.common import check_lengths, load_engine, random_ids, say
from flowprefill.bench.peer_child import PEERS, LlamaCpp
from flowprefill.bench.peer_models import NAMES
from flowprefill.bench.report import Report, Row, print_table
from flowprefill.bench.statistics import median
from flowprefill.engine import Engine
from flowprefill.engine.calibration import default_cache_dir
from flowprefill.errors import ConfigError
from flowprefill.models.registry import DEFAULT_MODEL
from flowprefill.request import Request, SamplingParams

CHILD = Path(__file__).with_name("peer_child.py")
DECODE_BATCHES = (1, 16)
DECODE_CONTEXT = 64
DECODE_TOKENS = 32
COLUMNS = {
    "engine": "engine",
    "model": "model",
    "work": "work",
    "tokens_per_s": "tokens/s",
    "min": "min",
    "max": "max",
    "flowprefill_faster": "flowprefill is x times as fast",
}

# Generates so many tokens for each prompt; returns the seconds it took.
Generate = Callable[[list[list[int]], int], float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the comparison with other engines."""
    names = ", ".join(PEERS)
    parser.add_argument(
        "--peers", nargs="*", choices=tuple(PEERS), metavar="NAME",
        help=f"compare with these engines: {names}; no name: all that are installed",
    )  # fmt: skip
    parser.add_argument(
        "--peer-python", action="append", default=[], metavar="NAME=PATH",
        help="interpreter of the environment that has the engine; default: this one",
    )  # fmt: skip
    parser.add_argument(
        "--peer-models", nargs="+", choices=NAMES, default=(DEFAULT_MODEL,), metavar="MODEL",
        help=f"what to compare on: {', '.join(NAMES)}; made once in the user's cache folder",
    )  # fmt: skip


def run(args: argparse.Namespace, lengths: list[int], rounds: int) -> int:
    """Measure, print the table, write the JSON."""
    pythons = _pythons(args.peer_python)
    names = args.peers or [name for name in PEERS if _is_installed(name, pythons)]
    report = Report("peers", {"rounds": rounds, "seed": args.seed, "tokens": lengths})
    versions: dict[str, str] = {}
    report.extra["versions"] = versions
    for model in args.peer_models:
        args.model = str(_checkpoint(model, names))
        with load_engine(args, granularity=args.granularity) as engine:
            check_lengths(engine, lengths)
            report.settings["engine"] = engine.describe()
            peers: list[_Child] = []
            try:
                for name in names:
                    peers.append(_Child.start(name, pythons, args.model, engine.threads))
                    versions[name] = peers[-1].version
                rows = report.rows
                for known in _measure(engine, peers, model, lengths, rounds, args.seed):
                    report.rows = rows + rows_of(model, known)
                    report.write(args.json)  # anew each time, for a run that is ended early
            finally:
                for peer in peers:
                    peer.close()
    print_table("Next to other engines", report.rows, COLUMNS)
    report.write(args.json)
    return 0


def _pythons(given: Sequence[str]) -> dict[str, str]:
    """Return the interpreter of each peer.

    Raises:
        ConfigError: not NAME=PATH, an unknown name, no such file.
    """
    found = dict.fromkeys(PEERS, sys.executable)
    for text in given:
        name, _, path = text.partition("=")
        if name not in PEERS or not Path(path).is_file():
            expected = f"NAME=PATH, NAME one of {', '.join(PEERS)}, PATH an interpreter"
            raise ConfigError(
                f"peer-python: got {text!r}, expected {expected}", param="peer-python"
            )
        found[name] = path
    return found


def _is_installed(name: str, pythons: dict[str, str]) -> bool:
    module = PEERS[name].module
    code = f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is None)"
    done = subprocess.run([pythons[name], "-c", code], capture_output=True, check=False)
    if done.returncode != 0:
        say(f"{name}: not installed for {pythons[name]}")
    return done.returncode == 0


def _checkpoint(name: str, peers: Sequence[str]) -> Path:
    """Return the folder that the peers open; what is not there yet is made."""
    cache = default_cache_dir()
    if cache is None:
        raise ConfigError("peers: no home folder for their models, expected XDG_CACHE_HOME")
    folder = cache / "peers" / name
    wanted = [PEERS[peer].weights for peer in peers if issubclass(PEERS[peer], LlamaCpp)]
    gguf = [kind for kind in wanted if not (folder / f"{kind}.gguf").exists()]
    if gguf or not folder.exists():
        say(f"making {folder} {' '.join(gguf)}".rstrip())
        make = [sys.executable, "-m", "flowprefill.bench.peer_models", name, str(folder), *gguf]
        subprocess.run(make, check=True)
    return folder


class _Child:
    """A peer's process."""

    def __init__(self, name: str, process: subprocess.Popen[str]) -> None:
        self.name = name
        self._process = process
        self.version = str(self._answer()["version"])
        self._signal(signal.SIGSTOP)

    @classmethod
    def start(cls, name: str, pythons: dict[str, str], folder: str, threads: int) -> Self:
        """Start it and wait until its model is loaded.

        Raises:
            ConfigError: it ended; its stderr says why.
        """
        say(f"loading {name}")
        command = [pythons[name], str(CHILD), name, folder, str(threads)]
        pipe = subprocess.PIPE
        # A group, for the processes that it may start. Of this session: then Linux ends a stopped
        # group whose parent was killed.
        return cls(
            name,
            subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, process_group=0),
        )

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self.close()
            raise ConfigError(f"peers: {self.name} ended with {code}", param="peers")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def generate_s(self, prompts: list[list[int]], tokens: int) -> float:
        """Generate; returns seconds, NaN if the peer cannot, which is said."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps({"prompts": prompts, "tokens": tokens}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        self._signal(signal.SIGSTOP)
        if "error" in answer:
            say(f"{self.name}: {answer['error']}")
        return float(answer.get("seconds", "nan"))

    def close(self) -> int:
        """End it; returns its exit status."""
        self._signal(signal.SIGCONT)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        return self._process.wait(60)


def _ours_s(engine: Engine, prompts: list[list[int]], tokens: int) -> float:
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    start_s = time.perf_counter()
    for handle in [engine.submit(Request(ids, params)) for ids in prompts]:
        handle.result(600)
    return time.perf_counter() - start_s


def _measure(
    engine: Engine, peers: Sequence[_Child], model: str, lengths: list[int], rounds: int, seed: int
) -> Iterator[dict[tuple[str, str], list[float]]]:
    """Measure all at every length and batch, in turn.

    Yields:
        When all have done a work, tokens per second by work and engine of all until then.
    """
    engines: dict[str, Generate] = {
        "flowprefill": lambda prompts, tokens: _ours_s(engine, prompts, tokens)
    }
    engines |= {peer.name: peer.generate_s for peer in peers}
    rng = random.Random(seed)

    def prompts_of(sequences: int, tokens: int) -> list[list[int]]:
        return [random_ids(rng, tokens, engine.vocab_size) for _ in range(sequences)]

    for generate in engines.values():  # first use of memory and kernels
        for sequences in DECODE_BATCHES:
            generate(prompts_of(sequences, DECODE_CONTEXT), 2)
    rates: dict[tuple[str, str], list[float]] = {}

    def note(work: str, name: str, rate: float) -> None:
        rates.setdefault((work, name), []).append(rate)
        say(f"{work:12} {rate:8.0f} tokens/s  {name}")

    names = list(engines)
    for number in range(rounds):
        order = names[number % len(names) :] + names[: number % len(names)]
        for tokens in lengths:
            for name in order:
                took_s = engines[name](prompts_of(1, tokens), 1)
                note(f"prefill {tokens}", name, tokens / took_s)
            yield rates
        for sequences in DECODE_BATCHES:
            for name in order:
                # Other prompts each time: some engines keep the prefixes they have seen.
                first_s = engines[name](prompts_of(sequences, DECODE_CONTEXT), 1)
                prompts = prompts_of(sequences, DECODE_CONTEXT)
                took_s = engines[name](prompts, 1 + DECODE_TOKENS) - first_s
                note(f"decode of {sequences}", name, _rate(sequences, took_s))
                if sequences > 1:
                    prompts = prompts_of(sequences, DECODE_CONTEXT)
                    twice_s = engines[name](prompts, 1 + 2 * DECODE_TOKENS) - first_s
                    note(f"steps of {sequences}", name, _rate(sequences, twice_s - took_s))
            yield rates
        say(f"{model}: round {number + 1}/{rounds}")


def _rate(sequences: int, took_s: float) -> float:
    """Return tokens per second; NaN where another process held back what was subtracted."""
    return sequences * DECODE_TOKENS / took_s if took_s > 0.0 else math.nan


def rows_of(model: str, rates: dict[tuple[str, str], list[float]]) -> list[Row]:
    """Return one row for each work and engine, from tokens per second by (work, engine)."""
    rows: list[Row] = []
    known = {
        key: [rate for rate in found if math.isfinite(rate)] or [math.nan]
        for key, found in rates.items()
    }
    for (work, name), found in known.items():
        row: Row = {
            "engine": name,
            "model": model,
            "work": work,
            "tokens_per_s": median(found),
            "min": min(found),
            "max": max(found),
            "samples": len(found),
        }
        if name != "flowprefill":
            row["flowprefill_faster"] = median(known[work, "flowprefill"]) / median(found)
        rows.append(row)
    return rows
