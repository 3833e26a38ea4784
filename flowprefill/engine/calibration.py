"""Calibration: measures once how fast this machine runs this model; keeps the result on disk."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import math
import os
import platform
import secrets
import select
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowprefill.config import EngineConfig, Granularity
from flowprefill.engine.loading import plan_options
from flowprefill.engine.worker import FIRST_PROBE_RUN
from flowprefill.scheduling.cost_model import (
    MachineRates,
    ModelShape,
    attention_pairs,
    corrected,
)
from flowprefill.scheduling.operator_rates import Corrections
from flowprefill.version import __version__

if TYPE_CHECKING:
    from flowprefill.engine.device import NativeExecutor, NativeModel, ProbeSizes
    from flowprefill.engine.worker import RunHandle

log = logging.getLogger(__name__)

MEASUREMENT = 3  # raise it when rates come to mean something else: those kept are void then
ROUNDS = 3
MIN_CONTEXT = 256  # below it is too short to tell attention from the rest, and to matter
CHECKED_TOKENS = 128  # few, so that a start stays quick
TOO_SLOW = 1.25  # kept rates that predict so many times what is measured come from a busy machine
OVERHEAD_S = 3e-4  # of one run, from its dispatch to its event; the executor's own is far below

# Builds the run that computes so many tokens on so much context.
MakeProbe = Callable[[int, int], "RunHandle"]


def probes_of(native: Any, model: NativeModel, num_blocks: int, vocab_size: int) -> MakeProbe:
    """Return what makes probes of random tokens on a model with a free cache of so many blocks.

    Args:
        native: the module the model is of.
    """
    table = np.arange(num_blocks, dtype=np.int32)
    plan = plan_options(native, Granularity("none"), MachineRates())
    ids = itertools.count(FIRST_PROBE_RUN)
    noise = np.random.default_rng(0)

    def make_probe(tokens: int, context: int) -> RunHandle:
        rows = noise.integers(0, vocab_size, tokens, dtype=np.int32)
        sequence = native.BatchSequence(rows=tokens, context=context, block_table=table)
        return model.make_run(next(ids), native.Batch(rows, [sequence]), plan)

    return make_probe


def execute(executor: NativeExecutor, run: RunHandle) -> float:
    """Execute one run on an executor without other users; returns its running time, seconds."""
    executor.dispatch(run)
    while run.state not in ("finished", "cancelled", "failed"):
        select.select([executor.event_fd], [], [])
        executor.pop_events()
    executor.pop_events()
    if run.state != "finished":
        raise RuntimeError(f"calibration: {run.error}")
    return run.accounting().running_s


def measure(
    executor: NativeExecutor,
    make_probe: MakeProbe,
    shape: ModelShape,
    max_context: int,
    sizes: ProbeSizes,
) -> MachineRates:
    """Measure the four rates: one token, a short prompt, a short prompt on a long context.

    Attention is what the long context adds to the short prompt, so the two take turns: a machine
    whose speed drifts changes both. It is products with work in between, so its rate is at most
    theirs; a larger one is noise.

    Args:
        executor: started, idle; no other thread takes its events.
        max_context: tokens that the KV cache and the model allow; probes keep to it.
    """

    def seconds(tokens: int, context: int) -> float:
        return min(execute(executor, make_probe(tokens, context)) for _ in range(ROUNDS))

    linear_tokens = min(sizes.tokens, max_context)
    execute(executor, make_probe(linear_tokens, 0))  # the first touch of weights and kernels
    one_s = seconds(1, 0)
    weight_bytes_per_s = (shape.read_bytes(1) + shape.head_bytes) / one_s
    head_s = shape.head_bytes / weight_bytes_per_s
    short_s = max(seconds(linear_tokens, 0) - head_s, 1e-6)
    gemm = linear_tokens * shape.linear_flops_per_token / short_s
    tokens = min(sizes.tokens, max_context // 2)
    context = min(sizes.context, max_context - tokens)
    if context < MIN_CONTEXT:
        return MachineRates(gemm, gemm / 2, weight_bytes_per_s, OVERHEAD_S)
    for start in range(0, context, tokens) if sizes.fills_context else ():
        execute(executor, make_probe(min(tokens, context - start), start))
    alone_s = behind_s = math.inf
    for _ in range(ROUNDS):
        alone_s = min(alone_s, execute(executor, make_probe(tokens, 0)))
        behind_s = min(behind_s, execute(executor, make_probe(tokens, context)))
    pairs = attention_pairs(tokens, context) - attention_pairs(tokens, 0)
    attention = pairs * shape.attention_flops_per_pair / max(behind_s - alone_s, 1e-6)
    return MachineRates(gemm, min(attention, gemm), weight_bytes_per_s, OVERHEAD_S)


def were_measured_busy(
    executor: NativeExecutor,
    make_probe: MakeProbe,
    shape: ModelShape,
    max_context: int,
    rates: MachineRates,
) -> bool:
    """Return whether rates kept from earlier are far below what one short prompt shows now.

    The opposite says nothing: the machine may be busy at this moment.
    """
    tokens = min(CHECKED_TOKENS, max_context)
    execute(executor, make_probe(tokens, 0))  # the first touch of weights and kernels
    measured_s = min(execute(executor, make_probe(tokens, 0)) for _ in range(2))
    linear_s = tokens * shape.linear_flops_per_token / rates.gemm_flops_per_s
    return linear_s > TOO_SLOW * measured_s


def mended(
    rates: MachineRates, corrections: Corrections, is_exclusive: bool
) -> MachineRates | None:
    """Return the rates to keep for the next start; None: those that are kept will do.

    Args:
        rates: those that are kept.
        corrections: what was learnt since.
        is_exclusive: whether no other process uses the device. Where others do, rates are mended
            only where they are too slow: what makes them slower may not be there next time.
    """
    most = math.inf if is_exclusive else 1.0
    kept = Corrections(*(min(factor, most) for factor in corrections))
    if max(max(factor, 1 / factor) for factor in kept[:-1]) < TOO_SLOW:
        return None
    return corrected(rates, kept)


def default_cache_dir() -> Path | None:
    """Return the user's cache folder for this program; None: this user has no home folder."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return None
    return Path(base) / "flowprefill"


def cache_folder(config: EngineConfig) -> Path | None:
    """Return where measurements are kept; None: nowhere."""
    return Path(config.cache_dir) if config.cache_dir else default_cache_dir()


class RatesFile:
    """Where the rates of this machine, model and settings are kept."""

    def __init__(self, folder: Path | None, key: dict[str, object]) -> None:
        """Name the file; it need not exist.

        Args:
            folder: None: nothing is kept.
            key: what the rates depend on apart from processor and version.
        """
        measured = {"cpu": _processor(), "version": __version__, "measurement": MEASUREMENT}
        whole = {**key, **measured}
        self._identity = json.dumps(whole, sort_keys=True)
        digest = hashlib.blake2b(self._identity.encode(), digest_size=12).hexdigest()
        self._path = None if folder is None else folder / f"rates-{digest}.json"

    def read(self) -> MachineRates | None:
        """Return the rates kept; None if there are none, or the file is damaged."""
        if self._path is None:
            return None
        try:
            kept = json.loads(self._path.read_text())["rates"]
            return MachineRates(**{field.name: kept[field.name] for field in fields(MachineRates)})
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("kept calibration cannot be read, measuring again: %s", error)
            return None
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            log.warning("%s is damaged, measuring again: %s", self._path, error)
            return None

    def write(self, rates: MachineRates) -> None:
        """Keep the rates; where that is impossible the log says so."""
        if self._path is None:
            why = "this user has no home folder; set cache_dir or XDG_CACHE_HOME"
            log.warning("calibration is not kept: %s", why)
            return
        text = json.dumps({"key": json.loads(self._identity), "rates": asdict(rates)}, indent=1)
        # Two containers that share the folder may be process 1 both.
        fresh = self._path.with_suffix(f".{secrets.token_hex(8)}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_text(text)
            fresh.replace(self._path)
        except OSError as error:
            log.warning("calibration is not kept: %s", error)
            with contextlib.suppress(OSError):
                fresh.unlink()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        named = {name.strip(): value.strip() for name, value in fields.items()}
        parts = ("model name", "cpu family", "model", "stepping")
        return " ".join(named.get(part, "") for part in parts)
    except OSError:
        return platform.processor() or platform.machine()
